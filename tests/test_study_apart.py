"""Part 9 of the study: how its text is cut, its models are trained, and its lines between models are measured."""

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from study import apart_models  # noqa: E402
from study.apart import Study, documentation  # noqa: E402
from study.apart_merges import LEARNED, NONE, Pair, arms, between, filled, path, rise  # noqa: E402
from study.apart_models import Apart, load, loss, measured, new_model, save, train  # noqa: E402
from study.apart_published import MATCHED, published  # noqa: E402
from study.apart_text import Corpus, trained_tokenizer, windows  # noqa: E402
from study.apart_transport import masked, transported  # noqa: E402
from study.data import text  # noqa: E402
from study.models import load_state  # noqa: E402

SMALL = Apart.read("apart-small")
LOG = Corpus(text("log", "train")[:20000], SMALL.held_out)


@pytest.fixture(scope="module")
def tokenizer():
    return trained_tokenizer([LOG.part("train")], SMALL.vocabulary)


@pytest.fixture(scope="module")
def pair(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("apart")
    for seed in (0, 1):
        save(new_model(SMALL, "gpt2", seed), tokenizer, folder / str(seed))
    prompts = folder / "prompts.jsonl"
    prompts.write_text(json.dumps({"text": LOG.part("train")[:200]}) + "\n", "utf-8")
    return Pair(folder / "0", folder / "1", prompts, folder / "work", SMALL.training.length)


@pytest.fixture(scope="module")
def test_windows(tokenizer) -> torch.Tensor:
    return windows(tokenizer, LOG.part("test"), SMALL.training.length)[:4]


def test_the_parts_of_a_text_are_all_of_it_and_overlap_nowhere() -> None:
    parts = [LOG.part(name) for name in ("train", "stop", "test")]
    assert "".join(parts) == LOG.text
    assert len(parts[1]) == len(parts[2]) == round(len(LOG.text) * SMALL.held_out)


def test_the_tokenizer_writes_back_what_it_read(tokenizer) -> None:
    assert tokenizer.decode(tokenizer("Zoë says: 1 + 1?\n")["input_ids"]) == "Zoë says: 1 + 1?\n"
    assert len(tokenizer) <= SMALL.vocabulary


def test_training_keeps_the_best_weights_on_the_part_it_stops_by(tokenizer) -> None:
    stop = windows(tokenizer, LOG.part("stop"), SMALL.training.length)
    model = new_model(SMALL, "llama", 0)
    before = loss(model, stop)
    assert loss(train(model, tokenizer, LOG, SMALL.training, 0), stop) < before - 0.1


def test_training_keeps_the_best_weights(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses that fall and rise again are put in place of those of the model."""
    losses, states = iter([3.0, 1.0, 2.0, 2.5]), []

    def shown(model, ids) -> float:
        states.append({name: x.clone() for name, x in model.state_dict().items()})
        return next(losses)

    monkeypatch.setattr(apart_models, "loss", shown)
    course = replace(SMALL.training, steps=9, check=1, patience=2)
    found = train(new_model(SMALL, "llama", 0), tokenizer, LOG, course, 0).state_dict()
    assert len(states) == 4
    assert all(torch.equal(x, found[name]) for name, x in states[1].items())
    assert not all(torch.equal(x, found[name]) for name, x in states[3].items())


def test_loss_and_right_tokens_are_those_of_the_logits(pair: Pair, test_windows: torch.Tensor) -> None:
    model, _ = load(pair.anchor)
    nats, right = measured(model, test_windows)
    logits = model(test_windows).logits[:, :-1].double().log_softmax(-1)
    wanted = -logits.gather(2, test_windows[:, 1:, None]).mean()
    assert nats == pytest.approx(float(wanted), abs=1e-5)
    assert right == pytest.approx(float((logits.argmax(-1) == test_windows[:, 1:]).float().mean()))


def test_the_rise_is_above_the_line_between_the_ends() -> None:
    assert rise([1.0, 2.5, 3.0]) == pytest.approx(0.5)
    assert rise([1.0, 1.5, 3.0]) == 0


def test_every_arm_in_closed_form_keeps_what_the_model_computes(pair: Pair, test_windows: torch.Tensor) -> None:
    model, _ = load(pair.model)
    wanted = loss(model, test_windows)
    for arm in ("git-rebasin", "activations", "general"):
        found, _ = load(pair.aligned(arm))
        assert loss(found, test_windows) == pytest.approx(wanted, abs=1e-4), arm


def test_a_barrier_is_measured_on_the_line_to_the_aligned_model(pair: Pair, test_windows: torch.Tensor) -> None:
    model, _ = load(pair.anchor)
    row = pair.barrier("git-rebasin", lambda state: loss(filled(model, state), test_windows))
    ends = [load(x)[0] for x in (pair.anchor, pair.aligned("git-rebasin"))]
    assert row["path"][0] == pytest.approx(loss(ends[0], test_windows), abs=1e-4)
    assert row["path"][-1] == pytest.approx(loss(ends[1], test_windows), abs=1e-4)
    assert row["barrier"] == pytest.approx(rise(row["path"]), abs=1e-4)


def test_points_lie_between_two_states() -> None:
    start, end = ({"x": torch.full((2,), value)} for value in (0.0, 1.0))
    assert path(start, end, lambda state: float(state["x"][0])) == pytest.approx([i / 10 for i in range(11)])
    assert torch.equal(between(start, end, 0.25)["x"], torch.full((2,), 0.25))


def test_a_model_is_not_filled_with_half_a_state(pair: Pair) -> None:
    model, _ = load(pair.anchor)
    with pytest.raises(ValueError, match="missing"):
        filled(model, {"transformer.wte.weight": model.transformer.wte.weight})


def test_every_arm_is_described() -> None:
    assert arms()[0] == NONE
    assert arms()[-1] == LEARNED
    assert {"blocks", "git-rebasin", "permutation", "rotation", "activations", "general"} < set(arms())


def _changed(model, by):
    """The model with these changes of its weights."""
    return filled(model, {name: x + by.get(name, 0) for name, x in model.state_dict().items()})


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_transport_between_a_model_and_itself_keeps_a_change(shape: str, tokenizer) -> None:
    """But not of gains, which have no image."""
    model = new_model(SMALL, shape, 0).eval().double()
    torch.manual_seed(1)
    for name, x in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(x)  # without them, behind a norm, one direction is never seen
    vector = {name: 0.1 * torch.randn_like(x) for name, x in model.state_dict().items()}
    ids = torch.randint(SMALL.vocabulary, (24, SMALL.training.length))
    moved = transported(vector, model, model, ids)
    norms = [name for name in vector if "ln_" in name or "norm" in name]
    assert norms
    assert not any(moved[name].any() for name in norms)
    wanted = {name: x for name, x in vector.items() if name not in norms and "wpe" not in name}
    moved = {name: moved[name] for name in wanted}
    outputs = [_changed(copy.deepcopy(model), by)(ids).logits for by in (wanted, moved)]
    assert torch.allclose(*outputs, atol=1e-3)


def test_transport_follows_a_turned_residual_stream(pair: Pair) -> None:
    """A vector of the model itself, moved into the model in other coordinates, acts as it did."""
    source, target, plain = (load(x)[0].double() for x in (pair.model, *[pair.aligned("rotation")] * 2))
    torch.manual_seed(0)
    ids = torch.randint(SMALL.vocabulary, (24, SMALL.training.length))
    name = "transformer.h.0.mlp.c_fc.weight"
    vector = {name: torch.randn_like(source.state_dict()[name])}
    moved = transported(vector, source, target, ids)

    wanted = _changed(source, vector)(ids).logits
    assert torch.allclose(_changed(target, moved)(ids).logits, wanted, atol=2e-3)
    assert not torch.allclose(_changed(plain, vector)(ids).logits, wanted, atol=2e-3)


def test_a_masked_vector_goes_downhill_everywhere(pair: Pair, test_windows: torch.Tensor) -> None:
    model, _ = load(pair.anchor)
    torch.manual_seed(0)
    vector = {name: 1e-3 * torch.randn_like(x) for name, x in model.state_dict().items()}
    found = masked(vector, model, test_windows)
    kept = sum(int((x != 0).sum()) for x in found.values()) / sum(x.numel() for x in found.values())
    assert 0.2 < kept < 0.6
    assert all(((found[name] == x) | (found[name] == 0)).all() for name, x in vector.items())
    before = loss(model, test_windows)
    state = {name: x + found[name] for name, x in load_file(pair.anchor / "model.safetensors").items()}
    assert loss(filled(model, state), test_windows) < before


def test_losses_of_the_published_code_are_read_from_files(tmp_path: Path) -> None:
    (tmp_path / f"1-{MATCHED}.json").write_text(json.dumps({"path": [1.0, 2.5, 3.0], "seconds": 4.5}), "utf-8")
    assert published(tmp_path, 0) == {}
    assert published(tmp_path, 1)[MATCHED] == {"barrier": 0.5, "path": [1.0, 2.5, 3.0], "seconds": 4.5}


def test_results_of_another_text_are_refused(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).write_text(name * 100, "utf-8")
    results = tmp_path / "results.json"
    study = Study.open(SMALL, tmp_path / "one", results, tmp_path / "work")
    study.store.measure({"part": "x", "seed": 0, "arm": "x", "variant": "-"}, dict)
    with pytest.raises(ValueError, match="other settings"):
        Study.open(SMALL, tmp_path / "other", results, tmp_path / "work")


def test_a_pair_has_the_models_of_its_seeds(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(LOG.text, "utf-8")
    full = Apart.read()
    study = Study.open(full, tmp_path / "text", tmp_path / "results.json", tmp_path / "work")
    found = list(study.pairs())
    assert len(found) == math.comb(len(full.seeds), 2) * len(full.shapes)
    assert {seeds for _, _, seeds in found} == {(0, 1), (0, 2), (1, 2)}
    assert len(documentation(0.1).part("test")) > 1000


def test_states_are_loaded_as_they_are_stored(pair: Pair) -> None:
    model, _ = load(pair.anchor)
    assert load_state(pair.anchor).keys() == model.state_dict().keys()
