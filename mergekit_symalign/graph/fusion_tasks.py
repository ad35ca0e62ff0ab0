"""The tasks of merges with statistics: one linear layer with its bias, or one tensor weighted by Fisher information."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task
from torch import Tensor

from mergekit_symalign.fusion.outcome import Merged, Route
from mergekit_symalign.fusion.regmean import FALLBACK, gram_with_bias, regmean, regmean_of_task_vectors, with_bias
from mergekit_symalign.graph.linear import Linear
from mergekit_symalign.graph.statistics import Lookup
from mergekit_symalign.symmetry.element import BlockElement, TensorAxes
from mergekit_symalign.symmetry.statistics import moved_gram, moved_mean

LOG = logging.getLogger(__name__)

_ROWS = 1 << 14  # of a head as large as the vocabulary: the rows are independent, and float64 is large
_WORST = (Route.exact, Route.ridge, Route.average)


@dataclass(frozen=True)
class Part:
    """One model's share of a merged tensor.

    Attributes:
        model: whose it is.
        share: its weight in the merge, above 0.
        lookup: of its statistics; None where none are needed.
    """

    model: ModelReference
    share: float
    lookup: Optional[Lookup]


class WithStatistics(Task[Dict[str, Any]]):
    """What tasks that merge with statistics have in common.

    Attributes:
        name: of the merged tensor.
        parts: of the models.
        axes: of the tensor, where models are aligned.
        moves: the solution of each part's block; None for a model that is not aligned.
        weights: the task that gives the models' tensors.
        out_dtype: of the merged tensor.
    """

    name: str
    parts: Tuple[Part, ...]
    axes: Optional[TensorAxes]
    moves: Tuple[Optional[Task], ...]
    weights: Task
    out_dtype: Optional[str]

    def arguments(self) -> Dict[str, Task]:
        moved = {f"move{i}": task for i, task in enumerate(self.moves) if task is not None}
        return {"weights": self.weights, **moved}

    def group_label(self) -> Optional[str]:
        return self.weights.group_label()

    def uses_accelerator(self) -> bool:
        return True

    def _element(self, index: int, given: Mapping[str, Any]) -> BlockElement:
        """How a part was aligned."""
        moved = given.get(f"move{index}")
        return BlockElement({}) if moved is None else BlockElement.unpack(moved["actions"])

    def _rounded(self, x: Tensor, like: Tensor) -> Tensor:
        return x.to(dtype_from_name(self.out_dtype) or like.dtype)


class MergeLinear(WithStatistics):
    """Merges the weight of a linear layer, and its bias as one more input: ``{"weight", "bias", "facts"}``.

    Attributes:
        layer: how the weight is stored.
        biases: the task that gives the models' biases, if the layer has one.
        base: the model that is the base, if the method has one.
    """

    layer: Linear
    biases: Optional[Task] = None
    base: Optional[ModelReference] = None

    def arguments(self) -> Dict[str, Task]:
        biases = {} if self.biases is None else {"biases": self.biases}
        return {**super().arguments(), **biases}

    def execute(
        self, weights: Dict[ModelReference, Tensor], biases: Optional[Dict[ModelReference, Tensor]] = None, **given: Any
    ) -> Dict[str, Any]:
        rows = {m: self._rows(weights[m], None if biases is None else biases[m]) for m in self._models()}
        merged = self._experts(rows, given) if self.layer.experts else [self._one(rows, None, given)]
        self._tell([one.route for one in merged])
        like = next(iter(weights.values()))
        found = {name: self._rounded(x, like).contiguous() for name, x in self._stored(merged).items()}
        return {**found, "facts": self._facts(merged)}

    def _stored(self, merged: Sequence[Merged]) -> Dict[str, Tensor]:
        """Weight and bias as the model stores them."""
        if self.layer.experts:
            return {"weight": torch.stack([one.weight for one in merged])}
        rows, bias = merged[0].weight, {}
        if self.biases is not None:
            rows, bias = rows[:, :-1], {"bias": rows[:, -1]}
        return {"weight": rows.mT if self.layer.transposed else rows, **bias}

    def _experts(self, rows: Mapping[ModelReference, Tensor], given: Mapping[str, Any]) -> list[Merged]:
        """One after another, the statistics of all of them read once."""
        device = next(iter(rows.values())).device
        read = [self._read(i, device, given) for i, part in enumerate(self.parts) if part.lookup is not None]
        count = next(iter(rows.values())).shape[0]
        return [self._one(rows, [{k: x[e] for k, x in one.items()} for one in read], given, e) for e in range(count)]

    def _one(
        self,
        rows: Mapping[ModelReference, Tensor],
        read: Sequence[Mapping[str, Tensor]] | None,
        given: Mapping[str, Any],
        expert: int = 0,
    ) -> Merged:
        """A matrix of the layer; its statistics are read one model after another where they were not read before."""
        device = next(iter(rows.values())).device
        statistics = iter(read) if read is not None else (self._read(i, device, given) for i in range(len(self.parts)))
        layers = [rows[part.model].select(0, expert) for part in self.parts]
        base = None if self.base is None else rows[self.base].select(0, expert)
        return self._merged(layers, [part.share for part in self.parts], statistics, base)

    @abstractmethod
    def _merged(
        self,
        layers: Sequence[Tensor],
        shares: Sequence[float],
        statistics: Iterator[Mapping[str, Tensor]],
        base: Tensor | None,
    ) -> Merged:
        """Merge layers [out, in]. Statistics are those of `_kinds`, moved along with their models."""

    def _kinds(self) -> Tuple[str, ...]:
        return ("gram",)

    def _models(self) -> list[ModelReference]:
        return [*(part.model for part in self.parts), *([] if self.base is None else [self.base])]

    def _rows(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[experts, out, in (+ 1)]."""
        rows = weight.mT if self.layer.transposed else weight
        rows = rows if bias is None else with_bias(rows, bias)
        return rows if self.layer.experts else rows.unsqueeze(0)

    def _read(self, index: int, device: torch.device, given: Mapping[str, Any]) -> Dict[str, Tensor]:
        """The statistics of one part, moved along with its model."""
        lookup = self.parts[index].lookup
        assert lookup is not None
        element = self._element(index, given)
        found: Dict[str, Tensor] = {}
        for kind in self._kinds():
            x = lookup.read(kind).to(device)
            found[kind] = self._moved(kind, element, x)
        if self.biases is not None:
            mean = lookup.read("mean").to(device)
            if self.axes is not None and element.actions:
                mean = moved_mean(element, mean, self.layer.read(self.axes)[0])
            found["gram"] = gram_with_bias(found["gram"], mean)
        return found

    def _moved(self, kind: str, element: BlockElement, x: Tensor) -> Tensor:
        if self.axes is None or not element.actions:
            return x
        along = self.layer.read(self.axes) if kind == "gram" else self.layer.written(self.axes)
        return moved_gram(element, x, *along)

    def _tell(self, routes: Sequence[Route]) -> None:
        for route, what in WARNINGS.items():
            if count := routes.count(route):
                of = f" ({count} of {len(routes)} experts)" if len(routes) > 1 else ""
                LOG.warning("tensor %s%s: %s", self.name, of, what)

    def _facts(self, merged: Sequence[Merged]) -> Dict[str, Any]:
        """What the report says where the formula alone did not do."""
        route = max((one.route for one in merged), key=_WORST.index)
        return {} if route is Route.exact else {"merged_by": route.value}


WARNINGS = {
    Route.ridge: "the statistics of its inputs are of too few tokens, so its matrices are singular. Solved with "
    f"{FALLBACK:g} of each input's own size added. Measure with more tokens, or set ridge",
    Route.average: "the statistics say nothing of it, as no token reached it. Taken from the plain average instead",
}


class MergeRegMean(MergeLinear):
    """RegMean (`regmean`)."""

    off_diagonal: float
    ridge: float

    def _merged(
        self,
        layers: Sequence[Tensor],
        shares: Sequence[float],
        statistics: Iterator[Mapping[str, Tensor]],
        base: Tensor | None,
    ) -> Merged:
        settings = {"off_diagonal": self.off_diagonal, "ridge": self.ridge}
        grams = (one["gram"] for one in statistics)
        if len(layers[0]) <= _ROWS:
            return regmean(layers, shares, grams, **settings)
        held = list(grams)
        starts = range(0, len(layers[0]), _ROWS)
        blocks = [regmean([x[i : i + _ROWS] for x in layers], shares, held, **settings) for i in starts]
        return Merged(torch.cat([self._rounded(one.weight, layers[0]) for one in blocks]), blocks[0].route)


class MergeTaskVectors(MergeLinear):
    """RegMean on task vectors (`regmean_of_task_vectors`), with statistics from files or the vectors themselves."""

    off_diagonal: float
    ridge: float
    factor: float

    def _merged(
        self,
        layers: Sequence[Tensor],
        shares: Sequence[float],
        statistics: Iterator[Mapping[str, Tensor]],
        base: Tensor | None,
    ) -> Merged:
        assert base is not None
        measured = self.parts[0].lookup is not None
        return regmean_of_task_vectors(
            base,
            layers,
            shares,
            (one["gram"] for one in statistics) if measured else None,
            factor=self.factor,
            off_diagonal=self.off_diagonal,
            ridge=self.ridge,
        )


class PartOf(Task[Any]):
    """One entry of what a task gives.

    Attributes:
        merged: the task.
        entry: "weight", "bias" or "facts".
    """

    merged: Task
    entry: str

    def arguments(self) -> Dict[str, Task]:
        return {"merged": self.merged}

    def group_label(self) -> Optional[str]:
        return self.merged.group_label()

    def execute(self, merged: Dict[str, Any]) -> Any:
        return merged[self.entry]
