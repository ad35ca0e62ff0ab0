"""learn: an alignment file that any merge takes, the function kept, runs that go on, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import load, merge_config, merged
from mergekit.options import MergeOptions
from models import logits, make_model, perturbed, relative_deviation, save, with_weights, word_tokenizer
from safetensors import safe_open
from streams import in_other_coordinates, stored
from transformers import LlamaForCausalLM, PreTrainedModel

from mergekit_symalign.alignment_file import AlignmentFile
from mergekit_symalign.cli import main
from mergekit_symalign.commands import learn, learn_inputs
from mergekit_symalign.commands.learn import Outcome, run_learn
from mergekit_symalign.commands.learn_inputs import Asked
from mergekit_symalign.errors import ConfigError
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.learning.descent import Plan
from mergekit_symalign.symmetry.residual.kinds import ResidualKind

TINY = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 12}
WORDS = word_tokenizer(97)
NOTHING = ["--no-permutation", "--no-heads", "--rotation", "none", "--no-scaling", "--residual", "none"]


def command(*args: Any) -> Result:
    return CliRunner().invoke(main, ["learn", *map(str, args)])


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """In coordinates of its residual stream and heads that are rotated, its neurons in their order."""
    layout = resolve(model.config, model="m")
    state = stored(model)
    return with_weights(model, in_other_coordinates(layout, state, ResidualKind.rotation, state))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, a twin of its sibling, an alignment that does nothing, and texts that the model itself would write."""
    folder = tmp_path_factory.mktemp("pair")
    model = make_model("llama", 0, **TINY)
    models = {"anchor": model, "model": _twin(perturbed(model, 0.1, 1))}
    paths = {name: save(m, folder / name) for name, m in models.items()}
    for path in paths.values():
        WORDS.save_pretrained(path)
    start = torch.arange(3, 43).unsqueeze(1)
    texts = model.float().generate(start, max_length=16, do_sample=False, pad_token_id=0, eos_token_id=None)
    lines = [" ".join(f"w{max(3, i)}" for i in row) for row in texts.tolist()]
    (folder / "texts.txt").write_text("\n".join(lines), "utf-8")
    done = CliRunner().invoke(
        main, ["solve", *map(str, paths.values()), "-o", str(folder / "nothing.safetensors"), *NOTHING]
    )
    assert done.exit_code == 0, done.output
    return paths | {"texts": folder / "texts.txt", "nothing": folder / "nothing.safetensors"}


def _learned(pair: dict[str, Path], out: Path, steps: int = 40, **more: Any) -> Outcome:
    """From where the model stands, with a rotation of its stream."""
    asked = Asked(Plan(steps=steps, rate=0.03, every=10), batch_size=8, **more)
    options = MergeOptions(device="cpu", quiet=True)
    files = (pair["anchor"], pair["model"])
    parameters = {"residual": "rotation"}
    return run_learn(*map(str, files), pair["texts"], out, options, asked, parameters=parameters, init=pair["nothing"])


@pytest.fixture(scope="module")
def learned(pair: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    out = tmp_path_factory.mktemp("learned") / "learned.safetensors"
    return out, _learned(pair, out)


def _loss(model: PreTrainedModel, texts: Path) -> float:
    """Mean over all tokens, as transformers takes it."""
    ids = torch.stack(
        [WORDS(line, return_tensors="pt")["input_ids"][0] for line in texts.read_text("utf-8").splitlines()]
    )
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def test_the_midpoint_gets_better_and_the_function_stays(
    pair: dict[str, Path], learned: tuple[Path, Outcome], tmp_path: Path
) -> None:
    file, outcome = learned
    ends = (outcome.anchor + outcome.model) / 2
    assert outcome.before > ends + 1
    assert outcome.after - ends < 0.7 * (outcome.before - ends)
    listed = {"model": pair["model"], "parameters": {"alignment": str(file), "weight": 1.0}}
    merged(merge_config("rotation_match", pair["anchor"], [listed]), tmp_path / "moved")
    model, moved = (
        LlamaForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (pair["model"], tmp_path / "moved")
    )
    assert relative_deviation(logits(model), logits(moved)) < 1e-3
    anchor = LlamaForCausalLM.from_pretrained(pair["anchor"], dtype=torch.float32)
    halves = {}
    for name, end in (("plain", model), ("learned", moved)):
        other = end.state_dict()
        halves[name] = with_weights(anchor, {key: (x + other[key]) / 2 for key, x in anchor.state_dict().items()})
    losses = {name: _loss(half, pair["texts"]) for name, half in halves.items()}
    assert losses["learned"] < losses["plain"] - 0.3
    report = json.loads((tmp_path / "moved" / "symalign_report.json").read_text("utf-8"))
    (entry,) = report["models"].values()
    assert report["exact"]
    assert entry["residual"]["loss_after"] == pytest.approx(outcome.after)


def test_what_the_file_says(pair: dict[str, Path], learned: tuple[Path, Outcome]) -> None:
    file, outcome = AlignmentFile.open(learned[0]), learned[1]
    assert file.origin.settings["objective"] == "learned"
    assert file.origin.settings["residual"] == "rotation"
    assert file.origin.settings["learned_steps"] == outcome.steps
    assert file.facts["residual"]["loss_before"] == pytest.approx(outcome.before)
    assert file.facts["layer 0 mlp"]["objective"] == "learned"
    assert not learned[0].with_name("learned.safetensors.state").exists()


def test_through_the_commands(
    pair: dict[str, Path], tmp_path: Path, mergekit_yaml: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """From the closed form to mergekit-yaml, with residual given beside the file."""
    out = tmp_path / "learned.safetensors"
    done = command(pair["anchor"], pair["model"], "--data", pair["texts"], "-o", out, "--steps", 3)
    assert done.exit_code == 0, done.output
    assert "memory: about" in done.output
    assert "midpoint" in done.output
    listed = {"model": str(pair["model"]), "parameters": {"alignment": str(out)}}
    parameters = {"residual": "rotation", "weight": 0.5, "normalize": False}
    config = merge_config("aligned_task_arithmetic", str(pair["anchor"]), [listed], parameters=parameters)
    assert mergekit_yaml(config, tmp_path / "out", "--no-copy-tokenizer").returncode == 0
    assert load(tmp_path / "out")
    shown = CliRunner().invoke(main, ["verify", str(pair["model"]), str(pair["model"]), "--random", "--quiet"])
    assert shown.exit_code == 0


class _StoppedError(Exception):
    pass


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_a_stopped_run_goes_on_to_the_same_end(
    pair: dict[str, Path], learned: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, folder = tmp_path / "learned.safetensors", tmp_path / "learned.safetensors.state"
    saved = learn.save_state

    def stopping(path: Path, state: Any, what: Any) -> None:
        saved(path, state, what)
        if state.step == 20:
            raise _StoppedError

    monkeypatch.setattr(learn, "save_state", stopping)
    with pytest.raises(_StoppedError):
        _learned(pair, out)
    assert folder.exists()
    assert not out.exists()
    monkeypatch.undo()
    shutil.copytree(folder, tmp_path / "other.safetensors.state")
    with pytest.raises(ConfigError, match="another steps was stopped there"):
        _learned(pair, tmp_path / "other.safetensors", steps=41)
    outcome = _learned(pair, out)
    assert outcome == learned[1]
    wanted, found = _tensors(learned[0]), _tensors(out)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(x, wanted[name]) for name, x in found.items())
    assert not folder.exists()


def test_layers_that_run_twice_lead_to_the_same_end(
    pair: dict[str, Path], learned: tuple[Path, Outcome], tmp_path: Path
) -> None:
    outcome = _learned(pair, tmp_path / "again.safetensors", checkpoints=True)
    assert outcome.after == pytest.approx(learned[1].after, rel=1e-3)


def test_lower_precision_learns_too(pair: dict[str, Path], tmp_path: Path) -> None:
    outcome = _learned(pair, tmp_path / "half.safetensors", steps=10, dtype="bfloat16")
    assert outcome.after < outcome.before


def _refused(*args: Any, says: str, output: Path) -> None:
    done = command(*args, "-o", output)
    assert done.exit_code == 2, done.output
    assert says in done.output
    assert not output.exists()
    assert not output.with_name(f"{output.name}.state").exists()


def test_refusals(pair: dict[str, Path], tmp_path: Path) -> None:
    anchor, model, texts, out = pair["anchor"], pair["model"], pair["texts"], tmp_path / "out.safetensors"
    data = ("--data", texts)
    _refused(anchor, model, *data, "--rotation", "full", says="changes what the model computes", output=out)
    _refused(anchor, model, "--data", tmp_path / "absent.txt", says="it cannot be read", output=out)
    (tmp_path / "short.txt").write_text("w3\n", "utf-8")
    _refused(anchor, model, "--data", tmp_path / "short.txt", says="texts of two tokens or more", output=out)
    _refused(anchor, model, *data, "--init", tmp_path / "absent.safetensors", says="no such file", output=out)
    other = save(make_model("llama", 0, **TINY | {"hidden_size": 12}), tmp_path / "narrow")
    _refused(anchor, other, *data, says="hidden", output=out)
    _refused(anchor, save(make_model("gpt2", 0), tmp_path / "gpt2"), *data, says="family", output=out)


def test_tokenizers_that_differ_are_refused(pair: dict[str, Path], tmp_path: Path) -> None:
    foreign = shutil.copytree(pair["model"], tmp_path / "foreign")
    word_tokenizer(97, "v").save_pretrained(foreign)
    args = (pair["anchor"], foreign, "--data", pair["texts"])
    _refused(*args, says="no tokenizer", output=tmp_path / "out.safetensors")


def test_models_without_a_loss_on_texts_are_refused(pair: dict[str, Path], tmp_path: Path) -> None:
    for name in ("bert", "bert-classifier"):
        path = save(make_model(name, 0, num_hidden_layers=1), tmp_path / name)
        WORDS.save_pretrained(path)
        _refused(path, path, "--data", pair["texts"], says="no loss on texts", output=tmp_path / "out.safetensors")


def test_a_rotation_that_is_not_exact_is_refused_and_the_strongest_chosen(
    pair: dict[str, Path], tmp_path: Path
) -> None:
    """A family that ties its embeddings, with learned positions and a masked-token loss elsewhere."""
    tiny = {"num_hidden_layers": 1, "n_layer": 1, "n_positions": 12, "max_position_embeddings": 12}
    paths = [save(make_model("gpt2", seed, **tiny), tmp_path / f"gpt2-{seed}") for seed in (0, 1)]
    for path in paths:
        WORDS.save_pretrained(path)
    args, out = (*paths, "--data", pair["texts"]), tmp_path / "out.safetensors"
    _refused(*args, "--residual", "rotation", says="its head is its embedding", output=out)
    _refused(*args, "--sequence-length", 16, says="have 12 positions", output=out)
    done = command(*args, "-o", out, "--steps", 2)
    assert done.exit_code == 0, done.output
    assert AlignmentFile.open(out).origin.settings["residual"] == "permutation"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tied_models_are_learned_with_heads_of_their_own(pair: dict[str, Path], tmp_path: Path, family: str) -> None:
    small = {"n_layer": 1, "n_head": 3} if family == "gpt2" else TINY | {"tie_word_embeddings": True}
    models = {name: make_model(family, seed, **small) for seed, name in enumerate(("anchor", "other"))}
    paths = [str(save(model, tmp_path / name)) for name, model in models.items()]
    for path in paths:
        WORDS.save_pretrained(path)
    out = tmp_path / "learned.safetensors"
    given = ("--data", pair["texts"], "-o", out, "--steps", 3, "--residual-rounds", 2, "--residual", "rotation")
    refused = command(*paths, *given)
    assert refused.exit_code != 0
    assert "untie: true" in refused.output
    done = command(*paths, *given, "--untie", "--quiet")
    assert done.exit_code == 0, done.output
    assert AlignmentFile.open(out).settings_of("residual")["untie"] is True
    listed = {"model": paths[1], "parameters": {"alignment": str(out)}}
    merged(merge_config("rotation_match", paths[0], [listed], parameters={"untie": True}), tmp_path / "moved")
    moved = type(models["other"]).from_pretrained(tmp_path / "moved", dtype=torch.float32)
    assert not moved.config.tie_word_embeddings
    assert relative_deviation(logits(models["other"]), logits(moved)) < 1e-3


def test_heads_that_must_stay_tied_are_refused(pair: dict[str, Path], tmp_path: Path) -> None:
    roberta = save(make_model("roberta", 0, num_hidden_layers=1), tmp_path / "roberta")
    WORDS.save_pretrained(roberta)
    _refused(
        roberta, roberta, "--data", pair["texts"], "--untie", says="more is tied than the matrix", output=tmp_path / "x"
    )


def test_a_tied_and_an_untied_model_need_untie(pair: dict[str, Path], tmp_path: Path) -> None:
    tied = save(make_model("llama", 3, **TINY, tie_word_embeddings=True), tmp_path / "tied")
    WORDS.save_pretrained(tied)
    for models in ((tied, pair["model"]), (pair["anchor"], tied)):
        given = (*models, "--data", pair["texts"], "-o", tmp_path / "learned.safetensors", "--steps", 2, "--quiet")
        _refused(*given, says="its embedding, and the other model has a head of its own", output=tmp_path / "x")
        done = command(*given, "--untie", "--residual-rounds", 1)
        assert done.exit_code == 0, done.output
        (tmp_path / "learned.safetensors").unlink()


def test_a_masked_token_is_a_loss_too(pair: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = word_tokenizer(97)
    tokenizer.add_special_tokens({"mask_token": "w96"})
    paths = [save(make_model("roberta", seed, num_hidden_layers=1), tmp_path / f"roberta-{seed}") for seed in (0, 1)]
    for path in paths:
        tokenizer.save_pretrained(path)
    out = tmp_path / "out.safetensors"
    done = command(*paths, "--data", pair["texts"], "-o", out, "--steps", 2, "--permutations")
    assert done.exit_code == 0, done.output
    assert "layer 0 attention" in AlignmentFile.open(out).blocks


def test_memory_that_cannot_be_had_is_refused(
    pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn_inputs, "free_memory", lambda device: 10_000)
    _refused(
        pair["anchor"],
        pair["model"],
        "--data",
        pair["texts"],
        "--device",
        "cpu",
        says="models and merged weights alone take",
        output=tmp_path / "out.safetensors",
    )
