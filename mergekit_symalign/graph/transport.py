"""Tasks of optimal transport fusion: one step in front of the layers, one for each layer, one behind them.

A step depends on the step before it, which gives the maps of the residual stream, and on the tensors of its own layer.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import Any, Dict, List, Optional, Tuple

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task

from mergekit_symalign.families.flow import Place
from mergekit_symalign.fusion.correlations import TokenSums
from mergekit_symalign.fusion.flow import Evidence, Flow, Part, Parts, Policy, through_end, through_front, through_layer
from mergekit_symalign.fusion.maps import Map, packed_map, unpacked_map, weighted_mean
from mergekit_symalign.symmetry.element import TensorAxes
from mergekit_symalign.symmetry.options import HeadShape

LOG = logging.getLogger(__name__)

_LOOSE = 1e-3  # error of a map's sums from which it is worth a warning

About = Tuple[TensorAxes, Optional[Place]]
Tensors = Dict[ModelReference, torch.Tensor]


class TransportStep(Task[Dict[str, Any]]):
    """Brings some tensors of every model to the anchor's coordinates and averages them.

    The result is ``{"maps": …, "tensors": …, "facts": …}``: of each model but the anchor the maps that the next step
    needs, in dicts of tensors; the merged tensors by name; and of each model what is known of its maps.

    Attributes:
        key: stands for the merge; hashing all steps before this one would take forever.
        step: its number.
        title: what it is, for messages.
        models: anchor first.
        names: of its tensors.
        inputs: of each tensor, the task that gives those of the models.
        about: of each tensor, its axes and its place in the residual stream.
        weights: of each tensor, the weight of each model.
        dtypes: of each merged tensor.
        policy: the choices.
        previous: the step before it.
        evidence: of each model but the anchor, what it has in common with the anchor on prompts.
    """

    key: str
    step: int
    title: str
    models: Tuple[ModelReference, ...]
    names: Tuple[str, ...]
    inputs: Tuple[Task, ...]
    about: Tuple[About, ...]
    weights: Tuple[Tuple[float, ...], ...]
    dtypes: Tuple[Optional[str], ...]
    policy: Policy
    previous: Optional[Task] = None
    evidence: Optional[Task] = None

    def __hash__(self) -> int:
        return hash((self.key, self.step))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TransportStep) and (self.key, self.step) == (other.key, other.step)

    def group_label(self) -> Optional[str]:
        return max(task.group_label() or "" for task in self.inputs)

    def uses_accelerator(self) -> bool:
        return True

    def arguments(self) -> Dict[str, Task]:
        others = {"previous": self.previous, "evidence": self.evidence}
        tensors = {f"tensor{i}": task for i, task in enumerate(self.inputs)}
        return {**tensors, **{name: task for name, task in others.items() if task is not None}}

    @abstractmethod
    def flow(self, parts: Parts, before: Dict[str, Map], evidence: Evidence) -> Flow:
        """The maps of one model."""

    @abstractmethod
    def after(self, flow: Flow, before: Dict[str, Map]) -> Dict[str, Map]:
        """The maps that the next step needs."""

    def execute(self, previous: Any = None, evidence: Any = None, **tensors: Tensors) -> Dict[str, Any]:
        given = {name: tensors[f"tensor{i}"] for i, name in enumerate(self.names)}
        moved: List[Tensors] = [
            {self.models[0]: of[self.models[0]]} if self.models[0] in of else {} for of in given.values()
        ]
        maps, facts = [], []
        for i, model in enumerate(self.models[1:]):
            parts = self._parts(given, model)
            before = {} if previous is None else {k: unpacked_map(v) for k, v in previous[i].items()}
            flow = self.flow(parts, before, Evidence() if evidence is None else _evidence(evidence[i]))
            for name, at in zip(self.names, moved, strict=True):
                if name in parts:
                    at[model] = flow(parts[name])
            maps.append({k: packed_map(v) for k, v in self.after(flow, before).items()})
            facts.append(self._told(flow, model))
        return {"maps": maps, "tensors": self._averaged(moved), "facts": facts}

    def _parts(self, given: Dict[str, Tensors], model: ModelReference) -> Dict[str, Part]:
        """The tensors that the model has; the anchor's stands in for its own where only one of them has it."""
        about = dict(zip(self.names, self.about, strict=True))
        found = {name: of[model] for name, of in given.items() if model in of}
        return {name: Part(*about[name], given[name].get(self.models[0], x), x) for name, x in found.items()}

    def _averaged(self, moved: List[Tensors]) -> Dict[str, Any]:
        merged: Dict[str, Any] = {}
        for name, of, weights, dtype in zip(self.names, moved, self.weights, self.dtypes, strict=True):
            shares = dict(zip(self.models, weights, strict=True))
            mean = weighted_mean([(x, shares[model]) for model, x in of.items()]) if of else None
            merged[name] = mean if mean is None or dtype is None else mean.to(getattr(torch, dtype))
        return merged

    def _told(self, flow: Flow, model: ModelReference) -> Dict[str, Any]:
        told = {f"{block}_{name}": value for block, facts in flow.facts.items() for name, value in facts.items()}
        loose = {name: x for name, x in told.items() if name.endswith("marginal_error") and x > _LOOSE}
        if loose:
            LOG.warning(
                "%s of %s: Sinkhorn's algorithm did not converge (a sum of the map was off by %.2g): use a larger "
                "regularization, or 0 for exact transport",
                self.title,
                model,
                max(loose.values()),
            )
        return told


class TransportFront(TransportStep):
    """The embeddings.

    Attributes:
        hidden: size of the residual stream.
    """

    hidden: int

    def flow(self, parts: Parts, before: Dict[str, Map], evidence: Evidence) -> Flow:
        return through_front(parts, self.hidden, self.policy, evidence)

    def after(self, flow: Flow, before: Dict[str, Map]) -> Dict[str, Map]:
        return {"stream": flow.places[Place.front], "words": flow.places[Place.words]}


class TransportLayer(TransportStep):
    """One layer.

    Attributes:
        heads: shape of its attention.
        parallel: attention and MLP read the same stream.
    """

    heads: HeadShape
    parallel: bool

    def flow(self, parts: Parts, before: Dict[str, Map], evidence: Evidence) -> Flow:
        return through_layer(parts, before["stream"], self.heads, self.policy, evidence, parallel=self.parallel)

    def after(self, flow: Flow, before: Dict[str, Map]) -> Dict[str, Map]:
        return {"stream": flow.places[Place.leaving], "words": before["words"]}


class TransportEnd(TransportStep):
    """What reads the residual stream behind the layers.

    Attributes:
        tied: whether the matrix that predicts words is the embedding.
    """

    tied: bool

    def flow(self, parts: Parts, before: Dict[str, Map], evidence: Evidence) -> Flow:
        return through_end(parts, before["stream"], before["words"], self.policy, tied=self.tied)

    def after(self, flow: Flow, before: Dict[str, Map]) -> Dict[str, Map]:
        return {}


def _evidence(given: Dict[str, Any]) -> Evidence:
    """From dicts and tuples of tensors."""
    outputs = {name: TokenSums(*tensors) for name, tensors in given["outputs"].items()}
    sizes = {Place(place): size for place, size in given["sizes"].items()}
    return Evidence(outputs, sizes, getattr(torch, given["dtype"]))
