"""One merge in a process of its own, as `mergekit-yaml` runs it: `python -m gpu.one_merge CONFIG OUT OPTIONS`.

Writes what it took as one line of JSON: seconds, those inside solves, and the largest memory of the device.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml


def main(config: Path, out: Path, options: dict[str, Any]) -> dict[str, float]:
    from mergekit_symalign import hook

    hook.install()
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    from mergekit_symalign.graph.solve import SolveTogether

    device = torch.device(options.get("device", "cpu"))
    seconds, inner = [0.0], SolveTogether.execute

    def timed(self: SolveTogether, **tensors: torch.Tensor) -> dict[str, Any]:
        wait(device)
        start = time.perf_counter()
        found = inner(self, **tensors)
        wait(device)
        seconds[0] += time.perf_counter() - start
        return found

    settings = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False, **options)
    start = time.perf_counter()
    with patch.object(SolveTogether, "execute", timed):
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(config.read_text("utf-8"))), str(out), settings)
    wait(device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"seconds": time.perf_counter() - start, "solving": seconds[0], "peak": float(peak)}


def release(device: torch.device) -> None:
    """Give back what this process keeps of the device's memory for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """For all that the device has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))))
