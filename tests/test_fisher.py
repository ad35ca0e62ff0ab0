"""Fisher information, layer by layer, next to `torch.autograd` on the whole model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import EverythingInFloat64, make_model
from sources import InMemory, inputs_alone
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mergekit_symalign.activations.fisher import FisherPass
from mergekit_symalign.activations.gram import Gram
from mergekit_symalign.activations.inputs import find_inputs
from mergekit_symalign.activations.objectives import IGNORED, Objective, Samples, drawn, next_tokens, objective_of
from mergekit_symalign.activations.spill import Spill
from mergekit_symalign.activations.stream import Loss
from mergekit_symalign.activations.wanted import shapes_of, wanted

FAMILIES = ["llama", "llama-tied", "gpt2", "bert-classifier", "vit-classifier", "mixtral", "deberta-v3", "modernbert"]
ROUNDING = 1e-12


class Measured:
    """All statistics of a random model in float64, and its inputs and targets."""

    def __init__(
        self, model: PreTrainedModel, folder: Path, fisher: str, only: str | None = None, seed: int = 0
    ) -> None:
        self.model, self.batches = model, inputs_alone(model)
        self.targets = [_target(model, batch.ids, i) for i, batch in enumerate(self.batches)]
        self.found: dict[tuple[str, str], Tensor] = {}
        self.grams: list[Gram] = []
        folder.mkdir(exist_ok=True)
        source = InMemory(model)
        with EverythingInFloat64():
            inputs = find_inputs(source, self.batches[0])
            what = wanted(inputs, shapes_of(source.runner), gram="full", fisher=fisher, only=only, seed=seed)
            samples = Samples(tuple(self.batches), tuple(self.targets))
            spill = Spill(folder, torch.device("cpu"))
            measuring = FisherPass(
                source, samples, what, spill, gram=self.grams.append, put=self._put, step=lambda: None
            )
            self.loss: Loss = measuring.run()
        assert list(folder.iterdir()) == []

    def _put(self, kind: str, names: tuple[str, ...], x: Tensor) -> None:
        for name in names:
            self.found[kind, name] = x

    def of(self, kind: str) -> dict[str, Tensor]:
        return {name: x for (k, name), x in self.found.items() if k == kind}


def _target(model: PreTrainedModel, ids: Tensor, number: int) -> Tensor:
    objective = objective_of(type(model).__name__)
    if objective is Objective.next_token:
        return torch.cat((ids[:, 1:], torch.full((1, 1), IGNORED)), 1)
    if objective is Objective.label:
        return torch.tensor([number % 2])
    return torch.where(torch.arange(ids.shape[1]) % 3 == 1, ids, IGNORED)


def _log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """By its definition."""
    log_p = logits.log_softmax(-1).reshape(-1, logits.shape[-1])
    return sum((log_p[i, t] for i, t in enumerate(targets.flatten().tolist()) if t != IGNORED), torch.zeros(()))


def _squared(measured: Measured, targets: list[Tensor]) -> dict[str, Tensor]:
    """The mean over inputs of each parameter's squared gradient, from the whole model."""
    model = measured.model
    sums = {name: torch.zeros_like(x) for name, x in model.named_parameters()}
    for batch, target in zip(measured.batches, targets, strict=True):
        with EverythingInFloat64():
            total = _log_likelihood(model(**batch.inputs()).logits, target)
        found = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
        for name, gradient in zip(sums, found, strict=True):
            sums[name] += 0 if gradient is None else gradient**2 / len(targets)
    return sums


def _assert_equal(found: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    assert found.keys() == reference.keys()
    for name, x in reference.items():
        assert found[name].shape == x.shape
        assert float((found[name] - x).abs().max()) <= ROUNDING * float(x.abs().max()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_empirical_is_what_autograd_gives_on_the_whole_model(family: str, tmp_path: Path) -> None:
    measured = Measured(make_model(family, 0), tmp_path, "empirical")
    _assert_equal(measured.of("fisher"), _squared(measured, measured.targets))


def test_it_is_no_square_of_a_mean(tmp_path: Path) -> None:
    measured = Measured(make_model("llama", 0), tmp_path, "empirical")
    model = measured.model
    with EverythingInFloat64():
        pairs = zip(measured.batches, measured.targets, strict=True)
        total = sum(_log_likelihood(model(**batch.inputs()).logits, target) for batch, target in pairs)
    found = torch.autograd.grad(total / 3, model.model.norm.weight)  # type: ignore[operator]
    assert not torch.allclose(found[0] ** 2, measured.of("fisher")["model.norm.weight"], rtol=0.1)


@pytest.mark.parametrize("family", ["llama", "bert-classifier"])
def test_hard_takes_what_the_model_finds_likeliest(family: str, tmp_path: Path) -> None:
    measured = Measured(make_model(family, 0), tmp_path, "hard")
    with torch.no_grad(), EverythingInFloat64():
        likeliest = [measured.model(**batch.inputs()).logits.argmax(-1) for batch in measured.batches]
    targets = [torch.where(t == IGNORED, IGNORED, x) for t, x in zip(measured.targets, likeliest, strict=True)]
    _assert_equal(measured.of("fisher"), _squared(measured, targets))


def test_sampled_draws_from_the_model_and_can_be_repeated(tmp_path: Path) -> None:
    model = make_model("llama", 0)
    one, again = (Measured(model, tmp_path, "sampled", seed=1).of("fisher") for _ in range(2))
    other = Measured(model, tmp_path, "sampled", seed=2).of("fisher")
    assert all(torch.equal(x, again[name]) for name, x in one.items())
    assert not all(torch.equal(x, other[name]) for name, x in one.items())


def test_targets_are_drawn_as_often_as_the_model_expects_them() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0]).expand(20000, 4)
    targets = torch.zeros(20000, dtype=torch.int64)
    targets[0] = IGNORED
    found = drawn(logits, targets, torch.Generator().manual_seed(0))
    assert found[0] == IGNORED
    share = found[1:].bincount(minlength=4) / 19999
    torch.testing.assert_close(share, logits[0].softmax(-1), rtol=0, atol=0.02)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bert-classifier"])
def test_kronecker_factors_are_those_of_plain_hooks(family: str, tmp_path: Path) -> None:
    measured = Measured(make_model(family, 0), tmp_path, "kronecker")
    reference = _output_gradients(measured)
    factors = measured.of("gradient_gram")
    assert reference.keys() <= factors.keys()
    for name, rows in reference.items():
        expected = rows.T @ rows / len(rows)
        assert float((factors[name] - expected).abs().max()) <= ROUNDING * float(expected.abs().max()), name
    linear = {name for gram in measured.grams for name in gram.names}
    assert factors.keys() == linear
    assert measured.of("fisher").keys() == {name for name, _ in measured.model.named_parameters()} - linear
    squared = _squared(measured, measured.targets)
    _assert_equal(measured.of("fisher"), {name: squared[name] for name in measured.of("fisher")})


def test_factors_of_experts_are_of_their_own_tokens(tmp_path: Path) -> None:
    measured = Measured(make_model("mixtral", 0), tmp_path, "kronecker")
    for part in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{part}"
        weight = measured.model.get_parameter(name)
        squares, factor = _of_gram(measured.grams, name), measured.of("gradient_gram")[name]
        assert factor.shape == (4, weight.shape[1], weight.shape[1])
        counts = next(gram.tokens for gram in measured.grams if name in gram.names)
        assert isinstance(counts, tuple)
        assert sum(counts) == 2 * sum(batch.ids.numel() for batch in measured.batches)
        assert all(bool(squares[e].any()) == bool(factor[e].any()) == (n > 0) for e, n in enumerate(counts))


def _of_gram(grams: list[Gram], name: str) -> Tensor:
    return next(gram.squares for gram in grams if name in gram.names)


def _output_gradients(measured: Measured) -> dict[str, Tensor]:
    """Gradients of each input's log-likelihood at the outputs of linear modules, [tokens, out]."""
    rows: dict[str, list[Tensor]] = defaultdict(list)

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Tensor) -> None:
            output.register_hook(lambda g: rows[name].append(g.flatten(0, -2)))

        return note

    model = measured.model
    names = {name for name, _ in model.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and f"{path}.weight" in names:
            module.register_forward_hook(hook(f"{path}.weight"))
    for batch, target in zip(measured.batches, measured.targets, strict=True):
        with EverythingInFloat64():
            _log_likelihood(model(**batch.inputs()).logits, target).backward()
    return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("only", [r"layers\.1\.", "embed_tokens", "norm"])
def test_only_some_tensors(only: str, tmp_path: Path) -> None:
    model = make_model("llama-tied", 0)
    whole, some = Measured(model, tmp_path, "empirical"), Measured(model, tmp_path, "empirical", only)
    expected = {
        name: x
        for name, x in whole.of("fisher").items()
        if torch.as_tensor([only in name or (only[0] == "l" and "layers.1." in name)]).all()
    }
    assert some.of("fisher").keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in some.of("fisher").items())


def test_inputs_in_which_nothing_is_predicted_do_not_count(tmp_path: Path) -> None:
    model = make_model("llama", 0)
    source, batches = InMemory(model), inputs_alone(model, (9, 1, 5))
    found: dict[str, Tensor] = {}
    with EverythingInFloat64():
        what = wanted(
            find_inputs(source, batches[0]),
            shapes_of(source.runner),
            gram="none",
            fisher="empirical",
            only="model.norm",
            seed=0,
        )
        samples = Samples(tuple(batches), tuple(map(next_tokens, batches)))
        FisherPass(
            source,
            samples,
            what,
            Spill(tmp_path, torch.device("cpu")),
            gram=lambda _: None,
            put=lambda _, names, x: found.update({names[0]: x}),
            step=lambda: None,
        ).run()
    squares = torch.zeros(48, dtype=torch.float64)
    for batch in (batches[0], batches[2]):
        with EverythingInFloat64():
            total = _log_likelihood(model(batch.ids).logits, next_tokens(batch))
        squares = squares + torch.autograd.grad(total, model.model.norm.weight)[0] ** 2 / 2
    torch.testing.assert_close(found["model.norm.weight"], squares, rtol=1e-9, atol=0)


def test_the_loss_is_that_of_the_true_targets(tmp_path: Path) -> None:
    for fisher in ("empirical", "hard"):
        measured = Measured(make_model("llama", 0), tmp_path, fisher)
        with torch.no_grad(), EverythingInFloat64():
            pairs = zip(measured.batches, measured.targets, strict=True)
            total = sum(float(_log_likelihood(measured.model(b.ids).logits, t)) for b, t in pairs)
        assert measured.loss.total == pytest.approx(-total, rel=1e-12)
