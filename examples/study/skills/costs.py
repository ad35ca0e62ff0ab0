"""Seconds and peak memory of merges and of statistics, each by its command in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from ..settings import HERE
from ..store import Row
from .arms import arms
from .comparison import Comparison, Job
from .measuring import size

COST = "cost"
MEASURED = "measure"  # in place of a mix
ARMS = ("average", "ties lambda=1.0", "fisher", "regmean", "regmean-vectors")
SOURCES = ("fisher-60", "texts-60")


def priced(comparison: Comparison) -> list[Job]:
    """The first mix by some arms on the CPU, and the statistics of its first model on the device of the study."""
    mix, seed = comparison.models.settings.mixes[0], comparison.models.settings.seeds[0]
    tried = arms(mix.arms)
    merges = [Job(COST, seed, mix.name, arm.name) for arm in tried if arm.name in ARMS]
    return merges + [Job(COST, seed, MEASURED, source) for source in SOURCES]


def cost(comparison: Comparison, job: Job) -> Row:
    """Seconds, peak memory, and of statistics the bytes of their files."""
    mix = comparison.models.settings.mixes[0]
    if job.arm == MEASURED:
        return _statistics(comparison, mix.kinds[0], job.seed, job.variant)
    arm = next(arm for arm in arms(mix.arms) if arm.name == job.variant)
    return _merge(comparison.config(mix, arm, job.seed), comparison.models.work)


def _merge(config: dict[str, object], work: Path) -> Row:
    folder = work / "cost"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yml").write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    found = timed(
        ["mergekit-yaml", str(folder / "config.yml"), str(folder / "merged"), "--no-copy-tokenizer", "--quiet"]
    )
    shutil.rmtree(folder)
    return found


def _statistics(comparison: Comparison, kind: str, seed: int, source: str) -> Row:
    measurement = comparison.measurement(kind, seed, source)
    folder = comparison.models.work / "cost"
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "statistics.safetensors"
    again = ["measure", str(measurement.model), "-o", str(out), "--calibration", str(measurement.prompts)]
    found = timed(["mergekit-symalign", *again, *measurement.options]) | {"bytes": size([out])}
    shutil.rmtree(folder)
    return found


def timed(command: Sequence[str]) -> Row:
    """Seconds from start to end of a process, imports included, and the peak of its memory in bytes.

    Raises:
        RuntimeError: if the command fails, with the end of what it wrote.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(HERE.parent), os.environ.get("PYTHONPATH", "")))}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "study.skills.peak", *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-2000:]}")
    return {"seconds": seconds, "peak_bytes": int(done.stdout.splitlines()[-1])}
