"""`make gpu-check`: what a GPU has to do as the CPU does, and what a merge costs there.

    PYTHONPATH=tests python -m gpu.check [--device cuda] [--minutes 8] [--out FILE] [--only TEXT] [--small]

Prints tables, and writes them as JSON. A part that fails is reported, the others go on, and the exit code is 1. A part
for which no time is left is skipped and named. Needs no network. With `--device cpu` the CPU takes the routes that are
meant for other devices, which shows that they find the same; times say nothing then.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gpu.results import Row, Setting, Stage, as_json, machine, run_stage, table
from mergekit_symalign import hook

ROOT = Path(__file__).parent.parent.parent
MEMORY = Path("/dev/shm")  # storage in memory, on Linux
_ENOUGH = 16 << 30  # bytes there, with which it is used

Work = Callable[[Setting, list[Row]], None]


def parts() -> dict[str, tuple[Work, float]]:
    """By name: what they do, and the seconds that have to be left for them."""
    hook.install()  # before MergeKit's own modules are imported
    from gpu import correctness, language, timings

    return {
        "solvers": (correctness.check_solvers, 30),
        "elements": (correctness.check_actions, 5),
        "transfers": (correctness.check_transfers, 20),
        "merges with MergeKit's options": (correctness.check_merges, 20),
        "one layer alone": (timings.time_layers, 60),
        "where the time goes": (timings.profile_layer, 30),
        "whole merges, 1B": (timings.time_merges_1b, 60),
        "objective: activations": (language.check_activations, 60),
        "learn": (language.check_learn, 60),
        "whole merges, 8B": (timings.time_merges_8b, 90),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a part failed."""
    options = _options(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here. Give --device cpu to run the same checks on the CPU.")
        return 2
    until = time.monotonic() + 60 * options.minutes
    scratch = Path(tempfile.mkdtemp(prefix="gpu-check-", dir=options.scratch or _scratch()))
    stages: list[Stage] = []
    try:
        setting = Setting(device, options.small, scratch, until)
        for name, (work, needs) in parts().items():
            if options.only in name:
                stages.append(run_stage(name, work, setting, needs))
                _show(stages[-1])
                _write(options.out, stages, setting)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    failed = [stage.name for stage in stages if stage.status == "failed"]
    print(f"\n{len(stages)} parts, failed: {', '.join(failed) or 'none'}; results in {options.out}")
    return int(bool(failed))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no part begins")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "gpu-check.json", help="the file of results")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints; storage in memory if there is enough")
    parser.add_argument("--only", default="", help="only parts whose name contains this")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    return parser.parse_args(arguments)


def _scratch() -> Path | None:
    """Storage in memory if there is enough, else where the system keeps temporary files."""
    return MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= _ENOUGH else None


def _show(stage: Stage) -> None:
    print(f"\n## {stage.name}: {stage.status} ({stage.seconds:.1f} s)\n", flush=True)
    if stage.note:
        print(stage.note + "\n")
    if stage.rows:
        print(table(stage.rows), flush=True)


def _write(out: Path, stages: Sequence[Stage], setting: Setting) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(as_json(stages, machine(setting.device), small=setting.small), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
