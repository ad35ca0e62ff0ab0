"""Gram matrices of every linear layer of every architecture, next to plain forward hooks on the whole model."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import models
import pytest
import torch
from models import FAMILIES, EverythingInFloat64, make_model
from sources import InMemory, inputs_alone, together
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mergekit_symalign.activations.gram import Gram, GramSum
from mergekit_symalign.activations.inputs import Inputs, find_inputs, linear_names
from mergekit_symalign.activations.objectives import Samples, next_tokens
from mergekit_symalign.activations.runner import Batch
from mergekit_symalign.activations.stream import Loss, sum_inputs
from mergekit_symalign.families.resolve import supported_architectures

OTHER_HEADS = {
    "BertForMaskedLM": "bert",
    "BertForTokenClassification": "bert",
    "RobertaForSequenceClassification": "roberta",
    "RobertaForTokenClassification": "roberta",
    "DistilBertForSequenceClassification": "distilbert",
    "DistilBertForTokenClassification": "distilbert",
    "ModernBertForSequenceClassification": "modernbert",
    "ModernBertForTokenClassification": "modernbert",
    "DebertaV2ForSequenceClassification": "deberta-v2",
    "DebertaV2ForTokenClassification": "deberta-v3",
}
CASES = {family: (class_name, own) for family, (class_name, own) in FAMILIES.items()}
CASES |= {class_name: (class_name, FAMILIES[family][1]) for class_name, family in OTHER_HEADS.items()}
CASES["deberta-own-positions"] = ("DebertaV2Model", FAMILIES["deberta-v2"][1] | {"share_att_key": False})


def test_every_class_of_the_small_models_is_among_the_cases() -> None:
    measured = {class_name for class_name, _ in CASES.values()}
    assert measured >= {class_name for class_name, _ in FAMILIES.values()}
    assert measured <= set(supported_architectures())


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    monkeypatch.setitem(models.FAMILIES, "case", CASES[request.param])
    return make_model("case", 0)


def measured(model: PreTrainedModel, batches: list[Batch], *, full: bool = True) -> tuple[Inputs, list[Gram], Loss]:
    source, found = InMemory(model), []
    targets = [next_tokens(b) if "ForCausalLM" in type(model).__name__ else None for b in batches]
    with EverythingInFloat64():
        inputs = find_inputs(source, batches[0])
        samples = Samples(tuple(batches), tuple(targets))
        loss = sum_inputs(source, samples, inputs, full=full, put=found.append, step=lambda: None)
    return inputs, found, loss


class Hooks:
    """What every linear layer of a whole model reads, by the name of its weight; experts by (name, expert)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.rows: dict[Any, list[Tensor]] = defaultdict(list)
        self.first, self.tokens = True, 0
        for name, module in model.named_modules():
            if type(module).__name__.endswith("Experts"):
                module.register_forward_pre_hook(self._experts(name))
            elif isinstance(module, (nn.Linear, Conv1D)) or type(module).__name__.endswith("Router"):
                module.register_forward_pre_hook(self._linear(f"{name}.weight"))

    def _linear(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2)
            if len(rows) in (self.tokens, 1) or self.first:  # relative positions count once
                self.rows[name].append(rows)

        return hook

    def _experts(self, name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            hidden, chosen, _ = args
            for expert in range(len(module.gate_up_proj)):
                rows = hidden[(chosen == expert).any(-1)]
                gate, up = (rows @ module.gate_up_proj[expert].T).chunk(2, -1)
                self.rows[f"{name}.gate_up_proj", expert].append(rows)
                self.rows[f"{name}.down_proj", expert].append(module.act_fn(gate) * up)

        return hook


def _reference(model: PreTrainedModel, batches: list[Batch]) -> dict[Any, Tensor]:
    hooks = Hooks(model)
    for batch in batches:
        hooks.tokens = batch.valid.numel()
        with torch.no_grad(), EverythingInFloat64():
            model(**batch.inputs())
        hooks.first = False
    return {name: torch.cat(rows) for name, rows in hooks.rows.items()}


def _by_matrix(grams: list[Gram]) -> dict[Any, tuple[Tensor, Tensor, int]]:
    """Of each linear layer: G, mean and tokens; packed weights by (name, expert)."""
    found: dict[Any, tuple[Tensor, Tensor, int]] = {}
    for gram in grams:
        for name in gram.names:
            if isinstance(gram.tokens, int):
                found[name] = (gram.squares, gram.mean, gram.tokens)
            else:
                found |= {(name, i): (gram.squares[i], gram.mean[i], n) for i, n in enumerate(gram.tokens)}
    return found


def test_each_is_what_hooks_on_the_whole_model_see(model: PreTrainedModel) -> None:
    batches = inputs_alone(model)
    _, grams, _ = measured(model, [together(batches[:2]), together(batches[2:])])
    found, reference = _by_matrix(grams), _reference(model, batches)
    for name, (squares, mean, tokens) in found.items():
        rows = reference[name]
        assert tokens == len(rows), name
        if tokens:
            torch.testing.assert_close(squares, rows.T @ rows / len(rows), rtol=1e-6, atol=1e-9, msg=str(name))
            torch.testing.assert_close(mean, rows.mean(0), rtol=1e-6, atol=1e-9, msg=str(name))
    covered = {name if isinstance(name, str) else name[0] for name in found}
    uncovered = {name for name in linear_names(model) if name not in covered}
    assert uncovered <= {name for name in uncovered if "embed" in name or "wte" in name}  # tied: lookups too
    assert uncovered == set() or model.config.tie_word_embeddings
    assert {name for name in reference if name not in found} <= _tied_names(model)


def _tied_names(model: PreTrainedModel) -> set[str]:
    first = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - first


def test_what_reads_the_same_input_is_measured_once() -> None:
    inputs, grams, _ = measured(make_model("llama", 0), inputs_alone(make_model("llama", 0)))
    assert [len(shared.names) for shared in inputs.layers[0]] == [3, 1, 2, 1]
    assert len(grams) == 3 * 4 + 1
    assert [shared.names for shared in inputs.behind] == [("lm_head.weight",)]


def test_parallel_blocks_share_their_input_too() -> None:
    inputs, _, _ = measured(make_model("phi2", 0), inputs_alone(make_model("phi2", 0)))
    assert [len(shared.names) for shared in inputs.layers[0]] == [4, 1, 1]


@pytest.mark.parametrize("family", ["llama", "mixtral", "vit"])
def test_diagonals_are_the_diagonals(family: str) -> None:
    model = make_model(family, 0)
    batches = inputs_alone(model)
    _, whole, _ = measured(model, batches)
    _, diagonals, _ = measured(model, batches, full=False)
    for one, other in zip(whole, diagonals, strict=True):
        torch.testing.assert_close(one.squares.diagonal(dim1=-2, dim2=-1), other.squares)
        torch.testing.assert_close(one.mean, other.mean)


@pytest.mark.parametrize("width", [1, 127, 128, 129, 800])
def test_half_of_the_products_make_the_whole_matrix(width: int) -> None:
    rows = torch.randn(50, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = GramSum(width, None, full=True)
    for some in rows.split(20):
        total.add(some)
    found = total.found(("x",))
    torch.testing.assert_close(found.squares.double(), rows.T @ rows / 50, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.squares, found.squares.T)


def test_sums_over_many_batches_keep_their_digits() -> None:
    """Float32 sums of 1e7 ones stop at 16.8 million; each batch here adds less than the rounding of the sum."""
    total = GramSum(1, None, full=True)
    total.add(torch.full((1, 1), 4096.0))
    for _ in range(1000):
        total.add(torch.full((1, 1), 0.5))
    assert float(total.found(("x",)).squares) == pytest.approx((4096.0**2 + 250) / 1001, rel=1e-7)


def test_the_loss_is_the_mean_over_next_tokens() -> None:
    model = make_model("llama", 0)
    batches = inputs_alone(model)
    _, _, loss = measured(model, [together(batches)])
    with EverythingInFloat64():
        parts = [(float(model(b.ids, labels=b.ids).loss), b.ids.shape[1] - 1) for b in batches]
    assert loss.mean == pytest.approx(sum(x * n for x, n in parts) / sum(n for _, n in parts), rel=1e-12)
    assert loss.count == sum(n for _, n in parts)
