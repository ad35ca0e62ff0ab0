"""How activations and weights count against each other when both say where things belong (docs/activations.md)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from attention import HeadShape
from conftest import State, merge_config, merged
from models import make_model, perturbed, save, with_weights, word_tokenizer
from more_models import more_model
from test_activations import prompts
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.graph import readers
from mergekit_symalign.planting import Planted, random_elements, transform
from mergekit_symalign.symmetry.assignment.linear import best_assignment
from mergekit_symalign.symmetry.by_activations.attention import align_attention_by
from mergekit_symalign.symmetry.by_activations.covariance import Covariance
from mergekit_symalign.symmetry.by_activations.evidence import GRAIN, Agreement, most_likely
from mergekit_symalign.symmetry.by_activations.neurons import align_mlp_by
from mergekit_symalign.symmetry.heads.solve import HEAD_AXES
from mergekit_symalign.symmetry.options import MlpShape, Symmetries

FEW = 64  # tokens: they say little of most directions, and next to nothing of most experts
NOISE = 0.02  # of a sibling's weights, relative
LEVELS = (0.02, 0.3, 1.0)  # of what differs, relative to what is common


def test_evidence_counts_as_much_as_it_agrees() -> None:
    """Against scipy-free arithmetic: the slope of −½ log(1 − r²), and its least and largest share."""
    agreement = Agreement(0.6, 0.9)
    slope = {r: (math.log(1 - (r - 1e-6) ** 2) - math.log(1 - (r + 1e-6) ** 2)) / 4e-6 for r in (0.6, 0.9)}
    assert agreement.share == pytest.approx(slope[0.9] / (slope[0.6] + slope[0.9]), rel=1e-6)
    assert agreement.likelihood == pytest.approx(-math.log((1 - 0.36) * (1 - 0.81)) / 2)
    assert Agreement(0.9, 0.0).share == Agreement(0.9, -0.5).share == GRAIN
    assert Agreement(0.0, 0.9).share == 1 - GRAIN
    assert Agreement(1.0, 1.0).share == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(5))
def test_no_round_is_less_likely_than_the_one_before(seed: int) -> None:
    """Rotations of a plane: activations and weights ask for different angles."""
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(2, 2, 30, dtype=torch.float64, generator=generator).cumsum(0) for _ in range(2)]
    crosses = [a @ b.T / (a.norm() * b.norm()) for a, b in sides]
    seen: list[float] = []

    def solved(shares: Any) -> torch.Tensor:
        u, _, vh = torch.linalg.svd((1 - shares["it"]) * crosses[0] + shares["it"] * crosses[1])
        return u @ vh

    def agreement(r: torch.Tensor) -> dict[str, Agreement]:
        found = Agreement(*(float((r * c).sum()) for c in crosses))
        seen.append(found.likelihood)
        return {"it": found}

    found, _ = most_likely(solved, agreement, ("it",))
    turns = [i for i in range(1, len(seen)) if seen[i] < seen[i - 1] - 1e-12]
    assert len(turns) <= 1  # where the second start begins
    assert agreement(found)["it"].likelihood == max(seen)


def test_weights_that_agree_in_nothing_count_for_nothing() -> None:
    """Neurons of unrelated weights whose activations correlate: the order is that of the activations alone."""
    generator = torch.Generator().manual_seed(0)
    n, tokens = 64, 4000
    hidden = torch.randn(n, tokens, generator=generator)
    order = torch.randperm(n, generator=generator)
    model = hidden[order] + torch.randn(n, tokens, generator=generator)
    weights = {axis: [tuple(torch.randn(2, n, 32, generator=generator).unbind(0))] for axis in ("gate", "up", "down")}
    seen = Covariance.of_rows([(hidden, model)])
    found = align_mlp_by(seen, weights, MlpShape(n), Symmetries()).element.actions["gate"].index
    assert found.tolist() == best_assignment(seen.cross).tolist() == order.argsort().tolist()


@pytest.mark.parametrize("level", LEVELS)
def test_heads_are_never_farther_from_what_both_say_than_from_one(level: float) -> None:
    """Values turned by noise in the activations: weights that agree to 0.1 % keep them, those that do not let go."""
    generator = torch.Generator().manual_seed(1)
    shape = HeadShape(query_heads=2, kv_heads=2, head_dim=8, rotary=8)

    def rows(n: int) -> torch.Tensor:
        return torch.randn(16, n, dtype=torch.float64, generator=generator)

    weights = {axis: rows(40) for axis in HEAD_AXES}
    theirs = {axis: x + level * rows(40) for axis, x in weights.items()}
    tokens = {axis: rows(30) for axis in HEAD_AXES}
    noisy = {axis: x + 1.5 * rows(30) for axis, x in tokens.items()}
    seen = {axis: Covariance.of_rows([(x, noisy[axis])]) for axis, x in tokens.items()}
    sides = {axis: [(x, theirs[axis])] for axis, x in weights.items()}
    found = align_attention_by(seen, sides, shape, Symmetries(scaling=False)).element
    turned = found.actions["value"](theirs["value"], 0)
    change = float((turned - theirs["value"]).norm() / theirs["value"].norm())
    assert change < 2 * level  # nothing was turned in the first place


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mixtral", "glm4-moe"])
def test_a_planted_sibling_comes_back_as_near_as_it_was(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise on all weights, then random symmetries; matched on 64 tokens."""
    monkeypatch.setattr(readers, "AutoTokenizer", PreTrainedTokenizerFast)
    anchor = more_model(family) if family == "glm4-moe" else make_model(family, 0)
    layout = resolve(anchor.config, model=family)
    sibling = perturbed(anchor, NOISE, 1).state_dict()
    planted = transform(sibling, layout, random_elements(layout, 3, Planted()))
    paths = [save(with_weights(anchor, x), tmp_path / str(i)) for i, x in enumerate((anchor.state_dict(), planted))]
    for path in paths:
        word_tokenizer(97).save_pretrained(path)
    settings = {"objective": "activations", "calibration": str(prompts(tmp_path / "p.jsonl", tokens=FEW))}
    merged(merge_config("rotation_match", paths[0], paths[1:], parameters=settings), tmp_path / "out")
    out, standing = _loaded(anchor, tmp_path / "out"), _loaded(anchor, paths[0])
    assert _apart(out, standing) <= 1.1 * _apart(sibling, standing)
    assert _apart(_loaded(anchor, paths[1]), standing) > 5 * _apart(sibling, standing)


def _loaded(model: PreTrainedModel, path: Path) -> State:
    return dict(type(model).from_pretrained(path, dtype=torch.float32).state_dict())


def _apart(state: State, other: State) -> float:
    return math.sqrt(sum(float((state[name].double() - x.double()).square().sum()) for name, x in other.items()))
