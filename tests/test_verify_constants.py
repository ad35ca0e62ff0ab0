"""verify where there is little to divide by: constant outputs, one token, hidden states of norm 0, NaN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import load
from models import make_model, save, with_weights
from safetensors.torch import save_file
from transformers import PreTrainedModel

from mergekit_symalign.activations.agreement import Agreement, hidden_deviation
from mergekit_symalign.cli import main
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import random_elements, transform


def command(*args: Any) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, args), "--random"])


def _agreement(original: torch.Tensor, other: torch.Tensor, *, distribution: bool = True) -> Agreement:
    found = Agreement(distribution=distribution)
    found.add(original, other)
    return found


@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1, -3.0])
def test_constant_outputs(value: float) -> None:
    constant = torch.full((300, 7), value)
    same = _agreement(constant, constant)
    assert same.std == 0
    assert same.relative(same.largest) == 0
    other = _agreement(constant, constant + 1)
    expected = math.inf if value == 0 else 1 / abs(value)
    assert other.relative(other.largest) == pytest.approx(expected, rel=1e-4)
    assert other.divergence == pytest.approx(0, abs=1e-9)


def test_std_is_that_of_torch() -> None:
    x = 1e4 + torch.randn(500, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert _agreement(x, x).std == pytest.approx(float(x.std(correction=0)), rel=1e-9)


def test_bad_and_infinite_values() -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    for bad in (math.nan, math.inf, -math.inf):
        y = x.clone()
        y[1, 2] = bad
        for pair in ((x, y), (y, x)):
            found = _agreement(*pair)
            assert found.relative(found.largest) == math.inf
    masked = x.clone()
    masked[:, 0] = -math.inf  # a masked class
    found = _agreement(masked, masked)
    assert found.relative(found.largest) == found.divergence == 0


def test_nothing_and_one_number() -> None:
    nothing = _agreement(torch.empty(0, 5), torch.empty(0, 5))
    assert nothing.tokens == nothing.median == nothing.std == nothing.relative(0) == 0
    one = torch.ones(1, 1)
    assert _agreement(one, one).relative(0) == 0
    near = _agreement(one, one * (1 + 1e-6))
    assert near.relative(near.largest) == pytest.approx(1e-6, rel=0.1)


def test_hidden_states_of_norm_0() -> None:
    zeros, ones = torch.zeros(3, 4), torch.ones(3, 4)
    assert hidden_deviation(zeros, zeros) == 0
    assert hidden_deviation(zeros, ones) == math.inf
    assert hidden_deviation(torch.empty(0, 4), torch.empty(0, 4)) == 0
    assert hidden_deviation(ones, ones * math.nan) == math.inf


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    layout = resolve(model.config, model="m")
    return with_weights(model, transform(model.state_dict(), layout, random_elements(layout, 3)))


@pytest.mark.parametrize(
    ("family", "silent", "own"),
    [
        ("llama", ["lm_head.weight"], {}),  # all logits are 0
        ("llama", ["model.embed_tokens.weight"], {}),  # all hidden states are
        ("bert-classifier", ["classifier.weight"], {"num_labels": 1}),  # its bias alone
        ("bert-classifier", [], {"num_labels": 1}),  # one number for a prompt
    ],
)
def test_models_of_constant_outputs(family: str, silent: list[str], own: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(family, 0, **own)
    with torch.no_grad():
        for name in silent:
            model.get_parameter(name).zero_()
    paths = [save(model, tmp_path / "original"), save(_twin(model), tmp_path / "twin")]
    for tokens in (1, 40):
        done = command(*paths, "--tokens", tokens)
        assert done.exit_code == 0, (done.output, done.exception)
        assert "The same function" in done.output
    state = load(paths[1])
    name = {"llama": "lm_head.weight", "bert-classifier": "classifier.bias"}[family]
    if silent != ["model.embed_tokens.weight"]:
        save_file(state | {name: state[name] + 1}, paths[1] / "model.safetensors", {"format": "pt"})
        done = command(*paths, "--tokens", 40)
        assert done.exit_code == 1, (done.output, done.exception)
        assert "NOT the same function" in done.output
