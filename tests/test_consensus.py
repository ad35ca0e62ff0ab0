"""``anchor: consensus``: the mean that all models agree on, whatever the order they are listed in."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from conftest import State, merge_config, merged, squared_distance
from models import logits as logits_of
from models import make_model, perturbed, relative_deviation, rounding, save, with_weights

from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.planting import Planted, random_elements, transform
from mergekit_symalign.symmetry.consensus import Rows, find_consensus
from mergekit_symalign.symmetry.element import rows_by_axis
from mergekit_symalign.symmetry.options import Sides, Symmetries
from mergekit_symalign.symmetry.solve import align_block

NAMES = ("a", "b", "c")


def _scrambled(family: str, noise: float, planted: Planted) -> tuple[list, ModelLayout]:
    """Three siblings of one parent that is not among them, each in coordinates of its own."""
    parent = make_model(family, 0)
    layout = resolve(parent.config, model="m")
    siblings = [perturbed(parent, noise, seed) for seed in (1, 2, 3)]
    twins = [
        with_weights(m, transform(m.state_dict(), layout, random_elements(layout, 10 + i, planted)))
        for i, m in enumerate(siblings)
    ]
    return twins, layout


def _rows(state: State, layout: ModelLayout, kind: BlockKind) -> Rows:
    rows: dict[str, list] = {}
    for part, spec in layout.block(kind).items():
        for axis, x in rows_by_axis(state[layout.name(0, part)], layout.axes(spec)).items():
            if axis in kind.axes:
                rows.setdefault(axis, []).append(x)
    return rows


@pytest.mark.parametrize(("family", "noise"), [("llama", 0.1), ("llama", 0.6), ("qwen3", 0.6), ("mixtral", 0.6)])
@pytest.mark.parametrize("kind", [BlockKind.attention, BlockKind.mlp])
def test_never_worse_than_any_single_anchor(family: str, kind: BlockKind, noise: float) -> None:
    twins, layout = _scrambled(family, noise, Planted())
    models = [_rows(twin.state_dict(), layout, kind) for twin in twins]

    def best(sides: Sides) -> object:
        shape = layout.mlp_shape() if kind is BlockKind.mlp else layout.head_shape(0)
        return align_block(sides, shape, Symmetries()).element

    found = find_consensus(models, best)
    assert all(after <= before for before, after in itertools.pairwise(found.spread))
    assert found.elements[0].actions == {}
    for order in ((0, 1, 2), (0, 2, 1)):  # in the coordinates of the first: scales change what distances are worth
        alone = find_consensus([models[i] for i in order], best, rounds=0)
        assert found.spread[-1] <= alone.spread[0] * (1 + 1e-9)
        again = find_consensus([models[i] for i in order], best)
        assert again.spread[-1] == pytest.approx(found.spread[-1], rel=1e-6)
    if noise == 0.6 and kind is BlockKind.attention:
        assert found.spread[-1] < found.spread[0]  # the mean is another anchor than any of the models


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scrambled")
    twins, _ = _scrambled("llama", 0.4, Planted())
    return {name: save(twin, folder / name) for name, twin in zip(NAMES, twins, strict=True)}


def test_every_order_of_the_models_gives_the_same_merge(paths: dict[str, Path], tmp_path: Path) -> None:
    outputs = [
        merged(
            merge_config("rotation_match", paths["a"], [paths[n] for n in order], parameters={"anchor": "consensus"}),
            tmp_path / "".join(order),
        )
        for order in (NAMES, NAMES[1:] + NAMES[:1], NAMES[::-1])
    ]
    for other in outputs[1:]:
        for name, x in outputs[0].items():
            torch.testing.assert_close(other[name], x, rtol=1e-4, atol=1e-5 * float(x.abs().max()))


def test_aligned_models_agree_better_than_at_any_anchor(tmp_path: Path) -> None:
    """Without scales every anchor measures distances alike, so the outputs of whole merges can be compared."""
    twins, _ = _scrambled("llama", 0.6, Planted(scaling=False))
    paths = {name: save(twin, tmp_path / name) for name, twin in zip(NAMES, twins, strict=True)}

    def spread(base: str, anchor: str) -> float:
        states = []
        for chosen in NAMES:  # each model as it comes out of the alignment: weight 1, the others 0
            models = [{"model": paths[n], "parameters": {"weight": float(n == chosen)}} for n in NAMES]
            config = merge_config("rotation_match", paths[base], models)
            config["parameters"] = {"anchor": anchor, "scaling": False}
            states.append(merged(config, tmp_path / f"{base}-{anchor}-{chosen}"))
        blocks = [{k: x for k, x in state.items() if "mlp" in k or "self_attn" in k} for state in states]
        mean = {k: torch.stack([state[k] for state in blocks]).mean(0) for k in blocks[0]}
        for state, twin in zip(states, twins, strict=True):
            assert relative_deviation(logits_of(twin), logits_of(with_weights(twin, state))) < rounding(twin)
        return sum(squared_distance(state, mean) for state in blocks)

    consensus = spread("a", "consensus")
    assert consensus < min(spread(base, "base") for base in NAMES)


def test_the_base_model_and_unaligned_models_stay_as_they_are(paths: dict[str, Path], tmp_path: Path) -> None:
    models = [
        {"model": paths["a"], "parameters": {"weight": 1.0}},
        {"model": paths["b"], "parameters": {"weight": 0.0}},
        {"model": paths["c"], "parameters": {"weight": 0.0, "align": False}},
    ]
    config = merge_config("rotation_match", paths["a"], models, parameters={"anchor": "consensus"})
    plain = merged(merge_config("linear", None, [{"model": paths["a"], "parameters": {"weight": 1.0}}]), tmp_path / "p")
    assert all(torch.equal(x, plain[name]) for name, x in merged(config, tmp_path / "out").items())
