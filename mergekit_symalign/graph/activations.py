"""Tasks that stream prompts through anchor and models, layer by layer, inside a merge."""

from __future__ import annotations

import hashlib
from functools import lru_cache, partial
from typing import Any, Dict, List, Optional, Tuple

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task

from mergekit_symalign.activations.runner import EXPERTS, LayerRunner, Recorded
from mergekit_symalign.activations.statistics import Statistics, Stream, run_layer
from mergekit_symalign.errors import ModelError
from mergekit_symalign.families.resolve import ModelLayout
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.graph.plain_merge import resolve_stored
from mergekit_symalign.graph.solve import SolveBlock, packed
from mergekit_symalign.symmetry.by_activations.attention import align_attention_by
from mergekit_symalign.symmetry.by_activations.covariance import Covariance
from mergekit_symalign.symmetry.by_activations.experts import Routing, align_experts_by
from mergekit_symalign.symmetry.by_activations.neurons import align_mlp_by
from mergekit_symalign.symmetry.fitting import Values
from mergekit_symalign.symmetry.heads.solve import HEAD_AXES
from mergekit_symalign.symmetry.options import HeadShape, Sides
from mergekit_symalign.symmetry.rows import compute_dtype
from mergekit_symalign.symmetry.solve import solve_block
from mergekit_symalign.symmetry.solved import Solved

HEADS = frozenset(HEAD_AXES)
Loads = Tuple[Tuple[str, Task], ...]  # name inside the layer (or the model) and the task that gives each tensor


@lru_cache(maxsize=8)
def runner_of(model: ModelReference, digest: str, trust_remote_code: bool) -> LayerRunner:
    """The model without weights, built once for all its layers, and anew for another config at the same place.

    Raises:
        ModelError: if its config is not the one of this digest any more.
    """
    config = model.config(trust_remote_code=trust_remote_code)
    if config_digest(config) != digest:
        raise ModelError(f"model {model}", "its config was replaced while it was in use", "Start again")
    return LayerRunner(config, resolve_stored(config, model))


def config_digest(config: Any) -> str:
    """SHA-256 of all that a transformers config says."""
    return hashlib.sha256(config.to_json_string(use_diff=False).encode()).hexdigest()


def seen_axes(kind: BlockKind, layout: ModelLayout) -> frozenset[str]:
    """The axes whose activations match a block."""
    if kind is BlockKind.attention:
        return HEADS
    return frozenset((EXPERTS if layout.mlp_shape(kind).experts > 1 else f"{kind.prefix}down",))


def reads_images(layout: ModelLayout) -> bool:
    """Whether a model is compared on images, not on prompts."""
    return all("vocabulary" not in spec.axes for spec in layout.outside.values())


class StreamingTask(Task[Dict[str, Any]]):
    """A step of a run on prompts, known by what it runs: hashing all steps before it would take forever.

    Attributes:
        key: stands for models, prompts and settings of the run.
        layer: the layer that this step runs; -1 in front of the layers.
        models: anchor first.
        digests: of their configs.
        loads: of each model, the tensors that the step needs.
        trust_remote_code: MergeKit's option.
    """

    key: str
    layer: int
    models: Tuple[ModelReference, ...]
    digests: Tuple[str, ...]
    loads: Tuple[Loads, ...]
    trust_remote_code: bool = False

    def __hash__(self) -> int:
        return hash((type(self).__name__, self.key, self.layer))

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and (self.key, self.layer) == (other.key, other.layer)  # type: ignore[attr-defined]

    def group_label(self) -> Optional[str]:
        return max(load.group_label() or "" for loads in self.loads for _, load in loads)

    def uses_accelerator(self) -> bool:
        return True

    def runner(self, i: int) -> LayerRunner:
        """One of the models, without weights."""
        return runner_of(self.models[i], self.digests[i], self.trust_remote_code)

    def weight_arguments(self) -> Dict[str, Task]:
        return {f"{i} {name}": load for i, loads in enumerate(self.loads) for name, load in loads}

    def weights_of(self, i: int, tensors: Dict[str, Optional[torch.Tensor]]) -> Dict[str, torch.Tensor]:
        """The tensors of one model, in the dtype in which it runs."""
        found = {name: tensors[f"{i} {name}"] for name, _ in self.loads[i]}
        return {name: x.to(compute_dtype(x.dtype)) for name, x in found.items() if x is not None}


class EmbedPrompts(StreamingTask):
    """What enters the first layer of each model, and the arguments of all its layers.

    Attributes:
        calibration: the prompts (`Calibration`), or the images (`ImageCalibration`, which pydantic has no schema for).
    """

    calibration: Any

    def arguments(self) -> Dict[str, Task]:
        return self.weight_arguments()

    def execute(self, **tensors: Optional[torch.Tensor]) -> Dict[str, Any]:
        hidden, calls, kept = [], [], []
        for i in range(len(self.models)):
            weights = self.weights_of(i, tensors)
            device = next(iter(weights.values())).device
            runner = self.runner(i)
            batches = [type(b)(b.ids.to(device), b.valid.to(device)) for b in self.calibration.batches()]
            recorded = [runner.record(batch, weights) for batch in batches]
            hidden.append([r.hidden for r in recorded])
            calls.append([(r.tensors, r.calls) for r in recorded])
            kept = [at if at is None else at.to(device) for at in self.calibration.kept()]
        return {"hidden": hidden, "arguments": {"calls": calls, "kept": kept}}


class LayerTask(StreamingTask):
    """A step that runs one layer of all models on the prompts.

    Attributes:
        hidden: what enters the layer.
        recorded: the arguments of the layers.
    """

    hidden: Task
    recorded: Task

    def arguments(self) -> Dict[str, Task]:
        return {"hidden": self.hidden, "recorded": self.recorded, **self.weight_arguments()}

    def streams(
        self,
        hidden: Any,
        recorded: Any,
        tensors: Dict[str, Optional[torch.Tensor]],
        wanted: Tuple[Tuple[str, ...], ...] = (),
    ) -> List[Stream]:
        """The models between two layers; ``wanted`` are the axes that are compared, of each model but the anchor."""
        axes = ((), *wanted) if wanted else ((),) * len(self.models)
        return [
            Stream(
                self.runner(i),
                self.weights_of(i, tensors),
                hidden[i],
                [Recorded(x, *call) for x, call in zip(hidden[i], recorded["calls"][i], strict=True)],
                frozenset(seen),
            )
            for i, seen in enumerate(axes)
        ]


class RunLayer(LayerTask):
    """Compares what a layer computes with the anchor's.

    Attributes:
        wanted: the axes that are compared, of each model but the anchor.
    """

    wanted: Tuple[Tuple[str, ...], ...]

    def execute(self, hidden: Any, recorded: Any, **tensors: Optional[torch.Tensor]) -> Dict[str, Any]:
        streams = self.streams(hidden, recorded, tensors, self.wanted)
        out, sums = run_layer(self.layer, streams[0], streams[1:], recorded["kept"])
        return {
            "hidden": out,
            "statistics": [_by_block(found) for found in sums],
            "streams": [found.stream and (found.stream.cross, found.stream.rows) for found in sums],
        }


def _by_block(found: Statistics) -> Dict[str, Any]:
    """As dicts and tuples of tensors, what each kind of block needs."""
    seen = {axis: (c.cross, c.anchor, c.model) for axis, c in found.covariances.items()}
    blocks: Dict[str, Any] = {BlockKind.attention.value: {axis: x for axis, x in seen.items() if axis in HEADS}}
    for kind in (kind for kind in BlockKind if kind.is_mlp):
        axis = f"{kind.prefix}down"
        blocks[kind.value] = {"down": seen[axis]} if axis in seen else {}
    if found.routing is not None:
        blocks[BlockKind.mlp.value][EXPERTS] = tuple(r.tensors() for r in found.routing)
    return blocks


class Part(Task[Any]):
    """One part of a streaming step's result, so that the other parts need not be kept.

    Attributes:
        of: the step.
        keys: where the part is.
    """

    of: Task
    keys: Tuple[Any, ...]

    def arguments(self) -> Dict[str, Task]:
        return {"of": self.of}

    def group_label(self) -> Optional[str]:
        return self.of.group_label()

    def priority(self) -> int:
        return 1000

    def execute(self, of: Any) -> Any:
        for key in self.keys:
            of = of[key]
        return of


class SolveActivations(SolveBlock):
    """Aligns one block of a model to the anchor's by what both do on the prompts.

    Attributes:
        statistics: covariances of the block's axes, or what its experts are given.
        digest: of the anchor's config.
        trust_remote_code: MergeKit's option.
    """

    statistics: Task
    digest: str
    trust_remote_code: bool = False

    def arguments(self) -> Dict[str, Task]:
        return {"statistics": self.statistics, **super().arguments()}

    def execute(self, statistics: Any, **tensors: torch.Tensor) -> Dict[str, Any]:  # type: ignore[override]
        align = partial(self._align, statistics)
        return packed(solve_block(self._sides(tensors), self.shape, self.use, align, values=Values.finite))

    def _align(self, statistics: Any, sides: Sides, stored: Sides | None = None) -> Solved:
        if EXPERTS in statistics:
            anchor, model = (Routing(*tensors) for tensors in statistics[EXPERTS])
            runner = runner_of(self.anchor[0].model, self.digest, self.trust_remote_code)
            of_experts = runner.gate_activation(), stored, runner.gated()
            return align_experts_by((anchor, model), sides, self.mlp, self.use, *of_experts)
        seen = {axis: Covariance(*numbers) for axis, numbers in statistics.items()}
        if self.kind.is_mlp:
            return align_mlp_by(seen["down"], sides, self.mlp, self.use)
        assert isinstance(self.heads, HeadShape)  # others are refused (`Block.require_possible_latents`)
        return align_attention_by(seen, sides, self.heads, self.use)
