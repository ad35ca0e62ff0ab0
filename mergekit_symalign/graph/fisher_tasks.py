"""Tasks that merge with Fisher information: its diagonal, or its Kronecker factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Dict, Optional, Tuple

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task
from torch import Tensor

from mergekit_symalign.fusion.fisher import fisher_mean
from mergekit_symalign.fusion.kronecker import Factors, kronecker_mean
from mergekit_symalign.fusion.outcome import Merged, Route
from mergekit_symalign.graph.fusion_tasks import LOG, WARNINGS, MergeLinear, Part, WithStatistics
from mergekit_symalign.graph.pieces import PIECE, in_pieces, is_large
from mergekit_symalign.graph.statistics import mean_of_factors
from mergekit_symalign.symmetry.element import BlockElement, TensorAxes
from mergekit_symalign.symmetry.statistics import moved_fisher


class MergeKronecker(MergeLinear):
    """The mean weighted by Kronecker factors (`kronecker_mean`).

    Attributes:
        normalize: divide each model's factors by the mean of what they stand for, over this tensor.
        scales: the same by a mean over the model, from `MeanFisher`.
    """

    epsilon: float
    normalize: bool = False
    scales: Tuple[Task, ...] = ()

    def arguments(self) -> Dict[str, Task]:
        return {**super().arguments(), **{f"scale{i}": task for i, task in enumerate(self.scales)}}

    def _kinds(self) -> Tuple[str, ...]:
        return ("gram", "gradient_gram")

    def _read(self, index: int, device: torch.device, given: Mapping[str, Any]) -> Dict[str, Tensor]:
        found = super()._read(index, device, given)
        lookup = self.parts[index].lookup
        assert lookup is not None
        mean = mean_of_factors(lookup)[0] if self.normalize else 1.0
        mean = given[f"scale{index}"]["mean"] if self.scales else mean
        return found | {"gradient_gram": found["gradient_gram"].double() / (mean or 1.0)}

    def _merged(
        self,
        layers: Sequence[Tensor],
        shares: Sequence[float],
        statistics: Iterator[Mapping[str, Tensor]],
        base: Tensor | None,
    ) -> Merged:
        factors = [Factors(one["gram"], one["gradient_gram"]) for one in statistics]
        return kronecker_mean(layers, shares, factors, epsilon=self.epsilon)


class GatherFisher(Task[Dict[ModelReference, Tensor]]):
    """The diagonal Fisher information of one tensor for each model, moved along with its model.

    Attributes:
        parts, axes, moves: as for the merge.
        label: when to schedule it.
    """

    parts: Tuple[Part, ...]
    axes: Optional[TensorAxes]
    moves: Tuple[Optional[Task], ...]
    label: Optional[str] = None

    def arguments(self) -> Dict[str, Task]:
        return {f"move{i}": task for i, task in enumerate(self.moves) if task is not None}

    def group_label(self) -> Optional[str]:
        return self.label

    def execute(self, **given: Any) -> Dict[ModelReference, Tensor]:
        return {part.model: self._moved(i, part, given) for i, part in enumerate(self.parts)}

    def _moved(self, index: int, part: Part, given: Mapping[str, Any]) -> Tensor:
        assert part.lookup is not None
        fisher, moved = part.lookup.read("fisher"), given.get(f"move{index}")
        if moved is None or self.axes is None:
            return fisher
        return moved_fisher(BlockElement.unpack(moved["actions"]), fisher, self.axes)


class MergeFisher(WithStatistics):
    """Averages one tensor by its diagonal Fisher information (`fisher_mean`): ``{"weight", "facts"}``.

    Attributes:
        fishers: the task that gives the Fisher information of each model.
        epsilon: what is added, times the mean over this tensor.
        normalize: divide each model's information by its mean over this tensor.
        scales: the same by a mean over the model, from `MeanFisher`.
    """

    fishers: Task
    epsilon: float
    normalize: bool
    scales: Tuple[Task, ...] = ()

    def arguments(self) -> Dict[str, Task]:
        scales = {f"scale{i}": task for i, task in enumerate(self.scales)}
        return {"weights": self.weights, "fishers": self.fishers, **scales}

    def execute(
        self, weights: Dict[ModelReference, Tensor], fishers: Dict[ModelReference, Tensor], **given: Any
    ) -> Dict[str, Any]:
        found = [weights[part.model] for part in self.parts]
        information = [fishers[part.model].to(found[0].device) for part in self.parts]
        means = [float(x.mean(dtype=torch.float64)) if x.numel() else 0.0 for x in information]
        by = means if self.normalize else [1.0] * len(means)
        by = [given[f"scale{i}"]["mean"] for i in range(len(means))] if self.scales else by
        factors = [1 / x if x > 0 else 1.0 for x in by]
        shares = [part.share for part in self.parts]
        floor = self.epsilon * sum(s * f * x for s, f, x in zip(shares, factors, means, strict=True))

        def merged(some: Callable[[Tensor], Tensor]) -> Tensor:
            """Of some rows, in float64."""
            scaled = [some(x).double() * f for x, f in zip(information, factors, strict=True)]
            return self._rounded(fisher_mean(list(map(some, found)), shares, scaled, floor=floor).weight, found[0])

        if is_large(found[0]):
            weight = in_pieces(lambda at, n: merged(lambda x: x.narrow(0, at, n)), found[0].shape, 0, most=PIECE)
        else:
            weight = merged(lambda x: x)
        if any(means):
            return {"weight": weight, "facts": {}}
        LOG.warning("tensor %s: %s", self.name, WARNINGS[Route.average])
        return {"weight": weight, "facts": {"merged_by": Route.average.value}}
