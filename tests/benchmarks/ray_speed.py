"""`make bench-ray`: one process against one and two workers of Ray on this machine (docs/many-machines.md).

    python tests/benchmarks/ray_speed.py [--runs 3] [--layers 8] [--small] [--out tests/benchmarks/ray_speed.json]

A plain merge is mostly reading and writing. An aligned merge of unrelated models is mostly arithmetic. The three ways
take turns, each in a fresh process with one thread a worker, so that what else the machine does meets all of them. What
counts is the ratio within a round. Ray starts and ends with each merge, which is part of its time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from checkpoints import BASE, LLAMA_1B, SMALL, Recipe, Shape, checkpoint

ROOT = Path(__file__).parent.parent.parent
WAYS = {
    "one process": [],
    "1 worker": ["--ray", "local", "--workers", "1"],
    "2 workers": ["--ray", "local", "--workers", "2"],
}
TABLE = """| merge | one process, s | 1 worker, s | times as fast | 2 workers, s | times as fast |
|---|---:|---:|---|---:|---|"""
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def merges(cache: Path, shape: Shape) -> dict[str, dict[str, Any]]:
    """The configurations."""
    anchor, *models = (checkpoint(cache, shape, recipe) for recipe in (BASE, Recipe(seed=1), Recipe(seed=2)))
    listed = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    shared = {"base_model": str(anchor), "models": listed, "dtype": "bfloat16"}
    return {
        "plain task_arithmetic": {"merge_method": "task_arithmetic"} | shared,
        "aligned_task_arithmetic, unrelated models": {"merge_method": "aligned_task_arithmetic"} | shared,
    }


def seconds(config: dict[str, Any], options: list[str], folder: Path) -> float:
    """Wall time of one merge in a fresh process; its output is removed."""
    file, out = folder / "merge.yml", folder / "out"
    file.write_text(yaml.safe_dump(config), "utf-8")
    command = [
        sys.executable,
        "-m",
        "mergekit_symalign.cli",
        "yaml",
        file,
        out,
        "--quiet",
        "--no-copy-tokenizer",
        "-j",
        "1",
    ]
    start = time.perf_counter()
    done = subprocess.run([*command, *options], env=ENVIRONMENT, capture_output=True, text=True)
    wall = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    shutil.rmtree(out)
    return wall


def measured(config: dict[str, Any], runs: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of each way, in rounds."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(runs):
        for way, options in WAYS.items():
            found[way].append(round(seconds(config, options, folder), 2))
            print(f"  {way}: {found[way][-1]:.1f} s", flush=True)
    return found


def ratios(found: dict[str, list[float]], way: str) -> list[float]:
    """One process' time over this way's, of each round; more than 1 is faster."""
    return [one / other for one, other in zip(found["one process"], found[way], strict=True)]


def line(name: str, found: dict[str, list[float]]) -> str:
    """A line of the table."""
    cells = [f"{median(found['one process']):.1f}"]
    for way in list(WAYS)[1:]:
        of_rounds = ratios(found, way)
        cells += [
            f"{median(found[way]):.1f}",
            f"{median(of_rounds):.2f} ({min(of_rounds):.2f} to {max(of_rounds):.2f})",
        ]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--small", action="store_true", help="tiny models: shows that it runs")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "benchmarks")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    shape = SMALL if options.small else replace(LLAMA_1B, layers=options.layers)
    machine = {"cores": os.cpu_count(), "torch": torch.__version__, "load_before": os.getloadavg()}
    facts: dict[str, Any] = {"shape": vars(shape), **machine, "seconds": {}}
    lines = [TABLE]
    for name, config in merges(options.cache, shape).items():
        print(name, flush=True)
        facts["seconds"][name] = measured(config, options.runs, options.cache)
        lines.append(line(name, facts["seconds"][name]))
    facts["load_after"] = os.getloadavg()
    options.out.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
