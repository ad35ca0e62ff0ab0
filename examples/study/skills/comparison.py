"""What is measured in parts 7 and 8: models alone, and every arm of every mix."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..merging import run
from ..models import State, load_state
from ..store import Row
from .arms import Arm, arms
from .measuring import Measurement, options
from .settings import Mix, Skills
from .texts import prompts, write_prompts

ALONE, MERGE, STATISTICS = "alone", "merge", "statistics"
BASE = "base"
PROMPTS = "prompts"  # statistics from one half of the package's own prompts


class Models(Protocol):
    """The models of a part: trained, found and measured.

    Attributes:
        labelled: whether their training texts have labels.
    """

    settings: Skills
    work: Path
    device: str
    labelled: bool

    def base(self) -> Path: ...

    def folder(self, kind: str, seed: int) -> Path: ...

    def train(self, kind: str, seed: int) -> Path: ...

    def calibration(self, kind: str, n: int, seed: int) -> list[dict[str, Any]]: ...

    def losses(self, state: State, seed: int) -> Row: ...


@dataclass(frozen=True)
class Job:
    """One row of the results."""

    part: str
    seed: int
    arm: str
    variant: str


@dataclass(frozen=True)
class Comparison:
    """All rows of a part. Each is measured on its own: processes can share them."""

    models: Models

    def trained(self) -> Iterator[Job]:
        """The models alone. These rows train them."""
        for seed in self._settings.seeds:
            yield from (Job(ALONE, seed, name, "-") for name in (*self._settings.kinds, BASE))

    def measured(self) -> Iterator[Job]:
        """The statistics that the arms read. These rows measure them."""
        wanted = {
            (kind, arm.statistics): None for mix in self._settings.mixes for kind in mix.kinds for arm in arms(mix.arms)
        }
        for seed in self._settings.seeds:
            yield from (Job(STATISTICS, seed, kind, source) for kind, source in wanted if source)

    def merged(self) -> Iterator[Job]:
        for seed in self._settings.seeds:
            yield from (Job(MERGE, seed, mix.name, arm.name) for mix in self._settings.mixes for arm in arms(mix.arms))

    def kept(self, job: Job) -> bool:
        """Whether the model or the statistics that a row was measured from are still there."""
        if job.part == ALONE:
            return job.arm == BASE or self.models.folder(job.arm, job.seed).exists()
        return job.part == MERGE or self._file(job.arm, job.seed, job.variant).exists()

    def row(self, job: Job) -> Row:
        return {ALONE: self._alone, STATISTICS: self._statistics, MERGE: self._merge}[job.part](job)

    def config(self, mix: Mix, arm: Arm, seed: int) -> dict[str, object]:
        """The merge of this mix by this arm, with the directories and statistics of a seed."""
        folders = [self.models.folder(kind, seed) for kind in mix.kinds]
        files = [self._file(kind, seed, arm.statistics) for kind in mix.kinds] if arm.statistics else []
        return arm.config(self.models.base(), folders, mix.weights, files)

    def measurement(self, kind: str, seed: int, source: str) -> Measurement:
        """The statistics of one model from a set of texts, such as ``texts-60``, ``fisher-60`` or ``prompts``."""
        if source == PROMPTS:
            lines = [{"text": line} for line in prompts(0)]
        else:
            lines = self.models.calibration(kind, int(source.split("-")[1]), seed)
        path = write_prompts(lines, self.models.work / "prompts" / f"{kind}-{seed}-{source}.jsonl")
        return Measurement(
            self.models.folder(kind, seed),
            path,
            self._file(kind, seed, source),
            options(source, self.models.device, self.models.labelled),
        )

    def mix(self, name: str) -> Mix:
        return next(mix for mix in self._settings.mixes if mix.name == name)

    @property
    def _settings(self) -> Skills:
        return self.models.settings

    def _file(self, kind: str, seed: int, source: str) -> Path:
        return self.models.work / "statistics" / f"{kind}-{seed}-{source}.safetensors"

    def _alone(self, job: Job) -> Row:
        folder = self.models.base() if job.arm == BASE else self.models.train(job.arm, job.seed)
        return self.models.losses(load_state(folder), job.seed)

    def _statistics(self, job: Job) -> Row:
        measurement = self.measurement(job.arm, job.seed, job.variant)
        started = time.perf_counter()
        measurement.run()
        return {"measure_seconds": time.perf_counter() - started}

    def _merge(self, job: Job) -> Row:
        mix = self.mix(job.arm)
        arm = next(arm for arm in arms(mix.arms) if arm.name == job.variant)
        work = self.models.work / f"merge-{os.getpid()}"
        started = time.perf_counter()
        out = run(
            self.config(mix, arm, job.seed), work, work / "merged", random_seed=job.seed, device=self.models.device
        )
        seconds = time.perf_counter() - started
        found = self.models.losses(load_state(out), job.seed)
        shutil.rmtree(work)
        return found | {"merge_seconds": seconds}
