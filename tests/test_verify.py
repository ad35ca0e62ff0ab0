"""verify: exact alignments pass in every family, everything else fails, and bad input is refused with exit code 2."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import load, merge_config, merged
from mergekit.options import MergeOptions
from models import FAMILIES, make_model, save, with_weights, word_tokenizer
from safetensors.torch import save_file
from transformers import PreTrainedModel

from mergekit_symalign.activations.agreement import Agreement
from mergekit_symalign.cli import main
from mergekit_symalign.commands.models import StoredModel
from mergekit_symalign.commands.verify import Verdict, run_verify
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import random_elements, transform

OPTIONS = MergeOptions(quiet=True)
# Soft caps, logit scales, tied embeddings, windows, layers that differ, tuples, experts, images, heads for classes.
COMPARED = ["llama", "llama-tied", "gemma2", "granite", "cohere-qk-norm", "modernbert", "deberta-v3", "gpt-neox"]
COMPARED += ["roberta", "mixtral", "vit-classifier", "bert"]


def command(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def _twin(model: PreTrainedModel, seed: int = 3) -> PreTrainedModel:
    layout = resolve(model.config, model="m")
    return with_weights(model, transform(model.state_dict(), layout, random_elements(layout, seed)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("llama")
    model = make_model("llama", 0)
    paths = {"original": save(model, folder / "original"), "twin": save(_twin(model), folder / "twin")}
    for path in paths.values():
        word_tokenizer(97).save_pretrained(path)
    (folder / "prompts.txt").write_text(
        "\n".join(" ".join(f"w{3 + (7 * i + j) % 94}" for j in range(20)) for i in range(9)), "utf-8"
    )
    return paths | {"prompts": folder / "prompts.txt"}


@pytest.mark.parametrize("family", COMPARED)
def test_the_numbers_are_those_of_the_whole_models(family: str, tmp_path: Path) -> None:
    """Against plain forwards of transformers, for a twin and for a model that differs a little."""
    model = make_model(family, 0)
    other = _twin(model)
    with torch.no_grad():
        dict(other.named_parameters())[_last_weight(other)][0, 0] += 0.5
    paths = [save(m, tmp_path / name) for m, name in ((model, "a"), (_twin(model), "b"), (other, "c"))]
    assert run_verify(str(paths[0]), str(paths[1]), OPTIONS, random=True, tokens=100).same
    found = run_verify(str(paths[0]), str(paths[2]), OPTIONS, random=True, tokens=100)
    assert not found.same
    assert found.left == model.config.num_hidden_layers - 1
    load = {"dtype": torch.float32, "attn_implementation": "eager"}  # others may lack soft caps
    a, c = (_outputs(type(model).from_pretrained(paths[i], **load), paths[0]) for i in (0, 2))
    assert found.agreement.std == pytest.approx(float(a.double().std(correction=0)), rel=1e-5)
    assert found.deviation == found.agreement.largest / found.agreement.std
    assert found.agreement.largest == pytest.approx(float((a - c).abs().max()), rel=1e-3)


def _last_weight(model: PreTrainedModel) -> str:
    layout = resolve(model.config, model="m")
    last = [n for n, x in model.named_parameters() if x.ndim == 2 and (c := layout.claim(n)) and c.layer is not None]
    return next(n for n in reversed(last) if layout.claim(n).layer == layout.layers - 1)  # type: ignore[union-attr]


@torch.no_grad()
def _outputs(model: PreTrainedModel, path: Path) -> torch.Tensor:
    from mergekit_symalign.commands.inputs import inputs_for

    rows = []
    for batch in inputs_for(StoredModel.open(str(path), OPTIONS), None, 100, OPTIONS, random=True):
        inputs = batch.inputs()
        for i in range(len(batch.valid)):
            valid = batch.valid[i]
            one = {k: x[i : i + 1] for k, x in inputs.items() if isinstance(x, torch.Tensor)}
            if "input_ids" in one:
                one = {"input_ids": one["input_ids"][:, valid]}
            out = model.eval()(**one)[0]
            rows.append(out.flatten(0, -2))
    return torch.cat(rows)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(COMPARED)))
def test_exact_alignments_pass_in_every_family(family: str, tmp_path: Path) -> None:
    model = make_model(family, 0)
    paths = [save(m, tmp_path / name) for m, name in ((model, "a"), (_twin(model), "b"))]
    found = run_verify(*map(str, paths), OPTIONS, random=True, tokens=64)
    assert found.same
    assert found.left is None
    assert found.agreement.largest > 0  # other weights, other rounding


def test_aligned_by_a_merge_passes_and_rotation_full_fails(llama: dict[str, Path], tmp_path: Path) -> None:
    save(make_model("llama", 5), tmp_path / "anchor")
    codes = {}
    for rotation in ("exact", "none", "full"):
        parameters = {"rotation": rotation, "neuron_scaling": rotation == "exact"}
        merged(
            merge_config("rotation_match", tmp_path / "anchor", [llama["original"]], parameters=parameters),
            tmp_path / rotation,
        )
        done = command("verify", llama["original"], tmp_path / rotation, "--prompts", llama["prompts"])
        codes[rotation] = done.exit_code
        if rotation == "full":
            assert "NOT the same function" in done.output
            assert "from layer 0 on" in done.output
        assert max(map(len, done.output.splitlines())) <= 80
    assert codes == {"exact": 0, "none": 0, "full": 1}


def test_damaged_checkpoints_fail(llama: dict[str, Path], tmp_path: Path) -> None:
    state = load(llama["twin"])
    name = "model.layers.1.mlp.up_proj.weight"
    damages = {
        "swapped": {name: state[name].flip(0)},
        "nan": {name: torch.full_like(state[name], torch.nan)},
        "short": {name: state[name][:-1]},
        "head": {"lm_head.weight": state["lm_head.weight"] * 1.01},
    }
    expected = {"swapped": "from layer 1 on", "nan": "NaN", "short": "its shape is", "head": "after all 3 layers"}
    for kind, changed in damages.items():
        out = tmp_path / kind
        shutil.copytree(llama["twin"], out)
        save_file(state | changed, out / "model.safetensors", {"format": "pt"})
        done = command("verify", llama["original"], out)
        assert done.exit_code == 1, done.output
        assert expected[kind] in done.output
    (tmp_path / "head" / "model.safetensors").write_bytes((llama["twin"] / "model.safetensors").read_bytes()[:-50])
    assert command("verify", llama["original"], tmp_path / "head").exit_code == 1
    save_file({k: x for k, x in state.items() if k != name}, tmp_path / "short" / "model.safetensors", {"format": "pt"})
    missing = command("verify", llama["original"], tmp_path / "short")
    assert missing.exit_code == 1
    assert f"tensor {name} of model" in missing.output


def test_tolerance_decides(llama: dict[str, Path]) -> None:
    strict = command("verify", llama["original"], llama["twin"], "--tolerance", 1e-9, "--quiet")
    assert strict.exit_code == 1
    assert strict.output.startswith("NOT the same function")
    assert len(strict.output.splitlines()) == 1
    assert command("verify", llama["original"], llama["twin"], "--quiet").exit_code == 0


def test_rounding_to_the_stored_dtype_is_tolerated(llama: dict[str, Path], tmp_path: Path) -> None:
    anchor = save(make_model("llama", 5), tmp_path / "anchor")
    config = merge_config("rotation_match", anchor, [llama["original"]]) | {"dtype": "bfloat16"}
    merged(config, tmp_path / "out")
    done = command("verify", llama["original"], tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "tolerance 0.16" in done.output
    assert command("verify", llama["original"], tmp_path / "out", "--tolerance", 1e-3).exit_code == 1
    assert command("verify", llama["original"], anchor).exit_code == 1


def test_bad_input_is_exit_code_2(llama: dict[str, Path], tmp_path: Path) -> None:
    original, twin = llama["original"], llama["twin"]
    gemma, vit, bare = (save(make_model(f, 0), tmp_path / f) for f in ("gemma2", "vit", "llama"))
    (tmp_path / "empty.txt").write_text("", "utf-8")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    cases = [
        ([original, tmp_path / "absent"], "it cannot be opened"),
        ([original, gemma], "differ in architecture"),
        ([original, save(make_model("llama", 0, num_hidden_layers=2), tmp_path / "two")], "layers 3 != 2"),
        ([bare, twin], "tokenizer cannot be loaded"),
        ([vit, vit], "--random"),
        ([original, twin, "--prompts", tmp_path / "absent.txt"], "cannot be read"),
        ([original, twin, "--prompts", tmp_path / "bad.txt"], "cannot be read"),
        ([original, twin, "--prompts", tmp_path / "empty.txt"], "holds no prompt"),
        ([original, twin, "--prompts", llama["prompts"], "--random"], "not both"),
        ([original], "Missing argument"),
    ]
    for args, message in cases:
        done = command("verify", *args)
        assert done.exit_code == 2, (args, done.output)
        assert message in " ".join(done.output.split()), done.output
        assert "Traceback" not in done.output


def test_agreement_of_known_numbers() -> None:
    """KL divergence against torch's own, medians and shares of numbers written down."""
    a = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0]])
    b = a + torch.tensor([[0.0, 0.1, -0.3], [-3.0, 0.2, 0.0]])
    found = Agreement()
    found.add(a[:1], b[:1])
    found.add(a[1:], b[1:])
    assert found.largest == pytest.approx(3.0)
    assert found.median == pytest.approx(0.1)
    assert found.std == pytest.approx(float(a.std(correction=0)))
    assert (found.same_first, found.tokens) == (1, 2)
    kl = torch.nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum")
    assert found.divergence == pytest.approx(float(kl), rel=1e-5)
    found.add(torch.tensor([[torch.nan, 0.0, 0.0]]), a[:1])
    assert not Verdict(found, 1, None, 0.0, 1.0).same
