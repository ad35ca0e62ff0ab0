"""Names of tensors: whatever transformers reads is read by merges and commands alike."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_edits import command_output, copied, edited, merge_output
from conftest import State, load, merge_config, merged
from mergekit.options import MergeOptions
from models import FAMILIES, logits, make_model, relative_deviation, save, word_tokenizer
from packaging.version import Version
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from mergekit_symalign.commands.models import StoredModel


def _without_prefix(prefix: str) -> Callable[[State], State]:
    return lambda state: {name.removeprefix(f"{prefix}."): x for name, x in state.items()}


def _with_prefix(prefix: str) -> Callable[[State], State]:
    return lambda state: {f"{prefix}.{name}": x for name, x in state.items()}


def _gpt2_of_the_hub(state: State) -> State:
    buffers = {f"h.0.attn.{name}": torch.ones(1, 1, 4, 4) for name in ("bias", "masked_bias")}
    return _without_prefix("transformer")(state) | buffers


def _old_norms(state: State) -> State:
    ends = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    return {_with_other_end(name, *ends): x for name, x in state.items()}


def _with_other_end(name: str, *ends: tuple[str, str]) -> str:
    return next((name.removesuffix(old) + new for old, new in ends if name.endswith(old)), name)


def _only_the_head_of_tied(state: State) -> State:
    return state | {"lm_head.weight": state.pop("model.embed_tokens.weight")}


def _roberta_of_the_hub(state: State) -> State:
    words = state["roberta.embeddings.word_embeddings.weight"]
    return state | {
        "roberta.embeddings.position_ids": torch.arange(128)[None],
        "roberta.pooler.dense.weight": torch.ones(48, 48),
        "roberta.pooler.dense.bias": torch.ones(48),
        "lm_head.decoder.weight": words.clone(),
        "lm_head.decoder.bias": state["lm_head.bias"].clone(),
    }


OLDER: dict[str, tuple[str, Callable[[State], State]]] = {
    "GPT-2 as on the hub": ("gpt2", _gpt2_of_the_hub),
    "Llama without its prefix": ("llama", _without_prefix("model")),
    "tied embeddings under the head's name": ("llama-tied", _only_the_head_of_tied),
    "BERT with gamma and beta, and a prefix": ("bert", lambda state: _with_prefix("bert")(_old_norms(state))),
    "a BERT classifier with gamma and beta": ("bert-classifier", _old_norms),
    "RoBERTa as on the hub": ("roberta", _roberta_of_the_hub),
    "GPT-NeoX with transformers' name of the head": (
        "gpt-neox",
        lambda state: state | {"lm_head.weight": state.pop("embed_out.weight")},
    ),
}


@pytest.mark.parametrize("case", OLDER)
def test_merges_and_commands_read_older_names(tmp_path: Path, case: str) -> None:
    family, rename = OLDER[case]
    depth = {"n_layer" if family == "gpt2" else "num_hidden_layers": 1}
    models = [make_model(family, i, **depth) for i in range(2)]
    a, b = (save(model, tmp_path / str(i)) for i, model in enumerate(models))
    older = edited(b, tmp_path / "older", rename)
    _require_that_transformers_reads(older, models[1].float())

    expected = merged(merge_config("rotation_match", a, [b]), tmp_path / "expected")
    out = merged(merge_config("rotation_match", a, [older]), tmp_path / "out")
    assert all(x.equal(out[name]) for name, x in expected.items())
    assert _computes_the_same(tmp_path / "out", models[1]), "a tied tensor that is stored twice is written twice"

    alignment, applied = tmp_path / "a.safetensors", tmp_path / "applied"
    command_output("verify", b, older, "--random", "--quiet", code=(0,))
    command_output("solve", a, older, "-o", alignment, "--quiet", code=(0,))
    command_output("apply", alignment, older, "-o", applied, "--quiet", code=(0,))
    assert load(applied).keys() == load(older).keys()
    assert _computes_the_same(applied, models[1])


def _require_that_transformers_reads(path: Path, model: PreTrainedModel) -> None:
    """What transformers does not read itself, we need not read either. The newest one reads all that is tried here."""
    if not _computes_the_same(path, model):
        assert AN_OLDER_TRANSFORMERS, "transformers reads it, so this test is about us"
        pytest.skip("this version of transformers does not read these names")


def _computes_the_same(path: Path, model: PreTrainedModel) -> bool:
    loaded = type(model).from_pretrained(path, dtype=torch.float64)
    return relative_deviation(logits(model.double()), logits(loaded.eval())) < 1e-4


AN_OLDER_TRANSFORMERS = Version(transformers.__version__) < Version("5.24")
IN_PIECES = ("mixtral", "qwen3-moe", "olmoe")  # MergeKit joins experts only under their own names
ONE_OF_A_CLASS = {class_name: family for family, (class_name, _) in FAMILIES.items() if family not in IN_PIECES}


@pytest.mark.parametrize("family", ONE_OF_A_CLASS.values())
def test_every_family_with_and_without_the_prefix_of_its_base_model(tmp_path: Path, family: str) -> None:
    """The one table of names is transformers' own."""
    model = make_model(family, 0)
    path = save(model, tmp_path / "m")
    prefix = model.base_model_prefix
    has_prefix = any(name.startswith(f"{prefix}.") for name in load(path))
    other = edited(path, tmp_path / "other", (_without_prefix if has_prefix else _with_prefix)(prefix))
    assert load(other).keys() != load(path).keys()
    if AN_OLDER_TRANSFORMERS:
        _require_that_transformers_reads(other, model.float())
    options = MergeOptions()
    one, two = StoredModel.open(str(path), options), StoredModel.open(str(other), options)
    for mine, theirs in ((one.outside(), two.outside()), (one.layer(2), two.layer(2))):
        assert mine.keys() == theirs.keys()
        assert all(x.equal(theirs[name]) for name, x in mine.items())


def test_barrier_and_activations_of_gpt2_as_on_the_hub(tmp_path: Path) -> None:
    paths = [save(make_model("gpt2", i, n_layer=1), tmp_path / str(i)) for i in range(2)]
    older = edited(paths[1], tmp_path / "older", _gpt2_of_the_hub)
    for path in (*paths, older):
        word_tokenizer(97).save_pretrained(path)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(f"w{(7 * i + j) % 90 + 3}" for j in range(30)) for i in range(9)), "utf-8")
    tables = [
        command_output("barrier", paths[0], path, "--text", text, "--points", 3, "--quiet", code=(0,)).replace(
            str(path), ""
        )
        for path in (paths[1], older)
    ]
    assert tables[0].split() == tables[1].split()
    config = {"parameters": {"objective": "activations", "calibration": str(text)}}
    expected, out = (
        merged(merge_config("rotation_match", paths[0], [path], **config), tmp_path / f"{path.name}-out")
        for path in (paths[1], older)
    )
    assert all(x.equal(out[name]) for name, x in expected.items())


@pytest.mark.parametrize("family", ["llama-tied", "cohere", "modernbert", "deberta-v3"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_tied_tensor_that_only_one_model_stores(tmp_path: Path, family: str, which: int) -> None:
    """PyTorch's own files always have both. The other model's share is the tensor that its own is tied to."""
    models = [make_model(family, i) for i in range(2)]
    paths = [save(model, tmp_path / str(i)) for i, model in enumerate(models)]
    tied = {str(source): str(target) for target, source in models[0].all_tied_weights_keys.items()}
    twice = list(paths)

    def copies(state: State) -> State:
        return state | {tied[name]: x.clone() for name, x in state.items() if name in tied}

    twice[which] = edited(paths[which], tmp_path / "twice", copies)
    assert load(twice[which]).keys() > load(paths[which]).keys()
    states = [
        merged(merge_config("aligned_linear", a, [a, b], parameters={"weight": 0.5}), tmp_path / f"out-{i}")
        for i, (a, b) in enumerate((paths, twice))
    ]
    loaded = [type(models[0]).from_pretrained(tmp_path / f"out-{i}", dtype=torch.float64).eval() for i in range(2)]
    assert all(x.equal(states[1][name]) for name, x in states[0].items())
    assert relative_deviation(*map(logits, loaded)) < 1e-9


@pytest.mark.parametrize("which", [0, 1])
def test_verify_sees_a_head_that_is_tied_by_the_config_only(tmp_path: Path, which: int) -> None:
    """transformers does not tie what is stored twice with different numbers."""
    model = make_model("llama-tied", 0, num_hidden_layers=1)
    paths = [save(model, tmp_path / str(i)) for i in range(2)]
    head = torch.randn(97, 48, generator=torch.Generator().manual_seed(0))
    other = edited(paths[which], tmp_path / "other", lambda s: s | {"lm_head.weight": head})
    same = edited(other, tmp_path / "same", lambda s: s)
    pair = (other, paths[0]) if which == 0 else (paths[0], other)
    assert not _computes_the_same(other, model)
    assert "NOT the same function" in command_output("verify", *pair, "--random", "--quiet", code=(1,))
    command_output("verify", other, same, "--random", "--quiet", code=(0,))


def test_a_tied_tensor_with_other_numbers_is_not_lost(tmp_path: Path) -> None:
    """transformers does not tie it then, and the model computes with it."""
    paths = [save(make_model("roberta", i), tmp_path / str(i)) for i in range(2)]
    other = edited(paths[1], tmp_path / "m", lambda state: state | {"lm_head.decoder.bias": torch.ones(97)})
    message = merge_output(paths[0], other, tmp_path / "out")
    assert "lm_head.decoder.bias" in message
    assert "silently drop" in message


def test_a_tensor_under_two_names_is_read_if_they_agree(tmp_path: Path) -> None:
    paths = [save(make_model("gpt2", i), tmp_path / str(i)) for i in range(2)]
    name = "h.0.mlp.c_fc.bias"
    same = edited(paths[1], tmp_path / "same", lambda s: s | {name: s[f"transformer.{name}"].clone()})
    other = edited(paths[1], tmp_path / "other", lambda s: s | {name: torch.ones(80)})
    merged(merge_config("rotation_match", paths[0], [same]), tmp_path / "out")
    assert f"tensor {name}" in merge_output(paths[0], other, tmp_path / "none")


def test_a_tensor_that_the_index_does_not_name(tmp_path: Path) -> None:
    """transformers reads whatever is in the files, MergeKit what the index names."""
    paths = [save(make_model("llama", i, num_hidden_layers=1), tmp_path / str(i)) for i in range(2)]
    other = copied(paths[1], tmp_path / "m")
    names = [name for name in load(other) if name != "lm_head.weight"]
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (other / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    assert "lm_head.weight" in merge_output(paths[0], other, tmp_path / "out")


def test_a_model_without_the_head_that_its_checkpoint_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = BertConfig(vocab_size=31, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    base = transformers.BertModel(config)
    paths = []
    for i in range(2):
        torch.manual_seed(i)
        model = BertForMaskedLM(config)
        state = model.state_dict() | {f"bert.pooler.{n}": x for n, x in base.pooler.state_dict().items()}
        paths.append(tmp_path / str(i))
        model.save_pretrained(paths[-1], state_dict=state)
    models = [{"model": {"model": str(path), "override_architecture": "BertModel"}} for path in paths]
    merge = {
        "merge_method": "rotation_match",
        "base_model": models[0]["model"],
        "models": models[1:],
        "dtype": "float32",
    }
    with caplog.at_level(logging.WARNING):
        out = merged(merge, tmp_path / "out")
    assert not any(name.startswith("cls.") for name in out)
    assert "cls.predictions" in caplog.text
