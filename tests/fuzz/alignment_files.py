"""Alignment files changed at random: bytes, text, references, shapes, dtypes and values, with digests that fit or not.

A file that is not refused has to be a symmetry: it is applied to its model, which must then compute the same.
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
from models import logits, make_model, relative_deviation, with_weights
from more_models import MORE, more_model
from safetensors import safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor
from transformers import PreTrainedModel

from fuzz.alignment_changes import changed
from fuzz.counting import counted
from mergekit_symalign.alignment_file import AlignmentFile, Origin, block_name, save_alignment
from mergekit_symalign.alignments.fit import require_fits
from mergekit_symalign.alignments.numbers import ENTRY
from mergekit_symalign.card import section
from mergekit_symalign.commands.verify import TOLERANCE
from mergekit_symalign.errors import AlignmentFileError
from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.graph.merge_report import by_model
from mergekit_symalign.planting import Planted, random_elements, transform
from mergekit_symalign.symmetry.solve import without_identities

# Grouped heads, each kind of QK-norm, plain MLPs, experts, layers without positions, both layouts of planes, layers
# that differ, heads that admit less
FAMILIES = ("llama", "qwen3", "olmo2", "cohere-qk-norm", "gpt2", "mixtral", "cohere2", "phi4-mini", "glm4")
FAMILIES += ("glm4-moe", "qwen3-next", "llama4")
WHAT = (Planted(neuron_scaling=True), Planted(heads=False, neuron_scaling=True), Planted(rotation=False, scaling=False))

Content = dict[str, Any]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A valid file, and the model that it moves."""

    model: PreTrainedModel
    layout: ModelLayout
    outputs: Tensor
    raw: bytes
    content: Content
    tensors: Tensors


@cache
def case(family: str, which: int) -> Case:
    model = more_model(family) if family in MORE else make_model(family, 0)
    layout = resolve(model.config, model=family)
    elements = {at: without_identities(g) for at, g in random_elements(layout, which, WHAT[which]).items()}
    named = {block_name(layer, kind.value): element for (layer, kind), element in elements.items()}
    facts = {
        block: {"distance_before": 2.0, "distance_after": 1.0, "neurons": 80, "neurons_moved": 9} for block in named
    }
    origin = Origin(
        "anchor", "model", "a" * 64, "b" * 64, layout.family.name, {"layers": layout.layers}, {"heads": True}
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save_alignment(path, origin, named, facts)
        with safe_open(path, framework="pt") as file:
            text = file.metadata()[ENTRY]
        return Case(
            model, layout, logits(model), path.read_bytes(), json.loads(text), safetensors_torch.load_file(path)
        )


def sweep(count: int, seed: int) -> dict[str, int]:
    """Change a file in some way, so many times. Returns what `counted` does."""

    def draw(rng: random.Random, path: Path) -> tuple[Case, str]:
        of = case(rng.choice(FAMILIES), rng.randrange(len(WHAT)))
        return of, changed(rng, of.raw, of.content, of.tensors, path)

    return counted(count, str(seed), draw, judged)


def judged(of: Case, path: Path) -> str:
    """``refused``, ``exact``, or what else happened."""
    try:
        file = AlignmentFile.open(path)
        file.require_family(of.layout.family.name, {"layers": of.layout.layers}, "model")
        require_fits(file, of.layout)
        elements = {(layer, kind): file.element(block_name(layer, kind.value)) for layer, kind in of.layout.blocks()}
        section(_report(file, of))
        moved = with_weights(of.model, transform(of.model.state_dict(), of.layout, elements))
    except AlignmentFileError as error:
        return "refused" if str(path) in str(error) and len(str(error)) < 1000 else f"unclear: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    deviation = relative_deviation(of.outputs, logits(moved))
    return "exact" if deviation <= TOLERANCE else f"another function, off by {deviation:.1e} standard deviations"


def _report(file: AlignmentFile, of: Case) -> dict[str, Any]:
    """What a merge from the file reports of it, as JSON reads it again."""
    found = [
        ("model", layer, kind, file.facts.get(block_name(layer, kind.value), {})) for layer, kind in of.layout.blocks()
    ]
    head = {"exact": True, "anchor": [file.origin.anchor], "versions": {"mergekit_symalign": "0"}}
    report: dict[str, Any] = json.loads(json.dumps(head | {"models": by_model(found)}, allow_nan=False))
    return report
