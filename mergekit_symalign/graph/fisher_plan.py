"""From the tensors of a merge and the models' statistics to tasks: averages weighted by Fisher information."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors

from mergekit_symalign.errors import ConfigError, OtherStatisticsError
from mergekit_symalign.graph.fisher_tasks import GatherFisher, MergeFisher, MergeKronecker
from mergekit_symalign.graph.fusion import Planner, moves_of
from mergekit_symalign.graph.fusion_checks import require_reordered, shares_of
from mergekit_symalign.graph.fusion_tasks import Part, PartOf
from mergekit_symalign.graph.ready import Context, DataPlan, Ready
from mergekit_symalign.graph.statistics import Lookup, MeanFisher

FACTORS = ("gram", "gradient_gram")


def plan_fisher(context: Context) -> DataPlan:
    """Every tensor weighted by its diagonal Fisher information; linear layers by its factors where files have them."""
    return _FisherPlanner(context, MergeKronecker, FACTORS).plan()


class _FisherPlanner(Planner):
    """Plans averages weighted by Fisher information, of factors or of the diagonal."""

    def _tasks(self, one: Ready) -> dict[str, Task]:
        shares = shares_of(one)
        if any(self.context.checkpoints[m].stored(one.source(m)) is None for m in shares) or one.out_dtype is None:
            return {}
        if not self._is_learned(one):
            return {}
        if not self._have_factors(one, list(shares)):
            return self._diagonal_mean(one)
        if (layer := self._linear(one)) is not None:
            return {} if _has_vocabulary(one) else self._of_linear(one, layer)
        return {} if self._is_bias(one) else self._diagonal_mean(one)

    def _is_learned(self, one: Ready) -> bool:
        names = self.context.checkpoints[one.order[0]].names
        place = names.place(one.source(one.order[0]).name)
        return place is None or names.is_learned(place.name)

    def _is_bias(self, one: Ready) -> bool:
        """Whether it is merged together with a weight."""
        weight = self._by_name.get(one.name.removesuffix("bias") + "weight") if one.name.endswith("bias") else None
        return weight is not None and (layer := self._linear(weight)) is not None and layer.bias == one.name

    def _diagonal_mean(self, one: Ready) -> dict[str, Task]:
        parts = self._parts(one, ("fisher",))
        if parts is None:
            return {}
        for lookup in (part.lookup for part in parts if part.lookup is not None):
            self._require_fisher_shape(one, parts, lookup)
        moves, axes = moves_of(one, parts)
        if axes is not None:
            require_reordered(one, moves, axes.names, "diagonals of Fisher information")
        gathered = GatherFisher(parts=parts, axes=axes, moves=moves, label=one.inputs.group_label())
        vocabulary = not isinstance(one.inputs, GatherTensors)
        merged = MergeFisher(
            name=one.name,
            parts=parts,
            axes=axes,
            moves=moves,
            weights=one.inputs,
            out_dtype=one.out_dtype,
            fishers=one.inputs.model_copy(update={"gather_tensors": gathered}) if vocabulary else gathered,
            **self._options(one, parts),
        )
        self.findings.append((one.name, PartOf(merged=merged, entry="facts")))
        return {one.name: PartOf(merged=merged, entry="weight")}

    def _require_fisher_shape(self, one: Ready, parts: Sequence[Part], lookup: Lookup) -> None:
        model = next(part.model for part in parts if part.lookup == lookup)
        header = self.context.checkpoints[model].stored(one.source(model))
        assert header is not None
        lookup.file.require_shape(lookup.name, "fisher", header.shape)

    def _have_factors(self, one: Ready, models: Sequence[ModelReference]) -> bool:
        """Whether the files have factors of the Fisher information of linear layers, and not its diagonal.

        Raises:
            OtherStatisticsError: if a file has no Fisher information.
            ConfigError: if one file has factors of it, and another one diagonals.
        """
        files = {m: self.files.of(one, m) for m in models}
        for m, file in files.items():
            if file.measured.fisher == "none":
                raise OtherStatisticsError(
                    file.label,
                    f"it has no Fisher information of model {m}",
                    f"Measure it: mergekit-symalign measure {m} --fisher empirical",
                )
        by_form = {file.measured.fisher == "kronecker": m for m, file in files.items()}
        if len(by_form) > 1:
            raise ConfigError(
                "parameter statistics",
                f"model {by_form[True]} has Kronecker factors of its Fisher information, but {by_form[False]} has its "
                "diagonal",
                "Measure all models with the same --fisher",
            )
        return True in by_form

    def _options(self, one: Ready, parts: Sequence[Part]) -> dict[str, Any]:
        normalize = one.asked("normalize_fisher")
        scales = tuple(self._scale(one, part) for part in parts) if normalize == "model" else ()
        return {"epsilon": one.asked("epsilon"), "normalize": normalize == "tensor", "scales": scales}

    def _scale(self, one: Ready, part: Part) -> MeanFisher:
        """The mean over all of this kind that the model's file has."""
        assert part.lookup is not None
        file = part.lookup.file
        factors = "gradient_gram" in file.kinds(part.lookup.name)
        wanted = set(FACTORS if factors else ("fisher",))
        names = [name for name in file.names if wanted <= file.kinds(name)]
        lookups = tuple(Lookup(part.lookup.path, part.lookup.sha256, name) for name in names)
        return MeanFisher(lookups=lookups, factors=factors)


def _has_vocabulary(one: Ready) -> bool:
    """Whether a factor would be as large as the vocabulary, times itself."""
    return one.weight.vocabulary_axis is not None
