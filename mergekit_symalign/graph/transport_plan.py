"""Planning optimal transport fusion: every tensor's place, and the chain of steps that merges them."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

from mergekit.common import ModelReference
from mergekit.graph import Task

from mergekit_symalign.errors import ArchitectureError, ConfigError, GeometryError, ParameterError
from mergekit_symalign.families.flow import Place, is_front, is_parallel, layer_places, outside_axes, outside_place
from mergekit_symalign.families.resolve import Claim, ModelLayout, lookup
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.fusion.flow import Heads, Policy, Residual
from mergekit_symalign.graph.activations import Part
from mergekit_symalign.graph.ready import Context, DataPlan, Ready
from mergekit_symalign.graph.transport import About, TransportEnd, TransportFront, TransportLayer, TransportStep
from mergekit_symalign.graph.transport_run import FRONT, Run, plan_run
from mergekit_symalign.symmetry.options import HeadShape

LOG = logging.getLogger(__name__)

INEXACT = "optimal transport mixes and reorders units without keeping what a model computes"


def plan_transport(context: Context) -> DataPlan:
    """A step in front of the layers, one for each layer, and one behind them.

    Raises:
        ArchitectureError: for a model that has experts, or tensors whose place is not known.
        ConfigError: if the merge does not consist of whole models, or parameters are not possible.
    """
    plan = _Plan(context)
    plan.require_possible()
    LOG.warning("%s: %s. rotation_match and the aligned methods keep it.", context.method.spec.name, INEXACT)
    tensors = dict(plan.steps())
    merged = [(one.weight, tensors.get(one.name) or one.merged_without_data(context.method)) for one in context.tensors]
    facts = {"transported_to": str(plan.anchor), "papers": context.papers()}
    return DataPlan(merged, facts, tuple(plan.findings), (INEXACT,))


@dataclass
class _Plan:
    context: Context

    def __post_init__(self) -> None:
        self.findings: list[tuple[str, Task]] = []
        first = self.context.tensors[0]
        assert first.base is not None  # graph/config_checks.py
        self.anchor: ModelReference = first.base
        self.models = (self.anchor, *(m for m in first.order if m != self.anchor))
        checkpoint = self.context.checkpoints[self.anchor]
        self.config, self.layout = checkpoint.config, checkpoint.layout

    def require_possible(self) -> None:
        """Everything that can be told before any tensor is read."""
        for model in self.models:
            _require_dense(self.context.checkpoints[model].layout, model)
            if self._shared("heads") == Heads.ignore.value:
                _require_plain_heads(self.context.checkpoints[model].layout, model)
        for one in self.context.tensors:
            self._require_whole(one)
            if sum(self._weights(one)) <= 0:
                raise ParameterError(
                    f"parameter weight of {one.name}",
                    "the weights of all models together are not positive, so there is no average",
                    "Give at least one model a positive weight",
                )
        if self._shared("cost") == "weights":
            for one in self.context.tensors:
                _require_no_sizes(one)

    def _require_whole(self, one: Ready) -> None:
        at = self.layout.claim(one.name)
        for model in self.models:
            if model not in one.order or one.base != self.anchor:
                raise _not_whole(one.name, f"model {model} is not merged there, or with another base_model")
            claim = self.context.checkpoints[model].layout.claim(one.source(model).name)
            if at is not None and (claim is None or claim.layer != at.layer):
                raise _not_whole(one.name, f"model {model} gives {one.source(model).name}")

    def steps(self) -> list[tuple[str, Task]]:
        """The task of each tensor that has a place in the flow, by its name."""
        run = self._run()
        found: list[tuple[str, Task]] = []
        previous: Task | None = None
        for step, (of_step, members) in enumerate(self._members.items()):
            task = self._step(step, of_step, members, previous, run)
            previous = Part(of=task, keys=("maps",))
            found += [(one.name, Part(of=task, keys=("tensors", one.name))) for one in members]
            self.findings += [
                (f"{task.title} of {m}", Part(of=task, keys=("facts", i))) for i, m in enumerate(self.models[1:])
            ]
        return found

    def _step(
        self, number: int, layer: int, members: list[Ready], previous: Task | None, run: Run | None
    ) -> TransportStep:
        shared: dict[str, Any] = {
            "key": self._key,
            "step": number,
            "models": self.models,
            "names": tuple(one.name for one in members),
            "inputs": tuple(one.inputs for one in members),
            "about": tuple(self._about(one) for one in members),
            "weights": tuple(self._weights(one) for one in members),
            "dtypes": tuple(one.out_dtype for one in members),
            "policy": self._policy(members),
            "previous": previous,
            "evidence": run.evidence.get(layer) if run is not None else None,
        }
        if layer == FRONT:
            return TransportFront(title="embeddings", hidden=self.layout.geometry.hidden, **shared)
        if layer < self.layout.layers:
            heads = self._heads(layer, shared["policy"])
            return TransportLayer(title=f"layer {layer}", heads=heads, parallel=self._parallel, **shared)
        return TransportEnd(title="head", tied=self._tied, **shared)

    def _heads(self, layer: int, policy: Policy) -> Any:
        shapes = {m: self.context.checkpoints[m].layout.head_shape(layer) for m in self.models}
        for model, shape in shapes.items():
            if policy.heads is Heads.respect and shape != shapes[self.anchor]:
                raise GeometryError(
                    f"layer {layer} of model {model}",
                    f"it has other positions than the anchor's (RoPE on {shape.rotary} and "
                    f"{shapes[self.anchor].rotary} coordinates)",
                    "Use heads: ignore, or merge models with the same positions",
                )
        return shapes[self.anchor]

    def _run(self) -> Run | None:
        if self._shared("cost") == "weights":
            return None
        aligned = {one.name: one.aligned for one in self.context.tensors}
        return plan_run(self.context, self.models, aligned, self._places, parallel=self._parallel)

    @cached_property
    def _members(self) -> dict[int, list[Ready]]:
        """The tensors of each step, by layer: -1 in front of the layers, their number behind them."""
        found: dict[int, list[Ready]] = defaultdict(list)
        once = {one.name: one for one in self.context.tensors}  # MergeKit plans some tensors twice
        for name, one in once.items():
            claim = self.layout.claim(name)
            if claim is not None and not claim.spec.any_shape:
                found[self._step_of(claim)].append(one)
        return dict(sorted(found.items()))

    def _step_of(self, claim: Claim) -> int:
        if claim.layer is not None:
            return claim.layer
        return FRONT if is_front(claim.part, claim.spec) else self.layout.layers

    def _about(self, one: Ready) -> About:
        claim = self.layout.claim(one.name)
        assert claim is not None
        if claim.layer is not None:
            return self.layout.axes(claim.spec), self._places.get(claim.part)
        place = outside_place(one.name, claim.spec, present=self._outside, tied=self._tied)
        return outside_axes(self.layout, claim.spec, place), place

    @cached_property
    def _outside(self) -> list[str]:
        claims = ((one.name, self.layout.claim(one.name)) for one in self.context.tensors)
        return [name for name, claim in claims if claim is not None and claim.layer is None]

    @cached_property
    def _places(self) -> Mapping[str, Place]:
        return layer_places(self.config, self.layout)

    @cached_property
    def _parallel(self) -> bool:
        return is_parallel(self.config, self.layout)

    @cached_property
    def _tied(self) -> bool:
        return bool(lookup(self.config, "tie_word_embeddings"))

    @cached_property
    def _key(self) -> str:
        return hashlib.sha256(self.context.config.model_dump_json().encode()).hexdigest()

    def _weights(self, one: Ready) -> tuple[float, ...]:
        return tuple(float(one.asked("weight", model)) for model in self.models)

    def _policy(self, members: list[Ready]) -> Policy:
        regularization, residual, heads = (_agreed(name, members) for name in ("regularization", "residual", "heads"))
        if not isfinite(regularization) or regularization < 0:
            raise ParameterError(
                "parameter regularization", f"it cannot be {regularization}", "Use 0 (exact), or a positive number"
            )
        return Policy(float(regularization), Residual(residual), Heads(heads))

    def _shared(self, name: str) -> Any:
        return _agreed(name, list(self.context.tensors))


def _agreed(name: str, members: list[Ready]) -> Any:
    """The value of a parameter that some tensors must share.

    Raises:
        ParameterError: naming two that do not.
    """
    first = members[0]
    for one in members[1:]:
        if one.asked(name) != first.asked(name):
            raise ParameterError(
                f"parameter {name}",
                f"it is {first.asked(name)} for {first.name} and {one.asked(name)} for {one.name}, but these are "
                "transported together",
                "Choose filters that give all tensors of a layer the same value; cost is the same for the whole merge",
            )
    return first.asked(name)


def _require_dense(layout: ModelLayout, model: ModelReference) -> None:
    if layout.geometry.latent is not None:
        raise ArchitectureError(
            f"model {model}",
            f"heads of {layout.family.title} share latents, which optimal transport fusion does not know",
            "Use regmean, fisher or an aligned method for this architecture",
        )
    if layout.geometry.experts > 1:
        raise ArchitectureError(
            f"model {model}",
            f"{layout.family.title} has experts, and optimal transport fusion knows no routers",
            "Use regmean, fisher or an aligned method for mixtures of experts",
        )
    usual = {(BlockKind.attention, BlockKind.mlp)}
    if {layout.kinds(layer) for layer in range(layout.layers)} != usual or layout.layer_kinds:
        raise ArchitectureError(
            f"model {model}",
            f"{layout.family.title} has layers that are not one attention and one MLP, and optimal transport fusion "
            "knows no others",
            "Use regmean, fisher or an aligned method for this architecture",
        )


def _require_plain_heads(layout: ModelLayout, model: ModelReference) -> None:
    """Queries, keys and values mixed over their full width leave behind what belongs to one head or coordinate."""
    shape = layout.head_shape(0)
    if isinstance(shape, HeadShape) and (shape.numbered or shape.locked or shape.gated or shape.of_keys):
        raise ArchitectureError(
            f"model {model}",
            "its heads have sinks, gates or position biases of their own, which mixing them loses",
            "Use heads: respect",
        )


def _require_no_sizes(one: Ready) -> None:
    if one.asked("residual") == "weighted":
        raise ParameterError(
            "parameter residual",
            "weighted needs to know how large activations are, but cost is weights, which runs no prompts",
            "Add cost: activations and calibration: prompts.jsonl, or use residual: mean",
        )


def _not_whole(name: str, found: str) -> ConfigError:
    return ConfigError(
        f"tensor {name}",
        f"optimal transport flows through all layers of whole models in their own order, but {found}",
        "Merge whole models without slices",
    )
