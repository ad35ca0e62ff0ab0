"""Planning a run on prompts inside a merge: which layers of which models run, and what its tasks depend on."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions

from mergekit_symalign.activations.calibration import Calibration, calibrate
from mergekit_symalign.activations.defaults import DEFAULT_PROMPTS
from mergekit_symalign.activations.images import ImageCalibration, calibrate_images
from mergekit_symalign.errors import CalibrationError, ConfigError, ParameterError
from mergekit_symalign.families.flow import is_front
from mergekit_symalign.families.resolve import ModelLayout
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.graph.activations import EmbedPrompts, Part, RunLayer, config_digest, reads_images, seen_axes
from mergekit_symalign.graph.checkpoint_checks import Checkpoint
from mergekit_symalign.graph.load import GatherAligned
from mergekit_symalign.graph.planned import Planned, gather_of
from mergekit_symalign.graph.readers import image_processor_of, require_embedded, tokenizer_of

LOG = logging.getLogger(__name__)

SHARED = ("calibration", "calibration_tokens", "calibration_sequence_length")  # one value for the whole merge
_OUTSIDE = -1
Aligned = Mapping[str, Mapping[ModelReference, Task]]


@dataclass(frozen=True)
class Wanted:
    """A block whose statistics a solver needs."""

    layer: int
    kind: BlockKind
    model: ModelReference


@dataclass(frozen=True)
class StreamingPlan:
    """The tasks of one run on prompts.

    Attributes:
        statistics: for each block that was wanted.
        anchor_digest: of the anchor's config.
    """

    statistics: Mapping[Wanted, Task]
    anchor_digest: str


def in_order(planned: list[Planned]) -> list[Planned]:
    """The same tasks with loads that are scheduled in the order of the plan.

    MergeKit schedules by tensor name, and loads have nothing to wait for: layer 10 would be read before layer 2, and
    kept until the prompts have come through layers 2 to 9.
    """
    return [(weight, labelled(task, f"{i:08d} {weight.name}")) for i, (weight, task) in enumerate(planned)]


def plan_streaming(
    planned: list[Planned],
    wanted: list[Wanted],
    checkpoints: Mapping[ModelReference, Checkpoint],
    options: MergeOptions,
) -> StreamingPlan:
    """One step for each layer up to the last one that is wanted, for the anchor and all models together.

    Raises:
        ConfigError: if the merge does not have all layers below a wanted one, of every model, at the same depth.
        CalibrationError: if the prompts cannot be used.
    """
    anchors = {task.base_model for _, task in planned}
    if len(anchors) != 1:
        raise ConfigError(
            "parameter objective",
            "the slices have different anchors, but activations are compared with one anchor only",
            "Use objective: weights, or one base_model",
        )
    anchor = next(iter(anchors))
    assert anchor is not None  # graph/config_checks.py
    models = (anchor, *dict.fromkeys(w.model for w in wanted))
    last = max(w.layer for w in wanted)
    run = start_run(planned, models, last, checkpoints, options)
    hidden = run.hidden
    statistics: dict[Wanted, Task] = {}
    for layer in range(last + 1):
        here = [w for w in wanted if w.layer == layer]
        seen = tuple(seen_by((w.kind for w in here if w.model == m), checkpoints[m].layout) for m in models[1:])
        step = RunLayer(hidden=hidden, recorded=run.recorded, wanted=seen, **run.step(layer))
        hidden = Part(of=step, keys=("hidden",))
        for w in here:
            statistics[w] = Part(of=step, keys=("statistics", models.index(w.model) - 1, w.kind.value))
    return StreamingPlan(statistics, run.digests[0])


@dataclass(frozen=True)
class Started:
    """A run on prompts up to the first layer, and what the steps through the layers need.

    Attributes:
        digests: of the models' configs.
        hidden: the task that gives what enters the first layer.
        recorded: the task that gives the arguments of all layers, and where the prompts are no padding.
    """

    digests: tuple[str, ...]
    hidden: Task
    recorded: Task
    _models: tuple[ModelReference, ...]
    _shared: Mapping[str, Any]
    _loads: _Loads

    def step(self, layer: int) -> dict[str, Any]:
        """The fields that every step has, of one layer."""
        return {"layer": layer, "loads": self._loads.at(self._models, layer), **self._shared}


def start_run(
    planned: list[Planned],
    models: tuple[ModelReference, ...],
    last: int,
    checkpoints: Mapping[ModelReference, Checkpoint],
    options: MergeOptions,
    aligned: Aligned = MappingProxyType({}),
    *,
    parameter: str = "objective",
) -> Started:
    """The first step of a run on prompts.

    Args:
        planned: all tensors of the merge.
        models: anchor first.
        last: the last layer that is to run.
        checkpoints, options: of the merge.
        aligned: of each tensor by name, the tasks that give it for models that run aligned.
        parameter: which asks for the run, for messages.

    Raises:
        ConfigError: if the merge does not have all layers up to ``last``, of every model, at the same depth.
        CalibrationError: if the prompts cannot be used.
    """
    loads = _Loads(planned, checkpoints, aligned)
    loads.require(models, last, parameter)
    calibration = _calibration(planned, models, options, checkpoints, parameter)
    trust = options.trust_remote_code
    digests = tuple(config_digest(model.config(trust_remote_code=trust)) for model in models)
    key = _key(planned, models, digests, calibration)
    shared: dict[str, Any] = {"key": key, "models": models, "digests": digests, "trust_remote_code": trust}
    embed = EmbedPrompts(layer=_OUTSIDE, loads=loads.at(models, _OUTSIDE), calibration=calibration, **shared)
    hidden, recorded = Part(of=embed, keys=("hidden",)), Part(of=embed, keys=("arguments",))
    return Started(digests, hidden, recorded, models, shared, loads)


def seen_by(kinds: Iterable[BlockKind], layout: ModelLayout) -> tuple[str, ...]:
    """The axes whose activations match some blocks."""
    return tuple(sorted({axis for kind in kinds for axis in seen_axes(kind, layout)}))


class _Loads:
    """The loads of a merge by model and layer, under the names inside the layer."""

    def __init__(
        self, planned: Iterable[Planned], checkpoints: Mapping[ModelReference, Checkpoint], aligned: Aligned
    ) -> None:
        self._found: dict[tuple[ModelReference, int], dict[str, Task]] = defaultdict(dict)
        self._depth: dict[tuple[ModelReference, int], set[int]] = defaultdict(set)
        in_front = True
        for weight, task in planned:
            gather = gather_of(task)
            at = checkpoints[next(iter(gather.weight_info.keys()))].layout.claim(weight.name)
            in_front = in_front and at is not None and at.layer is None
            loads: dict[ModelReference, Task] = {**GatherAligned(**dict(gather)).loads()}
            for model, load in {**loads, **aligned.get(weight.name, {})}.items():
                layout, name = checkpoints[model].layout, gather.weight_info[model].name
                claim = layout.claim(name)
                if claim is None or layout.is_around_text(name):
                    continue
                if claim.layer is None and not (in_front or is_front(claim.part, claim.spec)):
                    continue
                layer = _OUTSIDE if claim.layer is None else claim.layer
                part = checkpoints[model].own_name(claim.part) if claim.layer is None else claim.part
                self._found[model, layer].setdefault(part, load)
                if at is not None and at.layer is not None:
                    self._depth[model, layer].add(at.layer)

    def at(self, models: tuple[ModelReference, ...], layer: int) -> tuple[tuple[tuple[str, Task], ...], ...]:
        return tuple(tuple(self._found[model, layer].items()) for model in models)

    def require(self, models: tuple[ModelReference, ...], last: int, parameter: str) -> None:
        """Every layer up to ``last``, of every model, at its own depth of the output."""
        for model in models:
            for layer in range(last + 1):
                if layer not in self._depth[model, layer]:
                    raise ConfigError(
                        f"parameter {parameter}",
                        f"activations of layer {last} need all layers below it, and the merge does not use layer "
                        f"{layer} of {model} at that depth",
                        "Solve whole models first (mergekit-symalign solve) and use alignment: with the file, or use "
                        f"{parameter}: weights",
                    )


def labelled(task: ExecuteMergeMethodTask, label: str) -> ExecuteMergeMethodTask:
    """The same task with loads that are scheduled by a label."""
    inputs, gather = task.gather_tensors, GatherAligned(**dict(gather_of(task)) | {"label": label})
    inputs = gather if isinstance(inputs, GatherTensors) else inputs.model_copy(update={"gather_tensors": gather})
    return task.model_copy(update={"gather_tensors": inputs})


def _calibration(
    planned: list[Planned],
    models: tuple[ModelReference, ...],
    options: MergeOptions,
    checkpoints: Mapping[ModelReference, Checkpoint],
    parameter: str,
) -> Calibration | ImageCalibration:
    path, tokens, length = (_shared(name, planned) for name in SHARED)
    if reads_images(checkpoints[models[0]].layout):
        return _images(path, tokens, models, options, checkpoints, parameter)
    if path is None:
        raise CalibrationError(
            "parameter calibration", f"{parameter}: activations compares what models do on prompts, and none are given",
            "Add calibration: prompts.jsonl, or calibration: default for the small set that ships with the package",
        )  # fmt: skip
    tokenizers = {str(model): tokenizer_of(model, options) for model in models}
    anchor = tokenizers.pop(str(models[0]))
    file = DEFAULT_PROMPTS if path == "default" else Path(path)
    found = calibrate(file, anchor, tokenizers, tokens=tokens, length=length)
    for model in models:
        require_embedded(found, checkpoints[model])
    LOG.info("Calibration: %d tokens of %d prompts", found.tokens, len(found.sequences))
    hidden = checkpoints[models[0]].layout.geometry.hidden
    if found.tokens < hidden:
        LOG.warning(
            "calibration %s has only %d tokens, fewer than the models' hidden size of %d: directions that no token "
            "shows are left where the weights put them",
            path,
            found.tokens,
            hidden,
        )
    return found


def _images(
    path: str | None,
    tokens: int,
    models: tuple[ModelReference, ...],
    options: MergeOptions,
    checkpoints: Mapping[ModelReference, Checkpoint],
    parameter: str,
) -> ImageCalibration:
    if path in (None, "default"):
        raise CalibrationError(
            "parameter calibration",
            f"{parameter}: activations compares what models do, and {models[0]} reads images",
            f"Add calibration: FOLDER, a folder of images; or use {parameter}: weights",
        )
    processors = {str(model): image_processor_of(model, options) for model in models}
    found = calibrate_images(Path(path), checkpoints[models[0]].config, processors, tokens)
    LOG.info("Calibration: %d tokens of %d images", found.tokens, len(found.pixels))
    return found


def _shared(name: str, planned: list[Planned]) -> Any:
    values = {task.parameters[name]: weight for weight, task in planned}
    if len(values) > 1:
        (one, first), (other, second) = list(values.items())[:2]
        raise ParameterError(
            f"parameter {name}",
            f"it is {one} for {first.name} and {other} for {second.name}, but the prompts run through the whole model",
            "Give it once, without filters and gradients",
        )
    return next(iter(values))


def _key(
    planned: list[Planned],
    models: tuple[ModelReference, ...],
    digests: tuple[str, ...],
    calibration: Calibration | ImageCalibration,
) -> str:
    dtype = gather_of(planned[0][1]).dtype
    return hashlib.sha256(f"{[str(m) for m in models]} {digests} {dtype} {calibration.digest}".encode()).hexdigest()
