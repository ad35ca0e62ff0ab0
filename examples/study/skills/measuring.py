"""Statistics of models, by ``mergekit-symalign measure``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_symalign.cli import main as command

FISHER = "fisher-"  # fisher-60: the Fisher information from 60 texts


@dataclass(frozen=True)
class Measurement:
    """One file of statistics to be made.

    Attributes:
        options: of the command, beyond model, file and prompts.
    """

    model: Path
    prompts: Path
    out: Path
    options: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        return ["measure", str(self.model), "-o", str(self.out), "--calibration", str(self.prompts), *self.options]

    def run(self) -> Path:
        """Measure unless the file is there; the command leaves no file that only looks finished."""
        if not self.out.exists():
            command(self.arguments, standalone_mode=False)
        return self.out


def options(source: str, device: str, labelled: bool) -> tuple[str, ...]:
    """What is measured: Gram matrices, or the Fisher information alone, by the labels where there are some."""
    fisher = ("--gram", "none", "--fisher", "empirical", *(["--labels"] if labelled else []))
    return (*(fisher if source.startswith(FISHER) else ("--gram", "full")), "--device", device, "--quiet")


def size(files: Sequence[Path]) -> int:
    """Bytes of files of statistics, shards included."""
    return sum(shard.stat().st_size for file in files for shard in file.parent.glob(f"{file.stem}*{file.suffix}"))


def threads(workers: int) -> int:
    """Threads for each of some processes that share this machine."""
    return max(1, (os.cpu_count() or 1) // workers)
