"""``compare --tasks`` with the real LM Evaluation Harness, where it is installed (`pip install '.[eval]'`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from models import make_model, perturbed, save, word_tokenizer
from transformers import AutoModelForCausalLM

from mergekit_symalign.cli import main

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: eval)")
QUESTIONS = 12


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two models, and a task: which of two words follows."""
    monkeypatch.chdir(tmp_path)
    model = make_model("llama", 0)
    found = [save(m, tmp_path / name) for name, m in (("a", model), ("b", perturbed(model, 0.5, 1)))]
    for folder in found:
        word_tokenizer(97).save_pretrained(folder)
    questions = [
        {"question": f"w{i} w{i + 7} w{2 * i}", "choices": [f"w{3 * i}", f"w{90 - i}"], "label": i % 2}
        for i in range(3, 3 + QUESTIONS)
    ]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "q.json").write_text("\n".join(map(json.dumps, questions)), "utf-8")
    task = {
        "task": "next_word", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "tasks" / "q.json")}},
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "tasks" / "next_word.yaml").write_text(yaml.safe_dump(task), "utf-8")
    return found


def command(*args: Any) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, args), "--task-search-path", "tasks", "--quiet"])


def _accuracy(folder: Path) -> float:
    """The share of questions whose right word the model finds likelier."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    right = 0
    for line in Path("tasks/q.json").read_text("utf-8").splitlines():
        question = json.loads(line)
        ids = word_tokenizer(97)(question["question"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = loaded(input_ids=ids).logits[0, -1]
        scores = [float(logits[int(word[1:])]) for word in question["choices"]]
        right += scores.index(max(scores)) == question["label"]
    return right / QUESTIONS


def test_a_task_is_a_column(folders: list[Path]) -> None:
    done = command(*folders, "--tasks", "next_word", "--json", "n.json", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    told = json.loads(Path("n.json").read_text("utf-8"))
    assert told["columns"] == [{"name": "next_word", "unit": "acc", "higher_is_better": True}]
    for row, folder in zip(told["rows"], folders, strict=True):
        share = _accuracy(folder)
        assert row["measured"]["next_word"]["value"] == pytest.approx(share)
        error = (share * (1 - share) / (QUESTIONS - 1)) ** 0.5
        assert row["measured"]["next_word"]["standard_error"] == pytest.approx(error)
    assert command(*folders, "--tasks", "next_word", "--dtype", "float32").stdout == done.stdout
    limited = command(*folders, "--tasks", "next_word", "--limit", 4, "--json", "n.json")
    assert limited.exit_code == 0
    scores = [row["measured"]["next_word"]["value"] for row in json.loads(Path("n.json").read_text("utf-8"))["rows"]]
    assert all(4 * score == int(4 * score) for score in scores)


def test_a_task_that_is_not_there_is_refused(folders: list[Path]) -> None:
    done = command(*folders, "--tasks", "next_word,nothing_such")
    assert done.exit_code == 2
    assert "lm-eval has no task nothing_such" in done.output
    assert not Path("symalign-compare").exists()
