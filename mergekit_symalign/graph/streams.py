"""Planning the alignment of residual streams: what is asked for, whether it can be done, and the tasks that do it."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.options import MergeOptions

from mergekit_symalign.alignments.fit import STREAM_BLOCK
from mergekit_symalign.errors import ConfigError, ParameterError
from mergekit_symalign.families.resolve import Claim, ModelLayout
from mergekit_symalign.families.stream import layer_scope, outside_scope, residual_kind
from mergekit_symalign.families.towers import index_of
from mergekit_symalign.graph.alignments import Alignments, ReadBlock
from mergekit_symalign.graph.block import Block
from mergekit_symalign.graph.load import GatherAligned, LoadFinite
from mergekit_symalign.graph.merge_report import Reports
from mergekit_symalign.graph.models import Models
from mergekit_symalign.graph.planned import Planned, anchor_of, gather_of
from mergekit_symalign.graph.stream_activations import BlockKey, Comparison, Place, plan_seen_streams, run_first
from mergekit_symalign.graph.stream_checks import require_equal_layers, require_one_anchor, require_same_shapes
from mergekit_symalign.graph.stream_tasks import ApplyStream, Loads, OwnShare, SolveMoved, SolveStream
from mergekit_symalign.graph.stream_tokens import Compared, Vocabularies
from mergekit_symalign.graph.streaming import SHARED
from mergekit_symalign.graph.untie import UNTIE, is_tied
from mergekit_symalign.symmetry.options import AttentionShape, Symmetries
from mergekit_symalign.symmetry.residual.alternate import ROUNDS
from mergekit_symalign.symmetry.residual.kinds import Residual
from mergekit_symalign.symmetry.residual.scope import Scope, around

LOG = logging.getLogger(__name__)

RESIDUAL_NAMES = ("residual", "residual_rounds", UNTIE, "objective", *SHARED)
_KINDS = frozenset(kind.value for kind in Residual)


@dataclass(frozen=True)
class MovedStream(Comparison):
    """A model whose residual stream is moved.

    Attributes:
        solution: the task that gives the element.
        blocks: the tasks that give the blocks' elements, where these are found together with the stream's.
        seen: what the two are compared by outside their layers; None where they are not compared.
    """

    solution: Task
    blocks: Mapping[BlockKey, Task] = field(default_factory=dict)
    seen: Compared | None = None

    def solver(self, block: Block, heads: AttentionShape) -> Task:
        """The task that aligns a block once the stream is moved."""
        if (known := self.blocks.get((index_of(block.layer), block.kind.value))) is not None:
            return known
        found = self.fields_of(block)
        key = f"{found['model'][0].model} {block.layer} {block.kind.value}"
        return SolveMoved(key=key, heads=heads, stream=self.solution, **found)

    def own_share(self) -> OwnShare | None:
        """The task that tells what the stream alone does to the distance."""
        if self.seen is None:
            return None
        key = str(next(iter(self.model[None].values())).model)
        sides = _in_order(self.scopes, self.anchor, self.model, self.seen)
        return OwnShare(key=key, kind=self.kind, stream=self.solution, **sides)

    def applied(self, place: Place, name: str, block: tuple[str, Task] | None) -> ApplyStream:
        """The task that moves one tensor."""
        scope = around(self.scopes[place], (name,), folds=self.kind.rotates)
        load = self.model[place][name]
        norms = tuple(x for norm in scope.norms for x in (norm.gain, norm.bias) if x is not None)
        return ApplyStream(
            key=f"{load.model} {place} {name}",
            load=load,
            name=name,
            scope=scope,
            tensors=_some(self.model[place], scope.axes),
            norms=_some(self.anchor[place], norms),
            kind=self.kind,
            stream=self.solution,
            block=block,
        )


def plan_streams(
    planned: Sequence[Planned],
    blocks: Sequence[Block],
    models: Models,
    alignments: Alignments,
    reports: Reports,
    options: MergeOptions,
) -> dict[ModelReference, MovedStream]:
    """The models whose residual stream is moved; none if that was not asked for.

    Raises:
        ParameterError: if tensors disagree on the parameter, or what is asked for is not exact.
        ConfigError: if it cannot be combined with something else that is asked for.
    """
    asked = _agreed(planned, "residual")
    wanted = Residual(asked) if asked in _KINDS else Residual.none  # ot_fusion has its own parameter of this name
    moved = [m for m in _models(planned) if _is_moved(m, planned)]
    files = {m: path for m in moved if (path := _file(m, planned)) is not None}
    with_stream = {m: path for m, path in files.items() if alignments.has_stream(path, _anchor(planned), m)}
    if wanted is Residual.none and not with_stream:
        return {}
    require_one_anchor(planned)
    for weight, task in planned:
        require_equal_layers(weight, task)
    vocabularies = Vocabularies.of(planned, options)
    require_same_shapes(planned, moved, models)
    found = {}
    for model in moved:
        if model in files and model not in with_stream:
            if wanted is not Residual.none:
                raise ConfigError(
                    f"parameter alignment of model {model}",
                    f"the file moves no residual stream, but residual is {wanted.value}",
                    "Solve it again with this residual, or leave residual out",
                )
            continue
        file = with_stream.get(model)
        found[model] = _moved(model, planned, blocks, models, alignments, vocabularies, wanted, file)
    if _agreed(planned, "objective") == "activations":
        solved = {m: of for m, of in found.items() if m not in files}
        found |= _seen(solved, planned, blocks, models, vocabularies)
    for model, stream in found.items():
        reports.record_stream(model, stream.kind, stream.solution, stream.own_share())
        folder = _agreed(planned, "save_alignment")
        if folder is not None:
            settings = {name: _agreed(planned, name) for name in RESIDUAL_NAMES}
            alignments.record_stream(folder, _anchor(planned), model, stream.solution, settings)
    return found


def outside_blocks(
    planned: Iterable[Planned], streams: Mapping[ModelReference, MovedStream], models: Models
) -> dict[str, dict[ModelReference, ApplyStream]]:
    """The tasks of tensors that belong to no block: embeddings, head, norms and biases."""
    result: dict[str, dict[ModelReference, ApplyStream]] = {}
    for weight, _ in planned:
        for model, stream in streams.items():
            claim = models.checkpoints[model].layout.claim(weight.name)
            if claim is None or claim.spec.block is not None or claim.part not in stream.scopes[claim.layer].axes:
                continue
            result.setdefault(weight.name, {})[model] = stream.applied(claim.layer, claim.part, None)
    return result


def _moved(
    model: ModelReference,
    planned: Sequence[Planned],
    blocks: Sequence[Block],
    models: Models,
    alignments: Alignments,
    vocabularies: Vocabularies,
    wanted: Residual,
    file: str | None,
) -> MovedStream:
    anchor = _anchor(planned)
    layout = models.checkpoints[anchor].layout
    loads = {m: _loads(m, (anchor, model), planned, models) for m in (anchor, model)}
    scopes = _scopes(layout, loads[anchor], blocks, model)
    tied = is_tied((models.checkpoints[m] for m in (anchor, model)), planned)
    if file is not None:
        sha256, wanted = alignments.read_stream(file, anchor, model, tied)
        solution = ReadBlock(path=alignments.path(file), sha256=sha256, block=STREAM_BLOCK)
        return MovedStream(residual_kind(layout, tied, wanted), scopes, loads[anchor], loads[model], solution)
    kind = residual_kind(layout, tied, wanted)
    seen = vocabularies.compared(scopes[None], *((models.checkpoints[m], loads[m][None]) for m in (anchor, model)))
    solver = SolveStream(
        key=f"{anchor} {model} {kind.value}",
        kind=kind,
        rounds=_rounds(planned),
        tokens=tuple(seen.tokens.items()),
        **_in_order(scopes, loads[anchor], loads[model], seen),
    )
    return MovedStream(kind, scopes, loads[anchor], loads[model], solver, seen=seen)


def _in_order(
    scopes: Mapping[Place, Scope],
    anchor: Mapping[Place, Mapping[str, LoadFinite]],
    model: Mapping[Place, Mapping[str, LoadFinite]],
    seen: Compared,
) -> dict[str, Any]:
    """Scopes and loads of both models as a solver takes them: what lies outside the layers, then every layer."""
    places = sorted(scopes, key=lambda place: -1 if place is None else place)
    sides = {"anchor": {**anchor, None: seen.anchor}, "model": {**model, None: seen.model}}
    loads = {side: tuple(tuple(of[place].items()) for place in places) for side, of in sides.items()}
    return {"scopes": tuple(scopes[place] for place in places), **loads}


def _seen(
    moved: Mapping[ModelReference, MovedStream],
    planned: Sequence[Planned],
    blocks: Sequence[Block],
    models: Models,
    vocabularies: Vocabularies,
) -> dict[ModelReference, MovedStream]:
    """The same models, moved by what they do on prompts."""
    if not moved:
        return {}
    if _rounds(planned) != ROUNDS:
        LOG.warning("residual_rounds has no effect with objective: activations, which runs the models once")
    anchor, first = _anchor(planned), run_first(planned, models.checkpoints)
    compared = {}
    for m, of in moved.items():
        sides = {one: _loads(one, (anchor, m), first, models) for one in (anchor, m)}
        seen = vocabularies.compared(of.scopes[None], *((models.checkpoints[k], x[None]) for k, x in sides.items()))
        loads = ({**sides[anchor], None: seen.anchor}, {**sides[m], None: seen.model})
        compared[m] = Comparison(of.kind, of.scopes, *loads)
    found = plan_seen_streams(first, blocks, compared, models.checkpoints, vocabularies.options)
    return {m: replace(of, solution=found[m].solution, blocks=found[m].blocks) for m, of in moved.items()}


def _scopes(
    layout: ModelLayout,
    loads: Mapping[Place, Mapping[str, LoadFinite]],
    blocks: Sequence[Block],
    model: ModelReference,
) -> dict[Place, Scope]:
    names = {layout.name(place, part) if place is not None else part for place, of in loads.items() for part in of}
    use: dict[Place, dict[str, Symmetries]] = defaultdict(dict)
    source: dict[Place, int] = {}  # the layer of the models that a layer of the output comes from
    for block in blocks:
        source[index_of(block.layer)] = index_of(block.layer_of(model))
        if model in block.moved():
            use[index_of(block.layer)][block.kind.value] = block.symmetries
    return {
        place: outside_scope(layout, names)
        if place is None
        else layer_scope(layout, place, names, use[place], layout.head_shape(source.get(place, place)))
        for place in loads
    }


def _loads(
    model: ModelReference, both: Iterable[ModelReference], planned: Sequence[Planned], models: Models
) -> dict[Place, dict[str, LoadFinite]]:
    """The loads of a model's tensors that both models have."""
    found: dict[Place, dict[str, LoadFinite]] = {None: {}}
    for weight, task in planned:
        claim = _claim(weight.name, model, models)
        if claim is not None and claim.spec.any_shape:
            continue  # of a tower, which has a stream of its own
        infos = gather_of(task).weight_info
        if claim is not None and all(m in infos and models.checkpoints[m].stored(infos[m]) for m in both):
            loads = GatherAligned(**dict(gather_of(task))).loads()
            found.setdefault(claim.layer, {})[claim.part] = loads[model]
    return found


def _claim(name: str, model: ModelReference, models: Models) -> Claim | None:
    """What is said of a tensor, if anything is known of its axes."""
    claim = models.checkpoints[model].layout.claim(name)
    return None if claim is None or claim.spec.any_shape else claim


def _agreed(planned: Sequence[Planned], name: str) -> Any:
    """The value of a parameter that belongs to the whole merge.

    Raises:
        ParameterError: if tensors disagree.
    """
    first, task = planned[0]
    value = task.parameters[name]
    for weight, other in planned[1:]:
        if other.parameters[name] != value and (name != "save_alignment"):
            raise ParameterError(
                f"parameter {name}",
                f"it is {value} for {first.name} and {other.parameters[name]} for {weight.name}, but the residual "
                "stream is one for the whole merge",
                "Give it one value, without filters",
            )
    return value


def _rounds(planned: Sequence[Planned]) -> int:
    rounds: int = _agreed(planned, "residual_rounds")
    if rounds < 1:
        raise ParameterError(
            "parameter residual_rounds", f"it is {rounds}, but it takes at least one round", "Raise it"
        )
    return rounds


def _anchor(planned: Sequence[Planned]) -> ModelReference:
    return anchor_of(planned[0][1])


def _models(planned: Sequence[Planned]) -> list[ModelReference]:
    order = dict.fromkeys(m for _, task in planned for m in task.model_order)
    return [m for m in order if m != _anchor(planned)]


def _is_moved(model: ModelReference, planned: Sequence[Planned]) -> bool:
    """Whether any part of the model is to be aligned."""
    return any(task.input_parameters[model]["align"] for _, task in planned if model in task.model_order)


def _file(model: ModelReference, planned: Sequence[Planned]) -> str | None:
    """The alignment file that a model's tensors name, if any."""
    paths = (task.input_parameters[model]["alignment"] for _, task in planned if model in task.model_order)
    return next((path for path in paths if path is not None), None)


def _some(loads: Mapping[str, LoadFinite], names: Iterable[str]) -> Loads:
    return tuple((name, loads[name]) for name in names)
