"""Statistics of a model as a file: what they are of, how they were measured, and the numbers, read one at a time.

A file may come from a stranger. `StatisticsFile.open` believes nothing that is not well formed. Numbers may be larger
than memory, so each is checked when it is read: its digest, its values, its symmetry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_symalign.errors import OtherStatisticsError, StatisticsFileError
from mergekit_symalign.hub.address import called, written_again
from mergekit_symalign.sealed.tensors import bytes_digest
from mergekit_symalign.sealed.text import shown
from mergekit_symalign.statistics.places import REMEDY, opened, read_text, reading
from mergekit_symalign.statistics.schema import KINDS, Content, Described, Measured, Origin, Tokens, parsed
from mergekit_symalign.statistics.writer import StatisticsWriter, write_statistics, writing

__all__ = ["KINDS", "Measured", "Origin", "StatisticsFile", "StatisticsWriter", "write_statistics"]

_ASYMMETRY = 1e-5  # of the largest number
_AGAIN = "Measure them again: mergekit-symalign measure"


@dataclass(frozen=True)
class StatisticsFile:
    """A file that was opened and found well formed.

    Attributes:
        path: where it is.
        content: its text.
        places: the file in which each of its tensors lies.
    """

    path: Path
    content: Content
    places: Mapping[str, Path]

    @staticmethod
    def open(path: Path) -> StatisticsFile:
        """Read the text, and compare it with the headers of all shards. No number is read.

        Args:
            path: ``NAME.safetensors`` or ``NAME.safetensors.index.json``; the first finds the second.

        Raises:
            StatisticsFileError: if the file is absent, of another kind, of a newer format, damaged, or lacks a shard.
        """
        text, places = read_text(path)
        with reading(path):
            try:
                content = parsed(text)
                _require_described(content.tensors, places)
            except RecursionError as error:
                raise ValueError(f"its metadata are damaged: {error}") from error
        return StatisticsFile(path, content, places)

    @property
    def origin(self) -> Origin:
        return self.content.origin

    @property
    def measured(self) -> Measured:
        return self.content.measured

    @property
    def sha256(self) -> str:
        """Of all that the file says; it covers the digests of the numbers."""
        return self.content.sha256

    @cached_property
    def label(self) -> str:
        return f"statistics {called(self.path)}"

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of the model that the file knows something of."""
        return tuple(self.content.statistics)

    def kinds(self, name: str) -> frozenset[str]:
        """The kinds of statistics that there are of a tensor."""
        return frozenset(self.content.statistics.get(name, ()))

    def tokens(self, name: str) -> Tokens:
        """How many tokens reached a tensor; one number for each expert where it holds several.

        Raises:
            StatisticsFileError: if there are no statistics of this tensor.
        """
        self._require_known(name)
        tokens = self.content.tokens[name]
        return tokens if isinstance(tokens, int) else tuple(tokens)

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        """Of a statistic, without reading it.

        Raises:
            StatisticsFileError: if there is none of this kind.
        """
        return tuple(self.content.tensors[self.stored(name, kind)][1])

    def stored(self, name: str, kind: str) -> str:
        """The name under which a statistic is stored. Tensors that read the same input share one.

        Raises:
            StatisticsFileError: if there is none of this kind.
        """
        self._require_known(name)
        kinds = self.content.statistics[name]
        if kind not in kinds:
            reason = f"it has no {kind} of tensor {name}, only {', '.join(sorted(kinds))}"
            raise OtherStatisticsError(self.label, reason, f"{_AGAIN} {_OPTIONS[kind]}")
        return kinds[kind]  # type: ignore[index]

    def read(self, name: str, kind: str) -> Tensor:
        """One statistic in float32, checked.

        Args:
            name: of the model's tensor.
            kind: ``gram`` [in, in], or [in] of diagonal ones; ``mean`` [in]; ``gradient_gram`` [out, out]; each with
                the experts first where the tensor has several; ``fisher`` (shape of the model's tensor).

        Raises:
            StatisticsFileError: if there is none, or it is damaged, not finite, negative or not symmetric.
        """
        stored = self.stored(name, kind)
        where = f"{self.label}, {kind} of {name}"
        place = self.places[stored]
        with reading(place), opened(place) as file:
            x: Tensor = file.get_tensor(stored)
        if bytes_digest(x) != self.content.tensors[stored][2]:
            raise StatisticsFileError(where, "its numbers are damaged: they differ from what was saved", REMEDY)
        if (wrong := problem_of_values(kind, x, square=x.ndim - isinstance(self.tokens(name), tuple) == 2)) is not None:
            raise StatisticsFileError(where, wrong, _AGAIN)
        return x

    def require_shape(self, name: str, kind: str, expected: Iterable[int]) -> None:
        """
        Raises:
            StatisticsFileError: if a statistic has another shape than the model's tensor needs.
        """
        found, wanted = self.shape(name, kind), tuple(expected)
        if found != wanted:
            sizes = [" x ".join(map(str, shape)) for shape in (found, wanted)]
            reason = f"its {kind} of tensor {name} is {sizes[0]}, but the model's tensor needs {sizes[1]}"
            raise OtherStatisticsError(self.label, reason, _AGAIN)

    def require_model(self, name: str, fingerprint: str) -> None:
        """
        Raises:
            OtherStatisticsError: if they were measured on another checkpoint.
        """
        if fingerprint != self.origin.fingerprint:
            raise OtherStatisticsError(
                self.label,
                f"they were measured on {shown(self.origin.model)}, but {name} has other weights (fingerprint "
                f"{fingerprint[:12]}, not {shown(self.origin.fingerprint[:12])})",
                f"Measure this model: mergekit-symalign measure {name} -o {written_again(self.path)}",
            )

    def require_family(self, family: str, sizes: Mapping[str, Any], model: str) -> None:
        """
        Raises:
            OtherStatisticsError: if the model is of another family or size.
        """
        remedy = f"Measure this model: mergekit-symalign measure {model} -o {written_again(self.path)}"
        if self.origin.family != family:
            reason = f"they are of family {shown(self.origin.family)}, but model {model} is of family {family}"
            raise OtherStatisticsError(self.label, reason, remedy)
        known = self.origin.sizes
        differences = [f"{shown(k)} {v} != {sizes.get(k)}" for k, v in known.items() if sizes.get(k) != v]
        if differences:
            reason = f"they are of another size than model {model}: {', '.join(differences)}"
            raise OtherStatisticsError(self.label, reason, remedy)

    def require_tokenizer(self, name: str, digest: str) -> None:
        """
        Raises:
            OtherStatisticsError: if the model reads other numbers from the same texts than the measured one.
        """
        if digest != self.origin.tokenizer:
            raise OtherStatisticsError(
                self.label,
                f"they were measured with another tokenizer than the one of {name}",
                f"Measure this model: mergekit-symalign measure {name} -o {written_again(self.path)}",
            )

    def _require_known(self, name: str) -> None:
        if name not in self.content.statistics:
            only = self.measured.only
            reason = f"it has nothing of tensor {name}" + (f": it was measured with --only {only}" if only else "")
            raise OtherStatisticsError(self.label, reason, f"{_AGAIN}, without --only" if only else _AGAIN)


def renamed_statistics(file: StatisticsFile, path: Path, origin: Origin) -> StatisticsFile:
    """Write statistics again with another origin, one number after another; each is checked on the way."""
    with writing(path) as writer:
        for kind, names in stored_once(file).values():
            writer.put(kind, names, file.read(names[0], kind))
        for name in file.names:
            writer.count((name,), file.tokens(name))
        writer.finish(origin, file.measured)
    return StatisticsFile.open(path)


def stored_once(file: StatisticsFile) -> dict[str, tuple[str, tuple[str, ...]]]:
    """By name of every stored tensor: its kind, and the model's tensors that share it."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for name in file.names:
        for kind in sorted(file.kinds(name)):
            stored = file.stored(name, kind)
            found[stored] = (kind, (*found.get(stored, (kind, ()))[1], name))
    return found


_OPTIONS = {
    "gram": "--gram full",
    "mean": "--gram full",
    "fisher": "--fisher empirical",
    "gradient_gram": "--fisher kronecker",
}


def problem_of_values(kind: str, x: Tensor, *, square: bool) -> str | None:
    """What is wrong with the numbers of a statistic.

    Args:
        kind: one of `KINDS`.
        x: its numbers.
        square: whether it is a matrix, or one for each expert.
    """
    if not bool(torch.isfinite(x).all()):
        return "it holds NaN or infinity"
    if kind == "mean" or x.numel() == 0:
        return None
    symmetric = square and kind in ("gram", "gradient_gram")
    if bool(((x.diagonal(dim1=-2, dim2=-1) if symmetric else x) < 0).any()):
        return "it has negative squares"
    if symmetric and float((x - x.mT).abs().max()) > _ASYMMETRY * float(x.abs().max()):
        return "it is not symmetric"
    return None


def _require_described(told: Mapping[str, Described], places: Mapping[str, Path]) -> None:
    """
    Raises:
        ValueError: if the files hold other tensors than the text describes.
    """
    if other := told.keys() ^ places.keys():
        raise ValueError(f"tensor {shown(min(other))} is {'missing' if other & told.keys() else 'not described'}")
    for path in sorted(set(places.values())):
        with reading(path), opened(path) as file:
            there = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            for name in (name for name, place in places.items() if place == path):
                if name not in there:
                    raise ValueError(f"tensor {shown(name)} is missing")
                found = (str(there[name].get_dtype()), list(there[name].get_shape()))
                if found != told[name][:2]:
                    raise ValueError(f"tensor {shown(name)} is {found}, but the text says {told[name][:2]}")
