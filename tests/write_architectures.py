"""Write docs/architectures.md from measurements on the small models of the tests: ``make architectures``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from conftest import merge_config, merged, squared_distance
from models import FAMILIES, logits, make_model, perturbed, relative_deviation, save, with_weights

from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.families.schema import MlpKind, Positions
from mergekit_symalign.planting import random_elements, transform
from mergekit_symalign.symmetry.options import GainScope

OUT = Path(__file__).parent.parent / "docs" / "architectures.md"
HEAD = """# Architectures

Written by `make architectures` from measurements on the small random models of the tests (sharpened weights, biases and
norms away from 0 and 1). *Function*: largest logit deviation of a model after random elements of every block, in
standard deviations of the logits, everything in float64. *Recovered*: distance to the anchor of a planted twin after
`rotation_match` through MergeKit (float32), relative to that of the sibling it was planted in; below 1 because
alignment removes a little of the noise as well.

Value/output rotation and scale, head permutations and neuron permutations are used in every family.

| test model | family | transformers class | query and key | MLP | function | recovered |
|---|---|---|---|---|---:|---:|
"""


def query_key(layout: ModelLayout) -> str:
    """What is exact for queries and keys."""
    attention, shape = layout.family.attention, layout.head_shape(0)
    if attention.norm is not GainScope.none:
        gains = "one set for all heads" if attention.norm is GainScope.head else "for each KV head"
        return f"QK-norm: sign per plane, factor between gains ({gains})"
    if shape.rotary == 0:
        return "rotation and scale (no RoPE)"
    layout_name = "interleaved" if attention.positions is Positions.rope_interleaved else "half-split"
    text = f"angle and scale per plane ({layout_name})"
    if shape.rotary < shape.head_dim:
        text += f" on {shape.rotary} of {shape.head_dim} coordinates, rotation on the rest"
    return text + ("; full rotation in layers without RoPE" if layout.without_rope else "")


def measure(name: str, folder: Path) -> str:
    """One row of the table."""
    class_name, _ = FAMILIES[name]
    anchor = make_model(name, 0)
    sibling = perturbed(anchor, 0.1, 1)
    layout = resolve(anchor.config, model=name)
    twin = with_weights(sibling, transform(sibling.state_dict(), layout, random_elements(layout, 3)))
    deviation = relative_deviation(logits(sibling), logits(twin))
    paths = [save(model, folder / name / str(i)) for i, model in enumerate((anchor, twin))]
    out = merged(merge_config("rotation_match", paths[0], [paths[1]]), folder / name / "out")
    reference = {k: x.float() for k, x in anchor.state_dict().items() if k in out}
    before = squared_distance(reference, sibling.state_dict())
    ratio = (squared_distance(reference, out) / before) ** 0.5
    mlp = "gated: permutation, signed scale" if layout.family.mlp is MlpKind.gated else "plain: permutation"
    row = (name, layout.family.title, f"`{class_name}`", query_key(layout), mlp, f"{deviation:.0e}", f"{ratio:.3f}")
    return f"| {' | '.join(row)} |"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rows = [measure(name, Path(folder)) for name in FAMILIES]
    OUT.write_text(HEAD + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
