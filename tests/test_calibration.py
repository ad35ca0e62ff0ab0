"""Prompts: what is read, what bounds it, and what is refused before any work."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from conftest import merge_config, merged
from models import make_model, perturbed, save, word_tokenizer
from transformers import ViTImageProcessorPil

from mergekit_symalign.activations.calibration import BATCH_TOKENS, calibrate, read_prompts
from mergekit_symalign.activations.defaults import DEFAULT_PROMPTS
from mergekit_symalign.errors import CalibrationError, ConfigError, ParameterError
from mergekit_symalign.graph import streaming

WORDS = word_tokenizer(97)


def _file(folder: Path, *lines: str, name: str = "prompts.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(lines), "utf-8")
    return path


def test_forms_of_prompts(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "w5"}]
    lines = [json.dumps(x) for x in ({"text": "w3 w4"}, {"prompt": "w6"}, {"messages": messages})]
    assert read_prompts(_file(tmp_path, lines[0], "", *lines[1:])) == ["w3 w4", "w6", messages]
    assert read_prompts(_file(tmp_path, "w3", "", "w4 w5", name="p.txt")) == ["w3", "w4 w5"]


def test_messages_go_through_the_anchors_template(tmp_path: Path) -> None:
    path = _file(tmp_path, json.dumps({"messages": [{"role": "user", "content": "w5"}]}))
    with pytest.raises(CalibrationError, match="chat template"):
        calibrate(path, WORDS, {})
    anchor = word_tokenizer(97)
    anchor.chat_template = "{% for m in messages %}w9 {{ m['content'] }}{% endfor %} w8"
    assert calibrate(path, anchor, {"model": WORDS}).sequences == ((9, 5, 8),)


def test_tokens_and_lengths_are_bounded(tmp_path: Path) -> None:
    path = _file(tmp_path, *(json.dumps({"text": " ".join(["w7"] * n)}) for n in (5, 30, 10, 10)))
    found = calibrate(path, WORDS, {}, tokens=22, length=8)
    assert [len(s) for s in found.sequences] == [5, 8, 8, 1]
    assert found.tokens == 22
    assert calibrate(path, WORDS, {}).tokens == 55
    with pytest.raises(CalibrationError, match="calibration_tokens: it is 0"):
        calibrate(path, WORDS, {}, tokens=0)


def test_batches_hold_every_token_once(tmp_path: Path) -> None:
    lengths = [1 + (i * 37) % 90 for i in range(200)]
    path = _file(tmp_path, *(json.dumps({"text": " ".join([f"w{3 + i % 90}"] * n)}) for i, n in enumerate(lengths)))
    found = calibrate(path, WORDS, {})
    batches = list(found.batches())
    assert len(batches) > 1
    assert all(batch.ids.numel() <= BATCH_TOKENS for batch in batches)
    rows = [tuple(i[v].tolist()) for b in batches for i, v in zip(b.ids, b.valid, strict=True)]
    assert sorted(rows) == sorted(found.sequences)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("p.csv", "w3", "neither .jsonl nor .txt"),
        ("p.jsonl", "", "holds no prompt"),
        ("p.jsonl", '{"text": "w3"}\nnot json', "line 2: it is not JSON"),
        ("p.jsonl", '{"question": "w3"}', "line 1: it has no text, prompt or messages"),
        ("p.jsonl", '{"text": " "}', "no tokens"),
    ],
)
def test_unusable_files(name: str, content: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=reason):
        calibrate(_file(tmp_path, content, name=name), WORDS, {})
    with pytest.raises(CalibrationError, match="cannot be read"):
        calibrate(tmp_path / "absent.txt", WORDS, {})


def test_other_tokens_are_refused_with_the_first_prompt_that_differs(tmp_path: Path) -> None:
    path = _file(tmp_path, '{"text": "w3 w4"}', '{"text": "w4 w95 w7"}', '{"text": "w96"}')
    with pytest.raises(CalibrationError, match=r"prompt 2: .*other turn it .*from token 1 on \[95, 7\].*'w4 w95 w7'"):
        calibrate(path, WORDS, {"same": WORDS, "other": word_tokenizer(90)})


def test_the_default_set() -> None:
    lines = [json.loads(line) for line in DEFAULT_PROMPTS.read_text("utf-8").splitlines()]
    assert len({line["prompt"] for line in lines}) == len(lines) >= 64
    kinds = [line["kind"] for line in lines]
    assert {kind for kind in kinds if kinds.count(kind) >= 16} == {"mathematics", "code", "reading", "instructions"}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    anchor = make_model("llama", 0)
    paths = [save(anchor, folder / "anchor"), save(perturbed(anchor, 0.1, 1), folder / "model")]
    for path in paths:
        WORDS.save_pretrained(path)
    return paths


def _merge(paths: list[Path], out: Path, **parameters: Any) -> dict[str, torch.Tensor]:
    settings = {"objective": "activations"} | parameters
    return merged(merge_config("rotation_match", paths[0], [paths[1]], parameters=settings), out)


def test_refused_before_any_work(paths: list[Path], tmp_path: Path) -> None:
    prompts = _file(tmp_path, '{"text": "w3 w4"}')
    out = tmp_path / "out"
    with pytest.raises(CalibrationError, match="none are given"):
        _merge(paths, out)
    halves = [{"filter": "layers.1", "value": str(prompts)}, {"value": "other.txt"}]
    with pytest.raises(ParameterError, match="whole model"):
        _merge(paths, out, calibration=halves)
    with pytest.raises(ParameterError, match="cannot be 'outputs'"):
        _merge(paths, out, calibration=str(prompts), objective="outputs")
    bare = [save(make_model("llama", i), tmp_path / f"bare{i}") for i in range(2)]
    with pytest.raises(CalibrationError, match="tokenizer cannot be loaded"):
        _merge(bare, out, calibration=str(prompts))
    large = [save(make_model("llama", i), tmp_path / f"large{i}") for i in range(2)]
    for path in large:
        word_tokenizer(200).save_pretrained(path)
    with pytest.raises(CalibrationError, match=r"token 150, but model\.embed_tokens\.weight has only 97 rows"):
        _merge(large, out, calibration=str(_file(tmp_path, '{"text": "w150"}', name="large.jsonl")))
    assert not out.exists()


def test_slices_that_skip_layers_are_refused(paths: list[Path], tmp_path: Path) -> None:
    prompts = _file(tmp_path, '{"text": "w3 w4"}')
    sources = [{"model": str(path), "layer_range": [1, 3], "parameters": {"weight": 1.0}} for path in paths]
    config = {
        "merge_method": "rotation_match",
        "base_model": str(paths[0]),
        "slices": [{"sources": sources}],
        "parameters": {"objective": "activations", "calibration": str(prompts)},
    }
    with pytest.raises(ConfigError, match="need all layers below"):
        merged(config, tmp_path / "out")


def test_few_tokens_warn_and_stay_finite(paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the prompts show nothing, the weights decide: near the weights' own alignment, and never a NaN."""
    prompts = _file(tmp_path, '{"text": "w3 w4 w5"}')
    said: list[str] = []  # not caplog: commands that other tests run in this process change the logging
    monkeypatch.setattr(streaming.LOG, "warning", lambda text, *args: said.append(text % args))
    out = _merge(paths, tmp_path / "out", calibration=str(prompts), neuron_scaling=True)
    assert any("only 3 tokens, fewer than the models' hidden size of 48" in text for text in said)
    assert all(torch.isfinite(x).all() for x in out.values())


def test_a_consensus_takes_neither_prompts_nor_files(paths: list[Path], tmp_path: Path) -> None:
    prompts = _file(tmp_path, '{"text": "w3 w4"}')
    with pytest.raises(ConfigError, match="consensus compares weights, but objective is activations"):
        _merge(paths, tmp_path / "out", calibration=str(prompts), anchor="consensus")


@pytest.mark.parametrize(("calibration", "message"), [("default", "reads images"), ("p.jsonl", "not a folder")])
def test_models_that_read_no_text_need_a_folder_of_images(calibration: str, message: str, tmp_path: Path) -> None:
    models = [save(make_model("vit", i), tmp_path / str(i)) for i in range(2)]
    for model in models:
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(model)
    with pytest.raises(CalibrationError, match=message):
        _merge(models, tmp_path / "out", calibration=calibration)


class HubRows:
    """What `load_dataset(..., streaming=True)` gives, for rows of the data sets' published columns."""

    COLUMNS: ClassVar[dict[tuple[str, str | None, str], dict[str, Any]]] = {
        ("cais/mmlu", "all", "validation"): {
            "question": "Which is even?", "subject": "mathematics", "choices": ["1", "2", "3", "5"], "answer": 1,
        },
        ("ucinlp/drop", None, "validation"): {
            "section_id": "nfl_1", "query_id": "q", "passage": "Two teams met.", "question": "How many teams met?",
            "answers_spans": {"spans": ["2"], "types": ["number"]},
        },
        ("nlile/hendrycks-MATH-benchmark", None, "train"): {
            "problem": "Find $x$.", "solution": "", "answer": "1", "subject": "Algebra", "level": 2, "unique_id": "a",
        },
        ("openai/gsm8k", "main", "train"): {"question": "How many apples?", "answer": "#### 3"},
        ("allenai/tulu-3-sft-personas-code", None, "train"): {
            "id": "p", "prompt": "Sort a list.", "messages": [
                {"role": "user", "content": "Sort a list."}, {"role": "assistant", "content": "sorted(x)"},
            ],
        },
        ("allenai/WildChat", None, "train"): {
            "conversation_id": "c", "model": "gpt-4", "language": "English", "toxic": False, "redacted": False,
            "conversation": [
                {"role": "user", "content": "Hello?", "language": "English", "toxic": False, "redacted": False},
                {"role": "assistant", "content": "Hello.", "language": "English", "toxic": False, "redacted": False},
            ],
        },
    }  # fmt: skip

    def __init__(self, path: str, name: str | None = None, *, split: str, streaming: bool) -> None:
        assert streaming
        self.row = self.COLUMNS[path, name, split]

    def shuffle(self, *, seed: int, buffer_size: int) -> list[dict[str, Any]]:
        toxic = [self.row | {"toxic": True}, self.row | {"language": "French"}] if "language" in self.row else []
        return [*toxic, self.row, self.row, self.row]


def test_the_mixture_script_on_rows_like_those_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=HubRows))
    script, out = (
        Path(__file__).parents[1] / "examples" / "calibration" / "build_mixture.py",
        tmp_path / "mixture.jsonl",
    )

    def run(each: int) -> None:
        monkeypatch.setattr(sys, "argv", [str(script), "--out", str(out), "--each", str(each)])
        runpy.run_path(str(script), run_name="__main__")

    with pytest.raises(SystemExit):
        run(4)
    assert "cais/mmlu has only 3 prompts: give --each 3 at most" in capsys.readouterr().err
    assert not out.exists()
    run(2)
    found = [prompt[0] for prompt in read_prompts(out)]
    assert all(message["role"] == "user" for message in found)
    six = ["Which is even?\nA. 1\nB. 2\nC. 3\nD. 5", "Two teams met.\n\nHow many teams met?", "Find $x$."]
    assert [message["content"] for message in found] == 2 * [*six, "How many apples?", "Sort a list.", "Hello?"]
