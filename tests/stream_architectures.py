"""The part of docs/architectures.md on the residual stream: what each class admits, planted, recovered and measured."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import merge_config, merged
from models import logits, perturbed, relative_deviation, save
from streams import CASES, case, in_other_coordinates, split, stored
from transformers import PreTrainedModel

from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.families.stream import residual_group, residual_kind, ties_embeddings
from mergekit_symalign.symmetry.residual.cross import standing_distance
from mergekit_symalign.symmetry.residual.kinds import Residual, ResidualKind
from mergekit_symalign.symmetry.residual.move import comparable

START = "\n## The residual stream\n"
HEAD = f"""{START}
What the parameter [`residual`](methods.md#parameters) means for each class. It follows from the kind and the place of
the class's norms. *Signed* permutations also flip signs. A *mean-keeping* rotation leaves the mean of the stream alone,
which the norms subtract. In every row one such element was planted, together with random elements of all blocks, and
with other norms under a rotation.

- *Function*: how far the logits moved then, in standard deviations. Lower is better.
- *Recovered*: the distance that a merge with this `residual` left, relative to the model that the twin was made from.

| test model | transformers class | `permutation` | function | recovered | `rotation` | function | recovered |
|---|---|---|---:|---:|---|---:|---:|
"""
SHOWN = {
    ResidualKind.permutation: "permutation",
    ResidualKind.signed_permutation: "signed permutation",
    ResidualKind.rotation: "any rotation",
    ResidualKind.mean_keeping_rotation: "mean-keeping rotation",
}


def section(folder: Path) -> str:
    """The whole section, measured in a folder for scratch."""
    return HEAD + "".join(row(name, folder / name) + "\n" for name in CASES)


def row(name: str, folder: Path) -> str:
    """One row of its table."""
    model = case(name)
    cells = [name, f"`{type(model).__name__}`"]
    for wanted in (Residual.permutation, Residual.rotation):
        cells += _cells(name, wanted, folder / wanted.value)
    return f"| {' | '.join(cells)} |"


def _cells(name: str, wanted: Residual, folder: Path) -> list[str]:
    """What the parameter means, and both measurements; the reason where it is refused."""
    config, told = case(name).config, ""
    layout = resolve(config, model=name)
    group = residual_group(layout, ties_embeddings(config, layout))
    if group.of(wanted) is None:
        if wanted is Residual.permutation or residual_group(layout, False).rotation is None or _is_always_tied(layout):
            return [f"refused: {group.reason}", "", ""]
        told = ", embeddings untied"
    anchor = case(name, **({"tie_word_embeddings": False} if told else {}))
    layout = resolve(anchor.config, model=name)
    kind = residual_kind(layout, ties_embeddings(anchor.config, layout), wanted)
    function, recovered = _measured(anchor, layout, kind, wanted, folder)
    return [SHOWN[kind] + told, f"{function:.0e}", f"{recovered:.3f}"]


def _is_always_tied(layout: ModelLayout) -> bool:
    return layout.family.variants.get("tie_word_embeddings") == (True,)


def _measured(
    anchor: PreTrainedModel, layout: ModelLayout, kind: ResidualKind, wanted: Residual, folder: Path
) -> tuple[float, float]:
    """Deviation of the planted twin, and the distance that a merge leaves relative to the sibling's."""
    sibling, twin = perturbed(anchor, 0.1, 7), perturbed(anchor, 0.0, 0)
    norms = stored(perturbed(anchor, 1.0, 5))
    twin.load_state_dict(in_other_coordinates(layout, stored(sibling), kind, norms), strict=False)
    twin.tie_weights()
    paths = [save(model, folder / str(i)) for i, model in enumerate((anchor, twin))]
    merged(merge_config("rotation_match", paths[0], [paths[1]], parameters={"residual": wanted.value}), folder / "out")
    report = json.loads((folder / "out" / "symalign_report.json").read_text("utf-8"))
    (entry,) = report["models"].values()
    deviation = relative_deviation(logits(sibling), logits(twin))
    return deviation, (entry["residual"]["distance_after"] / _distance(layout, kind, anchor, sibling)) ** 0.5


def _distance(layout: ModelLayout, kind: ResidualKind, anchor: PreTrainedModel, model: PreTrainedModel) -> float:
    """Squared, of comparable tensors."""
    sides = [split(layout, stored(one)) for one in (anchor, model)]
    scopes = sides[0][0]
    both = zip(scopes, sides[0][1], sides[1][1], strict=True)
    return sum(standing_distance(comparable(s, a, kind), comparable(s, b, kind)) for s, a, b in both)
