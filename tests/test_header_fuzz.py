"""safetensors headers and indexes from strangers: refused by name, or read as safetensors reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_edits import brief_refusals, copied
from fuzz.headers import sweep
from models import make_model, save

MAIN, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model("llama", 0, num_hidden_layers=1), tmp_path_factory.mktemp("sound") / "anchor")


def test_mutated_headers() -> None:
    found = sweep(300, seed=18)
    assert found["tried"] == 300
    assert found["other"] == 0
    assert found["refused"] > 200
    assert found["exact"] > 30


def _entries(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """The header of a model's only file, changed as JSON."""

    def apply(file: Path) -> None:
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        text = json.dumps(change(header) or header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return apply


NORM = "model.norm.weight"
HEADERS: dict[str, Callable[[Path], None]] = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-1000]) and None,
    "empty": lambda file: file.write_bytes(b"") and None,
    "a size of 640 GB": lambda file: (
        file.write_bytes((640 * 10**9).to_bytes(8, "little") + file.read_bytes()[8:]) and None
    ),
    "a list": _entries(lambda header: [header]),
    "a text as an entry": _entries(lambda header: header.update({NORM: "x"})),
    "no data_offsets": _entries(lambda header: header[NORM].pop("data_offsets") and None),
    "no dtype": _entries(lambda header: header[NORM].pop("dtype") and None),
    "another shape": _entries(lambda header: header[NORM].update(shape=[10**9, 640])),
    "a negative length": _entries(lambda header: header[NORM].update(shape=[-48])),
    "offsets behind the end": _entries(lambda header: header[NORM].update(data_offsets=[0, 10**12])),
    "an unknown dtype": _entries(lambda header: header[NORM].update(dtype="Q4_K")),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_damaged_file_is_named_by_merges_and_commands(sound: Path, tmp_path: Path, case: str) -> None:
    other = copied(sound, tmp_path / "other")
    HEADERS[case](other / MAIN)
    for who, output in brief_refusals(sound, other, tmp_path).items():
        assert str(other / MAIN) in output, (who, output)
        assert "Download the file again" in output, (who, output)


INDEXES: dict[str, tuple[Any, str]] = {
    "a list": ([], "not a JSON object"),
    "no weight_map": ({"metadata": {}}, "weight_map"),
    "a list as weight_map": ({"weight_map": ["a"]}, "weight_map"),
    "numbers as files": ({"weight_map": {"a": 1}}, "weight_map"),
    "an empty weight_map": ({"weight_map": {}}, "weight_map"),
    "a file that is missing": ({"weight_map": {"a": "model-1.safetensors"}}, "model-1.safetensors"),
    "a file outside": ({"weight_map": {"a": "../anchor/model.safetensors"}}, "not a file of this directory"),
    "an absolute path": ({"weight_map": {"a": "/etc/hostname"}}, "not a file of this directory"),
    "a drive": ({"weight_map": {"a": "C:\\x.safetensors"}}, "not a file of this directory"),
    "no safetensors file": ({"weight_map": {"a": "config.json"}}, "not a safetensors file"),
    "a tensor that is elsewhere": ({"weight_map": {"a": MAIN}}, "lacks tensor 'a'"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_wrong_index_is_named_by_merges_and_commands(sound: Path, tmp_path: Path, case: str) -> None:
    content, expected = INDEXES[case]
    other = copied(sound, tmp_path / "other")
    (other / INDEX).write_text(json.dumps(content), "utf-8")
    for who, output in brief_refusals(sound, other, tmp_path).items():
        assert str(other) in output, (who, output)
        assert expected in output, (who, output)


@pytest.mark.parametrize(
    "text", ["NaN", '{"weight_map": {"a": "b", "a": "b"}}', "[" * 50000, "\xff", '{"weight_map": {']
)
def test_an_index_that_is_no_json(sound: Path, tmp_path: Path, text: str) -> None:
    other = copied(sound, tmp_path / "other")
    (other / INDEX).write_bytes(text.encode("latin-1"))
    for who, output in brief_refusals(sound, other, tmp_path).items():
        assert str(other / INDEX) in output, (who, output)
