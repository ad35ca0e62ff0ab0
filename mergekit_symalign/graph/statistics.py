"""Files of statistics inside a merge: which there are, whether they belong to the models, and how tasks read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict

from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_symalign.activations.calibration import tokenizer_digest
from mergekit_symalign.activations.images import processor_digest
from mergekit_symalign.errors import CalibrationError, OtherStatisticsError, ParameterError, StatisticsFileError
from mergekit_symalign.graph.alignments import sizes_of
from mergekit_symalign.graph.checkpoint_checks import Checkpoint
from mergekit_symalign.graph.fingerprint import fingerprint_of
from mergekit_symalign.graph.readers import image_processor_of, tokenizer_of
from mergekit_symalign.graph.ready import Ready
from mergekit_symalign.hub.address import published
from mergekit_symalign.sharing.fetch import STATISTICS, local_file
from mergekit_symalign.statistics.file import StatisticsFile
from mergekit_symalign.symmetry.residual.kinds import STREAM

_SHOWN = 12  # digits of a digest, in reports


@dataclass(frozen=True)
class Lookup:
    """Where a task finds the statistics of one tensor of a model.

    Attributes:
        path: of the file.
        sha256: of all that it said when the merge was planned.
        name: under which it knows the tensor.
    """

    path: str
    sha256: str
    name: str

    @property
    def file(self) -> StatisticsFile:
        """
        Raises:
            StatisticsFileError: if the file was replaced.
        """
        return _reopened(self.path, self.sha256)

    def read(self, kind: str) -> Tensor:
        """One statistic in float32, checked."""
        return self.file.read(self.name, kind)


@lru_cache(maxsize=16)
def _reopened(path: str, sha256: str) -> StatisticsFile:
    file = StatisticsFile.open(Path(path))
    if file.sha256 != sha256:
        raise StatisticsFileError(file.label, "it was replaced while it was in use", "Start again")
    return file


@dataclass
class StatisticsFiles:
    """The files that a merge reads, each opened once.

    Attributes:
        method: the name of the merge method, for errors.
        checkpoints: the models of the merge.
        options: of MergeKit.
        vocabularies_matched: whether MergeKit brings the models' vocabularies together.
    """

    method: str
    checkpoints: Mapping[ModelReference, Checkpoint]
    options: MergeOptions
    vocabularies_matched: bool
    _files: dict[tuple[str, ModelReference], StatisticsFile] = field(default_factory=dict)
    _fingerprints: dict[ModelReference, str] = field(default_factory=dict)

    def of(self, one: Ready, model: ModelReference) -> StatisticsFile:
        """The file that the user gave for a model, once it was found to belong to it.

        Raises:
            ParameterError: if there is none.
            StatisticsFileError: if it is damaged, or of another model.
        """
        path = one.asked("statistics", model)
        if path is None:
            raise ParameterError(
                f"parameter statistics of model {model}",
                f"{self.method} needs the model's statistics to merge {one.name}, and none are given",
                f"Measure them: mergekit-symalign measure {model} -o stats.safetensors; "
                "then add parameters: {statistics: stats.safetensors} to the model",
            )
        if (path, model) not in self._files:
            file = local_file(path, STATISTICS, self.options.transformers_cache)
            self._files[path, model] = self._checked(file, model)
        return self._files[path, model]

    def lookup(self, one: Ready, model: ModelReference, kinds: Iterable[str]) -> Lookup | None:
        """Where the statistics of a tensor are; None if the file's own ``--only`` left it out, or nobody measures it.

        Raises:
            ParameterError, StatisticsFileError: as `of`; if the file lacks the tensor, or one of the kinds.
        """
        file = self.of(one, model)
        names = self._names(one, model)
        name = next((name for name in names if file.kinds(name)), None)
        if name is None:
            only = file.measured.only
            if only is not None and not any(re.search(only, name) for name in names):
                return None
            if self._is_inside_mixer(model, names[0]):
                return None
            name = names[0]
        for kind in kinds:
            file.stored(name, kind)
        return Lookup(str(file.path), file.sha256, name)

    def _is_inside_mixer(self, model: ModelReference, name: str) -> bool:
        """Whether a tensor lies in a layer, but neither in a block nor at the stream: mixers use such weights in ways
        of their own, which no statistics tell."""
        claim = self.checkpoints[model].layout.claim(name)
        if claim is None or claim.layer is None:
            return False
        return claim.spec.block is None and STREAM not in claim.spec.axes

    def facts(self) -> dict[str, Any]:
        """What a report says of the files; no folder of this machine."""
        return {str(model): _described(file) for (_, model), file in self._files.items()}

    def require_one_tokenizer(self) -> None:
        """
        Raises:
            OtherStatisticsError: if texts became other numbers for one model than for another, and nobody tells that
                they belong together.
        """
        if self.vocabularies_matched or not self._files:
            return
        (_, first), one = next(iter(self._files.items()))
        for (_, model), file in self._files.items():
            if file.origin.tokenizer != one.origin.tokenizer:
                raise OtherStatisticsError(
                    file.label,
                    f"model {model} was measured with another tokenizer than {first}",
                    "Let MergeKit match the tokenizers: tokenizer: {source: base}",
                )

    def _names(self, one: Ready, model: ModelReference) -> list[str]:
        """What a tensor may be called: as it is planned, as transformers calls it, and what is tied to it."""
        planned, names = one.source(model).name, self.checkpoints[model].names
        place = names.place(planned)
        tied = [] if place is None else [place.name, *sorted(names.tied(place.name))]
        return list(dict.fromkeys((planned, *tied)))

    def _checked(self, path: Path, model: ModelReference) -> StatisticsFile:
        file = StatisticsFile.open(path)
        checkpoint = self.checkpoints[model]
        file.require_family(checkpoint.layout.family.name, sizes_of(checkpoint), str(model))
        file.require_model(str(model), self._fingerprint(model))
        if (reader := self._reader(model)) is not None:
            file.require_tokenizer(str(model), reader)
        return file

    def _reader(self, model: ModelReference) -> str | None:
        """Digest of what turns texts or images into the model's inputs; None if the model comes without."""
        outside = self.checkpoints[model].layout.outside.values()
        try:
            if any("vocabulary" in spec.axes for spec in outside):
                return tokenizer_digest(tokenizer_of(model, self.options))
            return processor_digest(image_processor_of(model, self.options))
        except CalibrationError:
            return None

    def _fingerprint(self, model: ModelReference) -> str:
        if model not in self._fingerprints:
            self._fingerprints[model] = fingerprint_of(model)
        return self._fingerprints[model]


def _described(file: StatisticsFile) -> dict[str, Any]:
    m = file.measured
    return {
        "file": published(file.path),
        "sha256": file.sha256,
        "gram": m.gram,
        "fisher": m.fisher,
        "tokens": m.tokens,
        "sequences": m.sequences,
        "labels": m.labels,
        "only": m.only,
        "loss": m.loss,
        "calibration": m.calibration[:_SHOWN],
    }


class MeanFisher(Task[Dict[str, Any]]):
    """The mean of a model's Fisher information over all tensors that are merged by it, as ``{"mean": …}``.

    Attributes:
        lookups: of these tensors.
        factors: whether the file has Kronecker factors.
    """

    lookups: tuple[Lookup, ...]
    factors: bool

    def arguments(self) -> Dict[str, Task]:
        return {}

    def execute(self) -> Dict[str, Any]:
        total, count = 0.0, 0
        for lookup in self.lookups:
            mean, size = mean_of_factors(lookup) if self.factors else _mean_of_diagonal(lookup)
            total, count = total + mean * size, count + size
        return {"mean": total / max(count, 1)}


def _mean_of_diagonal(lookup: Lookup) -> tuple[float, int]:
    x = lookup.read("fisher")
    return float(x.double().mean()), x.numel()


def mean_of_factors(lookup: Lookup) -> tuple[float, int]:
    """Mean of the diagonal of A ⊗ B, over all experts, and its length."""
    a, b = (lookup.read(kind).double() for kind in ("gram", "gradient_gram"))
    a, b = (x.diagonal(dim1=-2, dim2=-1) for x in (a, b))
    return float((a.mean(-1) * b.mean(-1)).mean()), a.numel() * b.shape[-1]
