"""Tensors whose numbers only change places keep their dtype and bits, however they are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import State, merge_config, merged
from models import make_model, perturbed, save, with_weights

from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import Planted, random_elements, transform
from mergekit_symalign.symmetry.element import BlockElement, Fused, TensorAxes
from mergekit_symalign.symmetry.groups import Chain, HeadRotation, Permutation, Scaling
from mergekit_symalign.symmetry.solve import without_identities

ONLY_PLACES = {"rotation": "none", "scaling": False}
# Fused neurons; fused heads; both; packed experts; gains with heads of their own; each alone.
FAMILIES = ("phi3", "gpt-neox", "modernbert", "qwen3-moe", "olmo2", "cohere-qk-norm", "gpt2", "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reordered_model_merges_to_the_bits_of_the_original(family: str, tmp_path: Path) -> None:
    """The task vector is taken in bfloat16, as MergeKit takes it, not in float32 and then rounded."""
    anchor = make_model(family, 0)
    sibling = perturbed(anchor, 0.05, 1)
    layout = resolve(anchor.config, model=family)
    elements = random_elements(layout, 3, Planted(rotation=False, scaling=False))
    twin = with_weights(sibling, transform(sibling.state_dict(), layout, elements))
    paths = {
        name: save(model, tmp_path / name, torch.bfloat16)
        for name, model in (("anchor", anchor), ("sibling", sibling), ("twin", twin))
    }

    def merge(name: str, *, align: bool) -> State:
        model = {"model": paths[name], "parameters": {"weight": 0.7, "align": align}}
        rest = {"dtype": "bfloat16", "parameters": ONLY_PLACES}
        config = merge_config("aligned_task_arithmetic", paths["anchor"], [model], **rest)
        return merged(config, tmp_path / f"{name}-merged")

    wanted, out = merge("sibling", align=False), merge("twin", align=True)
    stored = merge("twin", align=False)
    assert any(not torch.equal(x, stored[name]) for name, x in wanted.items())  # the twin was stored otherwise
    assert {name for name, x in wanted.items() if not torch.equal(x, out[name])} == set()


def test_an_offset_is_added_only_where_numbers_are_calculated() -> None:
    """Gains stored as γ − 1: adding 1 in float32 and taking it off again would round the small ones."""
    gains = torch.tensor([1e-9, 2e-9, -3e-9, 4e-9])
    axes, index = TensorAxes(("query_gain",), offset=1.0), torch.tensor([2, 0, 3, 1])
    moved = BlockElement({"query_gain": Permutation(index)})(gains.bfloat16(), axes)
    assert torch.equal(moved, gains.bfloat16()[index])
    scaled = BlockElement({"query_gain": Scaling(torch.full((4,), 2.0))})(gains.bfloat16(), axes)
    assert scaled.dtype is torch.float32
    torch.testing.assert_close(scaled, torch.ones(4))  # 2 · (1 + γ) − 1


def test_a_fused_tensor_is_cast_if_a_part_of_it_is_calculated() -> None:
    axes = TensorAxes((Fused((("gate", 2), ("up", 2))), "residual"))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    swap, double = Permutation(torch.tensor([1, 0])), Scaling(torch.full((2,), 2.0))
    moved = BlockElement({"gate": swap, "up": swap})(x, axes)
    assert torch.equal(moved, x[[1, 0, 3, 2]])
    assert moved.dtype is torch.bfloat16
    scaled = BlockElement({"gate": swap, "up": Chain((swap, double))})(x, axes)
    assert torch.equal(scaled, torch.cat((x[[1, 0]].float(), 2 * x[[3, 2]].float())))


def test_steps_that_change_nothing_are_left_out() -> None:
    """Heads that moved and did not turn: nothing is calculated."""
    still = HeadRotation(torch.eye(2).expand(2, 2, 2), torch.ones(2))
    swap, order = Permutation(torch.tensor([2, 3, 0, 1])), Permutation(torch.tensor([1, 0, 2, 3]))
    element = BlockElement({"value": Chain((swap, still)), "query": Chain((swap, order)), "key": Chain((still, still))})
    kept = without_identities(element)
    assert kept.actions.keys() == {"value", "query"}
    assert not any(kept.calculates(TensorAxes((axis,))) for axis in kept.actions)
    x = torch.arange(4).bfloat16()
    for axis in element.actions:
        assert torch.equal(kept(x, TensorAxes((axis,))), element(x, TensorAxes((axis,))).bfloat16())
