"""Prompts end where a line ends, and nowhere else: other separators belong to the texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergekit_symalign.activations.calibration import read_prompts
from mergekit_symalign.errors import CalibrationError

SEPARATORS = "\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e"
TEXTS = ["first", *(f"be{separator}hind" for separator in SEPARATORS), "a\tb", "ä\u2028\u0085", "last"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_texts_keep_their_separators(end: str, mark: str, tmp_path: Path) -> None:
    lines = {
        ".txt": TEXTS,
        ".jsonl": [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS],
    }
    for suffix, of_file in lines.items():
        for last in ("", end, end + end):
            file = tmp_path / f"prompts{suffix}"
            file.write_bytes((mark + end.join(of_file) + last).encode())
            assert read_prompts(file) == TEXTS


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"text": "a\u2028b"}\n\n{"text": 3}\n', "utf-8")
    with pytest.raises(CalibrationError, match="line 3"):
        read_prompts(file)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"text": "a"', "NaN", '"text"'])
def test_what_is_no_prompt_is_named(content: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content, "utf-8")
    with pytest.raises(CalibrationError, match="line 1"):
        read_prompts(file)
