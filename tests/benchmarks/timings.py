"""What has to be fast, by the clock: `make timings` fails where something takes longer than it may."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mergekit_symalign.symmetry.assignment.linear import best_assignment


def start_of_python() -> float:
    """Seconds that the line in mergekit_symalign.pth adds to every start of Python; the fastest of five."""
    line = (Path(sysconfig.get_paths()["purelib"]) / "mergekit_symalign.pth").read_text("utf-8")
    code = f"import os, sys, time; t = time.perf_counter(); exec({line!r}); print(time.perf_counter() - t)"
    return min(float(subprocess.check_output([sys.executable, "-S", "-c", code])) for _ in range(5))


def neurons_of_very_different_size(spread: int, dtype: torch.dtype) -> Callable[[], float]:
    """Seconds to assign 600 of them: minutes, where costs are not rounded to whole numbers."""

    def measure() -> float:
        g = torch.Generator().manual_seed(0)
        a, b = ((spread * torch.randn(600, 1, generator=g)).exp() * torch.randn(600, 256, generator=g) for _ in "ab")
        score = (a @ b.mT).to(dtype)
        started = time.perf_counter()
        best_assignment(score)
        return time.perf_counter() - started

    return measure


CHECKS = {"the start of Python": (start_of_python, 1e-3)} | {
    f"600 neurons, {spread} e-folds apart, {dtype}": (neurons_of_very_different_size(spread, dtype), 20.0)
    for spread in (1, 3)
    for dtype in (torch.float32, torch.float64)
}


def main() -> int:
    """Print each check with what it took and what it may take; the exit code is how many took longer."""
    slow = 0
    for name, (measure, most) in CHECKS.items():
        seconds = measure()
        slow += seconds > most
        print(f"{'slow' if seconds > most else 'ok':4}  {seconds:9.5f} s of {most:g} s  {name}", flush=True)
    return slow


if __name__ == "__main__":
    sys.exit(main())
