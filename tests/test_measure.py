"""`mergekit-symalign measure`: files by the real command, refusals before any work, and runs that are killed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import OFFLINE
from models import make_model, save, word_tokenizer
from PIL import Image
from processes import run_command
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from mergekit_symalign.cli import main
from mergekit_symalign.commands import measure as command
from mergekit_symalign.commands.sizes import Size, human
from mergekit_symalign.errors import StatisticsFileError
from mergekit_symalign.graph import readers
from mergekit_symalign.statistics.file import StatisticsFile
from mergekit_symalign.statistics.places import index_path

MODELS = {"llama": {}, "bert-classifier": {}, "roberta": {}, "bert": {}, "mixtral": {}, "gpt2": {}}
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def _tokenizers_as_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """For some model types transformers puts a class of its own around any tokenizer file, and reads no words."""
    monkeypatch.setattr(readers, "AutoTokenizer", PreTrainedTokenizerFast)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with tokenizers, labelled texts, and labelled images."""
    out = tmp_path_factory.mktemp("measure")
    for family in MODELS:
        save(make_model(family, 0), out / family)
        tokenizer = word_tokenizer(97)
        tokenizer.add_special_tokens({"mask_token": "w3"})
        tokenizer.save_pretrained(out / family)
    for family in ("vit", "vit-classifier"):
        save(make_model(family, 0), out / family)
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(out / family)
    lines = [{"text": " ".join(f"w{4 + (7 * i + j * j) % 90}" for j in range(4 + i)), "label": i % 2} for i in range(8)]
    (out / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    _images(out / "images")
    return out


def _images(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for label in range(3):
        (folder / f"LABEL_{label}").mkdir(parents=True)
        for i in range(2):
            pixels = torch.randint(256, (20, 24, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"LABEL_{label}" / f"{i}.png")


def _measure(folder: Path, model: str, out: Path, *options: str, calibration: str = "texts.jsonl") -> Result:
    path = calibration if calibration == "default" else str(folder / calibration)
    arguments = ["measure", str(folder / model), "-o", str(out), "--calibration", path, *options]
    return CliRunner().invoke(main, arguments)


def _file(folder: Path, model: str, out: Path, *options: str, calibration: str = "texts.jsonl") -> StatisticsFile:
    done = _measure(folder, model, out, *options, calibration=calibration)
    assert done.exit_code == 0, done.output
    return StatisticsFile.open(out)


def test_the_real_command_says_the_size_and_writes_the_file(folder: Path, tmp_path: Path) -> None:
    arguments = ["measure", folder / "llama", "-o", "out.safetensors", "--calibration", folder / "texts.jsonl"]
    done = run_command("mergekit-symalign", *arguments, "--fisher", "empirical", cwd=tmp_path, env=OFFLINE)
    assert done.returncode == 0, done.stderr
    size, wrote = done.stdout.splitlines()
    assert size == "out.safetensors: 580 kB (gram 252 kB, mean 3.46 kB, fisher 324 kB)"
    assert wrote == "wrote out.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]
    assert 580_000 < (tmp_path / "out.safetensors").stat().st_size < 620_000
    file = StatisticsFile.open(tmp_path / "out.safetensors")
    assert file.measured.sequences == 8
    assert all(torch.isfinite(file.read(name, kind)).all() for name in file.names for kind in file.kinds(name))


def test_the_file_says_what_it_is_of(folder: Path, tmp_path: Path) -> None:
    options = ("--tokens", "30", "--sequence-length", "6", "--seed", "3")
    file = _file(folder, "llama", tmp_path / "a.safetensors", *options)
    assert (file.measured.tokens, file.measured.sequences, file.measured.sequence_length) == (30, 6, 6)
    assert (file.measured.gram, file.measured.fisher, file.measured.seed) == ("full", "none", 3)
    assert file.measured.loss == pytest.approx(4, abs=4)
    assert file.origin.family == "llama"
    assert file.origin.sizes["layers"] == 3
    assert file.origin.versions.keys() == {"mergekit_symalign", "mergekit", "torch", "transformers"}
    assert file.kinds(Q) == {"gram", "mean"}
    assert file.shape(Q, "gram") == (48, 48)
    assert file.tokens(Q) == 30
    again = _file(folder, "llama", tmp_path / "b.safetensors", *options)
    assert again.origin == file.origin
    assert again.measured == file.measured
    assert torch.equal(file.read(Q, "gram"), again.read(Q, "gram"))


def test_the_tokenizer_is_known_by_what_it_does(folder: Path, tmp_path: Path) -> None:
    one, other = (_file(folder, m, tmp_path / f"{m}.safetensors") for m in ("llama", "gpt2"))
    assert one.origin.tokenizer == other.origin.tokenizer
    changed = tmp_path / "llama"
    shutil.copytree(folder / "llama", changed)
    word_tokenizer(97, "the").save_pretrained(changed)
    assert _file(folder, str(changed), tmp_path / "c.safetensors").origin.fingerprint == one.origin.fingerprint


@pytest.mark.parametrize("fisher", ["empirical", "sampled", "hard", "kronecker"])
def test_every_kind_of_fisher(folder: Path, tmp_path: Path, fisher: str) -> None:
    file = _file(folder, "mixtral", tmp_path / "a.safetensors", "--fisher", fisher)
    experts = "model.layers.1.mlp.experts.gate_up_proj"
    if fisher == "kronecker":
        assert file.kinds(experts) == {"gram", "mean", "gradient_gram"}
        assert file.kinds("model.norm.weight") == file.kinds("model.embed_tokens.weight") == {"fisher"}
        assert file.kinds("lm_head.weight") == {"gram", "mean", "fisher"}  # a factor would be vocabulary x vocabulary
    else:
        assert file.shape(experts, "fisher") == (4, 160, 48)
        assert all("fisher" in file.kinds(name) for name in file.names)
    assert file.measured.loss is not None
    assert len(file.tokens(experts)) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize("gram", ["full", "diagonal", "none"])
def test_every_kind_of_gram(folder: Path, tmp_path: Path, gram: str) -> None:
    fisher = "empirical" if gram == "none" else "none"
    file = _file(folder, "llama", tmp_path / "a.safetensors", "--gram", gram, "--fisher", fisher)
    assert file.kinds(Q) == ({"fisher"} if gram == "none" else {"gram", "mean"})
    assert gram == "none" or file.shape(Q, "gram") == ((48, 48) if gram == "full" else (48,))


def test_shards_and_only(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    file = _file(folder, "llama", out, "--shard-size", "30kB", "--only", r"layers\.(0|2)\.mlp")
    assert index_path(out).exists()
    assert not out.exists()
    assert set(file.names) == {f"model.layers.{i}.mlp.{n}_proj.weight" for i in (0, 2) for n in ("gate", "up", "down")}
    assert file.measured.only == r"layers\.(0|2)\.mlp"


def test_the_packages_prompts(folder: Path, tmp_path: Path) -> None:
    file = _file(folder, "llama", tmp_path / "a.safetensors", "--tokens", "300", calibration="default")
    assert file.measured.tokens == 300


def test_labels_of_texts_by_number_and_by_name(folder: Path, tmp_path: Path) -> None:
    options = ("--labels", "--fisher", "empirical")
    one = _file(folder, "bert-classifier", tmp_path / "a.safetensors", *options)
    lines = [json.loads(line) for line in (folder / "texts.jsonl").read_text("utf-8").splitlines()]
    named = tmp_path / "named.jsonl"
    named.write_text("\n".join(json.dumps(line | {"label": f"LABEL_{line['label']}"}) for line in lines), "utf-8")
    other = _file(folder, "bert-classifier", tmp_path / "b.safetensors", *options, calibration=str(named))
    assert one.measured.labels
    assert one.measured.loss == other.measured.loss
    name = "classifier.weight"
    assert one.kinds(name) == {"gram", "mean", "fisher"}
    assert one.tokens(name) == one.measured.sequences == 8
    assert torch.equal(one.read(name, "fisher"), other.read(name, "fisher"))
    flipped = tmp_path / "flipped.jsonl"
    flipped.write_text("\n".join(json.dumps(line | {"label": 1 - line["label"]}) for line in lines), "utf-8")
    third = _file(folder, "bert-classifier", tmp_path / "c.safetensors", *options, calibration=str(flipped))
    assert third.measured.loss != one.measured.loss


def test_labels_of_words(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "tokens"
    shutil.copytree(folder / "bert-classifier", model)
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["BertForTokenClassification"]}), "utf-8")
    tensors = load_file(model / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if "pooler" not in name}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    texts = tmp_path / "words.jsonl"
    texts.write_text(json.dumps({"text": "w5 w6 w7", "label": [0, 1, "LABEL_1"]}), "utf-8")
    file = _file(folder, str(model), tmp_path / "a.safetensors", "--labels", "--fisher", "hard", calibration=str(texts))
    assert file.tokens("classifier.weight") == 3
    texts.write_text(json.dumps({"text": "w5 w6 w7", "label": [0, 1]}), "utf-8")
    done = _measure(folder, str(model), tmp_path / "b.safetensors", "--labels", calibration=str(texts))
    assert "its label is not a list of 3" in done.output


def test_hidden_tokens_of_a_masked_model(folder: Path, tmp_path: Path) -> None:
    file = _file(folder, "roberta", tmp_path / "a.safetensors", "--fisher", "empirical")
    assert file.measured.loss is not None
    assert file.measured.loss > 1
    plain = _file(folder, "roberta", tmp_path / "b.safetensors")
    assert plain.measured.loss is None


def test_a_model_without_a_head_has_gram_matrices(folder: Path, tmp_path: Path) -> None:
    file = _file(folder, "bert", tmp_path / "a.safetensors")
    assert file.tokens("pooler.dense.weight") == 8
    assert file.measured.loss is None


def test_images_and_their_labels(folder: Path, tmp_path: Path) -> None:
    options = ("--labels", "--fisher", "empirical")
    one = _file(folder, "vit-classifier", tmp_path / "a.safetensors", *options, calibration="images")
    assert (one.measured.sequences, one.measured.tokens) == (6, 6 * 17)
    assert one.tokens("classifier.weight") == 6
    table = [{"file": f"LABEL_{i}/{j}.png", "label": i} for i in range(3) for j in range(2)]
    named = tmp_path / "named"
    shutil.copytree(folder / "images", named)
    (named / "labels.jsonl").write_text("\n".join(map(json.dumps, table)), "utf-8")
    other = _file(folder, "vit-classifier", tmp_path / "b.safetensors", *options, calibration=str(named))
    assert other.measured == one.measured
    (named / "labels.jsonl").write_text("\n".join(map(json.dumps, table[1:])), "utf-8")
    done = _measure(folder, "vit-classifier", tmp_path / "c.safetensors", *options, calibration=str(named))
    assert "0.png: labels.jsonl has no label of it" in done.output


def test_images_without_labels(folder: Path, tmp_path: Path) -> None:
    file = _file(folder, "vit", tmp_path / "a.safetensors", "--tokens", "40", calibration="images")
    assert file.measured.sequences == 2
    assert file.measured.loss is None


# Refused before any work


def _nan(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it began to measure")

    monkeypatch.setattr(command, "sum_inputs", refuse)
    monkeypatch.setattr(command, "FisherPass", refuse)


REFUSED: list[tuple[str, tuple[str, ...], str, int, str]] = [
    ("llama", ("--gram", "none"), "texts.jsonl", 2, "there is nothing to measure"),
    ("llama", ("--gram", "none", "--fisher", "kronecker"), "texts.jsonl", 2, "one of the two factors of kronecker"),
    ("llama", ("--only", "["), "texts.jsonl", 2, "it is no regular expression"),
    ("llama", ("--only", "encoder"), "texts.jsonl", 2, "it matches no tensor of"),
    ("llama", ("--labels",), "texts.jsonl", 2, "which the calibration itself holds"),
    ("llama", (), "nothing.jsonl", 2, "it cannot be read"),
    ("llama", (), "images", 2, "neither .jsonl nor .txt"),
    ("llama", ("--fisher", "empirical", "--sequence-length", "1"), "texts.jsonl", 2, "too short to predict anything"),
    ("bert-classifier", ("--fisher", "empirical"), "texts.jsonl", 2, "predicts labels, and none are given"),
    ("bert", ("--fisher", "empirical"), "texts.jsonl", 2, "has no head that predicts anything"),
    ("bert", ("--labels",), "texts.jsonl", 2, "has no head that predicts anything"),
    ("vit", (), "default", 2, "reads images"),
    ("vit", (), "texts.jsonl", 2, "it is not a folder, and the model reads images"),
    ("nowhere", (), "texts.jsonl", 2, "it cannot be opened"),
    ("llama", ("--device", "nowhere"), "texts.jsonl", 2, "it cannot be used"),
    ("llama", ("--shard-size", "much"), "texts.jsonl", 2, "is no size"),
    ("llama", ("--shard-size", "0"), "texts.jsonl", 2, "at least 1 byte"),
]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("model", "options", "calibration", "code", "message"), REFUSED)
def test_what_cannot_be_measured_is_refused(
    folder: Path, tmp_path: Path, model: str, options: tuple[str, ...], calibration: str, code: int, message: str
) -> None:
    done = _measure(folder, model, tmp_path / "out.safetensors", *options, calibration=calibration)
    assert (done.exit_code, message in done.output) == (code, True), done.output
    assert "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "w5 w6"}, "line 1: it has no label"),
        ({"text": "w5 w6", "label": 7}, "the model has no label '7'"),
        ({"text": "w5 w6", "label": "good"}, "Its labels are LABEL_0 (0), LABEL_1 (1)"),
        ({"text": "w5 w6", "label": True}, "the model has no label 'True'"),
        ({"label": 1}, "line 1: it has no text"),
    ],
)
def test_labels_that_the_model_does_not_have(folder: Path, tmp_path: Path, line: Any, message: str) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps(line), "utf-8")
    done = _measure(folder, "bert-classifier", tmp_path / "o.safetensors", "--labels", calibration=str(texts))
    assert done.exit_code == 2
    assert message in done.output
    assert list(tmp_path.iterdir()) == [texts]


@pytest.mark.usefixtures("no_work")
def test_nan_in_the_last_layer_is_found_before_the_first_is_measured(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "llama"
    shutil.copytree(folder / "llama", model)
    _nan(model)
    done = _measure(folder, str(model), tmp_path / "out.safetensors")
    assert done.exit_code == 1
    assert "tensor model.layers.2.mlp.down_proj.weight" in done.output
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.usefixtures("no_work")
def test_outputs_that_cannot_be_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    weights = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(1)}, weights)
    before = weights.read_bytes()
    for out, message in (
        (tmp_path / "file" / "out.safetensors", "it cannot be written"),
        (weights, "a file is there that holds no statistics"),
        (tmp_path / "out.bin", "does not end in .safetensors"),
    ):
        done = _measure(folder, "llama", out)
        assert (done.exit_code, message in done.output) == (2, True), done.output
    assert weights.read_bytes() == before
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 10**5))
    done = _measure(folder, "llama", tmp_path / "out.safetensors")
    assert done.exit_code == 2
    assert "255 kB of statistics need 511 kB while they are written; the disk has 100 kB" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model.safetensors"]


def test_images_need_pillow(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    done = _measure(folder, "vit", tmp_path / "out.safetensors", calibration="images")
    assert done.exit_code == 2
    assert "pip install pillow" in done.output


# Killed


def _start(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    arguments = [
        str(folder / "llama"),
        "-o",
        str(out),
        "--calibration",
        str(folder / "texts.jsonl"),
        "--fisher",
        "hard",
    ]
    slow = (
        "import sys, time, mergekit_symalign.statistics.writer as w; put = w.StatisticsWriter.put\n"
        "w.StatisticsWriter.put = lambda *a: (put(*a), time.sleep(30 * a[2][0].startswith('model.layers.1')))\n"
        "from mergekit_symalign.cli import main; main(sys.argv[1:])"
    )
    return subprocess.Popen([sys.executable, "-c", slow, "measure", *arguments], env=OFFLINE)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_run_leaves_no_file_and_the_next_one_cleans_up(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    process = _start(folder, out)
    _wait(lambda: any(tmp_path.glob(".out.safetensors.parts/0")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    with pytest.raises(StatisticsFileError):
        StatisticsFile.open(out)
    assert _file(folder, "llama", out).measured.fisher == "none"
    assert list(tmp_path.iterdir()) == [out]


def _wait(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("5gb", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2 << 30), ("70", 70)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


def test_sizes_are_written() -> None:
    assert [human(n) for n in (12, 4_000, 26_300_000_000)] == ["12 bytes", "4 kB", "26.3 GB"]
