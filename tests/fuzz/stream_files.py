"""Alignment files that move the residual stream and multiply values by general matrices, changed at random.

A file that is not refused has to be a symmetry: it moves its model, which must then compute the same.
"""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mergekit.merge  # noqa: F401  # before our modules, as the autoload expects
import torch
from models import logits, perturbed, relative_deviation
from safetensors import safe_open
from safetensors import torch as safetensors_torch
from streams import State, joined, split, stored
from streams import case as model_of
from torch import Tensor
from transformers import PreTrainedModel

from fuzz.alignment_changes import changed
from fuzz.counting import counted
from mergekit_symalign.alignment_file import AlignmentFile, Origin, block_name, save_alignment
from mergekit_symalign.alignments import numbers
from mergekit_symalign.alignments.fit import STREAM_BLOCK, require_fits, require_fitting_stream
from mergekit_symalign.alignments.numbers import ENTRY
from mergekit_symalign.card import section
from mergekit_symalign.commands.verify import TOLERANCE
from mergekit_symalign.errors import AlignmentFileError
from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.families.stream import residual_kind, ties_embeddings
from mergekit_symalign.graph.merge_report import LOSS, by_model, with_streams
from mergekit_symalign.planting import random_elements, random_stream
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import Chain, HeadMatrix
from mergekit_symalign.symmetry.heads.solve import per_query_head
from mergekit_symalign.symmetry.options import HeadShape
from mergekit_symalign.symmetry.residual.kinds import Residual, ResidualKind
from mergekit_symalign.symmetry.residual.move import Elements, move_scope
from mergekit_symalign.symmetry.residual.scope import norms_of

# Every kind of element, tied and not, norms that subtract the mean and norms that do not
CASES = (
    ("llama", Residual.rotation),
    ("phi2", Residual.rotation),
    ("llama-tied", Residual.permutation),
    ("gpt2", Residual.permutation),
    ("gemma2", Residual.permutation),
)


@dataclass(frozen=True)
class Case:
    """A valid file, and the model that it moves."""

    model: PreTrainedModel
    layout: ModelLayout
    tied: bool
    outputs: Tensor
    norms: State
    raw: bytes
    content: dict[str, Any]
    tensors: dict[str, Tensor]


@cache
def case(family: str, wanted: Residual) -> Case:
    model = model_of(family, num_hidden_layers=2)
    layout = resolve(model.config, model=family)
    tied = ties_embeddings(model.config, layout)
    stream = random_stream(residual_kind(layout, tied, wanted), layout.geometry.hidden, 3)
    named = {STREAM_BLOCK: stream} | {
        block_name(layer, kind.value): _with_general_values(element, layout.head_shape(layer))
        for (layer, kind), element in random_elements(layout, 5).items()
    }
    facts = {STREAM_BLOCK: {"distance_before": 2.0, "distance_after": 1.0, "residual_rounds": 3, "stream": 48}}
    origin = Origin("a", "b", "a" * 64, "b" * 64, layout.family.name, {"layers": 2}, {"residual": wanted.value})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save_alignment(path, origin, named, facts)
        with safe_open(path, framework="pt") as file:
            content = json.loads(file.metadata()[ENTRY])
        tensors = safetensors_torch.load_file(path)
        norms = stored(perturbed(model, 1.0, 9))
        return Case(model, layout, tied, logits(model), norms, path.read_bytes(), content, tensors)


def _with_general_values(element: BlockElement, shape: HeadShape) -> BlockElement:
    if "value" not in element.actions:
        return element
    heads, d = shape.kv_heads, shape.head_dim
    noise = torch.randn(heads, d, d, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    g = HeadMatrix(2 * torch.eye(d, dtype=torch.float64) + 0.3 * noise)
    moved = {"value": g, "attended": per_query_head(g.dual(), shape)}
    return BlockElement({axis: Chain((x, moved[axis])) if axis in moved else x for axis, x in element.actions.items()})


def sweep(count: int, seed: int) -> dict[str, int]:
    """Change a file in some way, so many times. Returns what `counted` does."""

    def draw(rng: random.Random, path: Path) -> tuple[Case, str]:
        of = case(*rng.choice(CASES))
        nearly = rng.random() < 0.3
        return of, _nearly(rng, of, path) if nearly else changed(rng, of.raw, of.content, of.tensors, path)

    return counted(count, f"stream {seed}", draw, judged)


def _nearly(rng: random.Random, of: Case, path: Path) -> str:
    """The stream's own numbers, a little or a lot off, or the parameter that says what they are."""
    content, tensors = json.loads(json.dumps(of.content)), dict(of.tensors)
    name = rng.choice([x for x in sorted(tensors) if x.startswith(STREAM_BLOCK)])
    x = tensors[name].clone()
    generator = torch.Generator().manual_seed(rng.randrange(1000))
    if x.is_floating_point():
        by = 10.0 ** rng.randint(-12, 1)
        tensors[name] = x + by * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        how = f"{name} off by {by:.0e}"
    else:
        tensors[name] = x[torch.randperm(len(x), generator=generator)]
        how = f"{name} in another order"
    if rng.random() < 0.3:
        content["origin"]["settings"]["residual"] = rng.choice(("none", "permutation", "rotation", "x", None))
        how += f", residual {content['origin']['settings']['residual']}"
    told = {name: content[name] for name in ("origin", "blocks", "facts")}
    numbers.write(path, told, tensors)
    return how


def judged(of: Case, path: Path) -> str:
    """``refused``, ``exact``, or what else happened."""
    try:
        file = AlignmentFile.open(path)
        file.require_family(of.layout.family.name, {"layers": of.layout.layers}, "model")
        require_fits(file, of.layout)
        kind, stream = ResidualKind.none, BlockElement({})
        if STREAM_BLOCK in file.blocks:
            kind = residual_kind(of.layout, of.tied, require_fitting_stream(file, of.layout, of.tied))
            stream = file.element(STREAM_BLOCK)
        section(_report(file, of, kind))
        moved = _moved(of, file, kind, stream)
    except AlignmentFileError as error:
        return "refused" if str(path) in str(error) and len(str(error)) < 1000 else f"unclear: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    deviation = relative_deviation(of.outputs, logits(moved))
    return "exact" if deviation <= TOLERANCE else f"another function, off by {deviation:.1e} standard deviations"


def _moved(of: Case, file: AlignmentFile, kind: ResidualKind, stream: BlockElement) -> PreTrainedModel:
    scopes, parts = split(of.layout, stored(of.model))
    _, others = split(of.layout, of.norms)
    blocks: list[Elements] = [{}]
    for layer in range(of.layout.layers):
        blocks.append({kind.value: file.element(block_name(layer, kind.value)) for kind in of.layout.kinds(layer)})
    whole = zip(scopes, parts, others, blocks, strict=True)
    state = joined(of.layout, [move_scope(s, x, kind, stream, b, norms_of(s, o)) for s, x, o, b in whole])
    copy = type(of.model)(of.model.config).double().eval()
    copy.load_state_dict(state, strict=False)
    copy.tie_weights()
    return copy


def _report(file: AlignmentFile, of: Case, kind: ResidualKind) -> dict[str, Any]:
    """What a merge from the file reports of it, as JSON reads it again."""
    found = [
        ("model", layer, block, file.facts.get(block_name(layer, block.value), {}))
        for layer, block in of.layout.blocks()
    ]
    facts = {**file.facts.get(STREAM_BLOCK, {}), "kind": kind.value, "loss": LOSS}
    models = with_streams(by_model(found), {"model": facts})
    head = {"exact": True, "anchor": [file.origin.anchor], "versions": {"mergekit_symalign": "0"}}
    report: dict[str, Any] = json.loads(json.dumps(head | {"models": models}, allow_nan=False))
    return report
