"""Write docs/architectures.md from measurements on the small models of the tests: ``make architectures``.

With the argument ``stream`` only the section on the residual stream.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from conftest import merge_config, merged, squared_distance
from coverage_page import START as MORE
from coverage_page import section as more_classes
from models import FAMILIES, logits, make_model, perturbed, relative_deviation, save, with_weights
from stream_architectures import START
from stream_architectures import section as stream_section

from mergekit_symalign.families.classes import classes_of
from mergekit_symalign.families.known import families, wrappers
from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.families.schema import Positions
from mergekit_symalign.planting import random_elements, transform
from mergekit_symalign.symmetry.options import GainScope, NeuronScale

OUT = Path(__file__).parent.parent / "docs" / "architectures.md"
HEAD = """# Architectures

Which models can be aligned, what is exact for each, and the measurements that show it. All of them align values and
outputs (rotation and scale), heads and neurons (permutations). Queries and keys differ, as the table says.

Attention may be grouped-query, multi-query or multi-head, with any head dimension. Embeddings may be tied or untied.

Lower is better in both columns of numbers:

- *Function*: how far the largest [logit](glossary.md#logits) moved after random [elements](glossary.md#element) of
  every block, in standard deviations of the logits. Everything is in float64, so only rounding is left.
- *Recovered*: the distance to the anchor after `rotation_match` has aligned a planted [twin](glossary.md#twin),
  relative to the distance of the model that the twin was made from. 1 means that the planted difference was undone.
  Below 1, alignment removed a little of the noise as well.

`make architectures` writes this page from small random models of the tests (sharpened weights, biases and norms away
from 0 and 1). Merges ran through MergeKit in float32.

| test model | family | transformers class | query and key | MLP | function | recovered |
|---|---|---|---|---|---:|---:|
"""


CLASSES = """
## All transformers classes

{classes}

Anything else is refused; `mergekit-symalign families` prints this list. Inside a family, variants that nobody has
checked (another activation of a plain MLP, clamped queries, …) are refused too. The message names the config key and
its value, and says whether MergeKit's own merge would keep every tensor.
"""


def classes() -> str:
    """A line for each family: the classes it covers."""
    lines = {f.title: list(classes_of(f)) for f in families().values()}
    lines |= {wrapper.title: list(wrapper.architectures) for wrapper in wrappers().values()}
    return "\n".join(f"- {title}: {', '.join(f'`{a}`' for a in found)}" for title, found in lines.items() if found)


def query_key(layout: ModelLayout) -> str:
    """What is exact for queries and keys."""
    attention, shape = layout.family.attention, layout.head_shape(0)
    if shape.qk_norm:
        gains = "for each KV head" if shape.norm.per_head else "one set for all heads"
        sign = "head" if shape.norm is GainScope.centred else "plane"
        still = any(layout.head_shape(i).reorders for i in range(layout.layers))
        order = "; order and signs of coordinates that do not turn" if still else ""
        return f"QK-norm: sign per {sign}, factor between gains ({gains}){order}"
    if shape.rotary == 0:
        return "rotation and scale (no RoPE)" + ("; heads stay" if shape.locked else "")
    layout_name = "interleaved" if attention.positions is Positions.rope_interleaved else "half-split"
    text = f"angle and scale per plane ({layout_name})"
    if shape.rotary < shape.head_dim:
        text += f" on {shape.rotary} of {shape.head_dim} coordinates, rotation on the rest"
    return text + ("; full rotation in layers without RoPE" if layout.without_rope else "")


MLP = {
    NeuronScale.signed: "gated: permutation, signed scale",
    NeuronScale.positive: "plain, ReLU: permutation, positive scale",
    NeuronScale.none: "plain: permutation",
}


def mlp(layout: ModelLayout) -> str:
    """What is exact for neurons."""
    shape = layout.mlp_shape()
    clamped = shape.gated and shape.scale is NeuronScale.none
    return ("gated, clamped: permutation" if clamped else MLP[shape.scale]) + (
        "; experts with their router rows" if shape.experts > 1 else ""
    )


def measure(name: str, folder: Path) -> str:
    """One row of the table."""
    class_name, _ = FAMILIES[name]
    anchor = make_model(name, 0)
    sibling = perturbed(anchor, 0.1, 1)
    layout = resolve(anchor.config, model=name)
    twin = with_weights(sibling, transform(sibling.state_dict(), layout, random_elements(layout, 3)))
    deviation = relative_deviation(logits(sibling), logits(twin))
    paths = [save(model, folder / name / str(i)) for i, model in enumerate((anchor, twin))]
    merged(merge_config("rotation_match", paths[0], [paths[1]]), folder / name / "out")
    out = type(anchor).from_pretrained(folder / name / "out", dtype=torch.float32)
    reference = {k: x.float() for k, x in anchor.state_dict().items()}
    before = squared_distance(reference, sibling.state_dict())
    ratio = (squared_distance(reference, out.state_dict()) / before) ** 0.5
    row = (
        name,
        layout.family.title,
        f"`{class_name}`",
        query_key(layout),
        mlp(layout),
        f"{deviation:.0e}",
        f"{ratio:.3f}",
    )
    return f"| {' | '.join(row)} |"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        stream = Path(folder) / "stream"
        if sys.argv[1:] == ["stream"]:
            before, _, rest = OUT.read_text("utf-8").partition(START)
            after = MORE + rest.partition(MORE)[2]
        else:
            before = HEAD + "".join(measure(name, Path(folder)) + "\n" for name in FAMILIES)
            after = more_classes() + CLASSES.format(classes=classes())
        OUT.write_text(before + stream_section(stream) + after, "utf-8")


if __name__ == "__main__":
    main()
