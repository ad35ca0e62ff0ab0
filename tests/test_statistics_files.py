"""Files of statistics: what is written is read back, in one file or in shards, and damage is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_symalign.errors import ConfigError, OtherStatisticsError, StatisticsFileError
from mergekit_symalign.sealed.tensors import bytes_digest
from mergekit_symalign.sealed.text import digest
from mergekit_symalign.statistics.file import Measured, Origin, StatisticsFile, write_statistics
from mergekit_symalign.statistics.places import index_path
from mergekit_symalign.statistics.schema import ENTRY, MOST_TEXT
from mergekit_symalign.statistics.writer import parts_folder, require_statistics_or_nothing, writing

ORIGIN = Origin(model="m", fingerprint="f" * 64, family="llama", sizes={"layers": 2, "hidden": 4}, tokenizer="t" * 64)
MEASURED = Measured(tokens=100, sequences=5, sequence_length=32, calibration="c" * 64)
Q, K, EXPERTS, NORM = "layers.0.q.weight", "layers.0.k.weight", "layers.0.experts.up", "norm.weight"


def _gram(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, 20, generator=torch.Generator().manual_seed(seed))
    return x @ x.mT


def _statistics() -> dict[str, dict[str, Tensor]]:
    shared, mean = _gram(4), torch.randn(4)
    return {
        Q: {"gram": shared, "mean": mean, "fisher": torch.rand(6, 4), "gradient_gram": _gram(6, seed=1)},
        K: {"gram": shared, "mean": mean},
        EXPERTS: {"gram": _gram(3, 4, seed=2), "mean": torch.randn(3, 4)},
        NORM: {"fisher": torch.rand(4)},
    }


TOKENS: dict[str, Any] = {Q: 100, K: 100, EXPERTS: (10, 0, 90), NORM: 100}


@pytest.fixture(params=["one file", "shards"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    size = 10**9 if request.param == "one file" else 200
    out = tmp_path / "stats.safetensors"
    write_statistics(out, ORIGIN, MEASURED, _statistics(), TOKENS, shard_size=size)
    return out


def _shards(path: Path) -> list[Path]:
    return sorted(path.parent.glob("*-of-*.safetensors"))


def _numbers(path: Path, stored: str) -> Path:
    """The file in which a tensor lies."""
    return StatisticsFile.open(path).places[stored]


def test_what_is_written_is_read_back(path: Path) -> None:
    file, expected = StatisticsFile.open(path), _statistics()
    assert (file.origin, file.measured) == (ORIGIN, MEASURED)
    assert set(file.names) == set(expected)
    for name, kinds in expected.items():
        assert file.kinds(name) == kinds.keys()
        assert file.tokens(name) == TOKENS[name]
        assert all(file.shape(name, kind) == x.shape for kind, x in kinds.items())
    torch.testing.assert_close(file.read(K, "gram"), _gram(4), rtol=0, atol=0)
    torch.testing.assert_close(file.read(EXPERTS, "gram"), _gram(3, 4, seed=2), rtol=0, atol=0)


def test_inputs_that_tensors_share_are_stored_once(path: Path) -> None:
    file = StatisticsFile.open(path)
    assert file.stored(Q, "gram") == file.stored(K, "gram")
    assert len(file.content.tensors) == 7


def test_the_index_opens_too_and_shards_are_not_larger_than_asked(tmp_path: Path) -> None:
    out = tmp_path / "stats.safetensors"
    written = write_statistics(out, ORIGIN, MEASURED, _statistics(), TOKENS, shard_size=200)
    assert written[0] == index_path(out)
    assert written[1:] == _shards(out)
    assert not out.exists()
    assert StatisticsFile.open(index_path(out)).sha256 == StatisticsFile.open(out).sha256
    for shard in _shards(out):
        assert len(load_file(shard)) == 1 or sum(x.numel() * 4 for x in load_file(shard).values()) <= 200


def test_nothing_is_left_beside_it(path: Path) -> None:
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_a_new_file_replaces_the_shards_of_an_old_one(tmp_path: Path) -> None:
    out = tmp_path / "stats.safetensors"
    for size in (200, 400, 10**9, 200):
        written = write_statistics(out, ORIGIN, MEASURED, _statistics(), TOKENS, shard_size=size)
        assert sorted(tmp_path.iterdir()) == sorted(written)


def test_a_killed_run_leaves_nothing_that_opens_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    out = tmp_path / "stats.safetensors"
    left = parts_folder(out)
    left.mkdir()
    (left / "0").write_bytes(b"half")
    with pytest.raises(KeyboardInterrupt):
        _interrupted(out)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OtherStatisticsError, match="no such file"):
        StatisticsFile.open(out)


def _interrupted(out: Path) -> None:
    with writing(out) as writer:
        writer.put("gram", (Q,), _gram(4))
        raise KeyboardInterrupt


def test_numbers_may_be_read_from_elsewhere_than_where_they_were_written(path: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in [p for p in tmp_path.iterdir() if p.is_file()]:
        file.rename(moved / file.name)
    assert StatisticsFile.open(moved / path.name).read(Q, "fisher").shape == (6, 4)


# Damage, planted in the file and refused by name.


def _text(path: Path) -> dict[str, Any]:
    if path.exists():
        with safe_open(path, framework="pt") as file:
            found = file.metadata()[ENTRY]
    else:
        found = json.loads(index_path(path).read_text("utf-8"))["metadata"][ENTRY]
    return json.loads(found)  # type: ignore[no-any-return]


def _with_text(path: Path, text: str) -> None:
    """Write the file again with another text, and the same numbers."""
    if path.exists():
        save_file(load_file(path), path, metadata={ENTRY: text})
    else:
        index = json.loads(index_path(path).read_text("utf-8"))
        index["metadata"][ENTRY] = text
        index_path(path).write_text(json.dumps(index), "utf-8")


def _resealed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = _text(path)
    change(content)
    _with_text(path, json.dumps(content | {"sha256": digest(content)}))


def _with_numbers(path: Path, stored: str, x: Tensor, *, sealed: bool) -> None:
    """Replace one tensor; with digests that fit, or without."""
    place = _numbers(path, stored)
    with safe_open(place, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(place) | {stored: x}, place, metadata=metadata)
    if sealed:
        described = ["F32" if x.dtype is torch.float32 else "F64", list(x.shape), bytes_digest(x)]
        _resealed(path, lambda content: content["tensors"].update({stored: described}))


def _filled(value: float, *shape: int) -> Tensor:
    x = _gram(*shape[:-1])
    x[..., 0, 0] = value
    return x


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize(("name", "shape"), [(Q, (4, 4)), (EXPERTS, (3, 4, 4))])
def test_values_that_no_measurement_gives(path: Path, name: str, shape: tuple[int, ...], value: float) -> None:
    _with_numbers(path, f"gram {name}", _filled(value, *shape), sealed=True)
    file = StatisticsFile.open(path)
    with pytest.raises(StatisticsFileError, match=f"gram of {name}.*(NaN or infinity|negative)"):
        file.read(name, "gram")


def test_a_matrix_that_is_not_symmetric(path: Path) -> None:
    x = _gram(4)
    x[0, 1] += 1
    _with_numbers(path, f"gram {Q}", x, sealed=True)
    with pytest.raises(StatisticsFileError, match="not symmetric"):
        StatisticsFile.open(path).read(K, "gram")


@pytest.mark.parametrize("kind", ["gram", "mean", "fisher", "gradient_gram"])
def test_changed_numbers(path: Path, kind: str) -> None:
    stored = f"{kind} {Q}"
    with safe_open(_numbers(path, stored), framework="pt") as file:
        x = file.get_tensor(stored)
    _with_numbers(path, stored, x * 1.5, sealed=False)
    with pytest.raises(StatisticsFileError, match=f"{kind} of {Q}: its numbers are damaged"):
        StatisticsFile.open(path).read(Q, kind)


@pytest.mark.parametrize(
    ("stored", "shape"),
    [
        (f"gram {Q}", (4,)),
        (f"gram {Q}", (4, 5)),
        (f"gram {Q}", (0, 0)),
        (f"gram {Q}", (3, 4, 4)),
        (f"gram {EXPERTS}", (4, 4)),
        (f"gram {EXPERTS}", (2, 4, 4)),
        (f"mean {Q}", (4, 4)),
        (f"gradient_gram {Q}", (6,)),
    ],
)
def test_shapes_that_no_measurement_gives(path: Path, stored: str, shape: tuple[int, ...]) -> None:
    _with_numbers(path, stored, torch.ones(shape), sealed=True)
    with pytest.raises(StatisticsFileError, match=f"tensor {stored.split()[1]}: its {stored.split()[0]} has shape"):
        StatisticsFile.open(path)


def test_numbers_of_another_type(path: Path) -> None:
    _with_numbers(path, f"gram {Q}", _gram(4).double(), sealed=True)
    with pytest.raises(StatisticsFileError, match="of type F64"):
        StatisticsFile.open(path)


def test_headers_that_differ_from_the_text(path: Path) -> None:
    _with_numbers(path, f"gram {Q}", torch.ones(5, 5), sealed=False)
    with pytest.raises(StatisticsFileError, match=f"gram {Q} is .*but the text says"):
        StatisticsFile.open(path)


def test_a_changed_text(path: Path) -> None:
    content = _text(path)
    content["measured"]["tokens"] = 7
    _with_text(path, json.dumps(content))
    with pytest.raises(StatisticsFileError, match="differ from what was saved"):
        StatisticsFile.open(path)


def test_a_newer_format(path: Path) -> None:
    _resealed(path, lambda content: content.update(format=2))
    with pytest.raises(StatisticsFileError, match=r"newer than the 1.*Install a newer"):
        StatisticsFile.open(path)


def _drop(content: dict[str, Any], *keys: str) -> None:
    for key in keys[:-1]:
        content = content[key]
    del content[keys[-1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=0), "gives no format"),
        (lambda c: c.update(format=True), "gives no format"),
        (lambda c: c.update(extra=1), "extra"),
        (lambda c: _drop(c, "origin", "fingerprint"), "fingerprint"),
        (lambda c: _drop(c, "tensors", f"gram {Q}"), "is missing|not described"),
        (lambda c: _drop(c, "statistics", EXPERTS), "not used|do not say"),
        (lambda c: _drop(c, "tokens", NORM), "how many tokens"),
        (lambda c: c["measured"].update(gram="half"), "measured.gram"),
        (lambda c: c["measured"].update(gram="diagonal"), "gram has shape"),
        (lambda c: c["measured"].update(tokens=-1), "measured.tokens"),
        (lambda c: c["measured"].update(tokens=2**60), "measured.tokens"),
        (lambda c: c["statistics"][Q].update(median=f"gram {Q}"), "median"),
        (lambda c: c["statistics"][Q].update(fisher="nothing"), "missing|not used"),
        (lambda c: c["origin"].update(model="a\x1b[31mb"), "control characters"),
        (lambda c: c["origin"].update(model="x" * 5000), "origin.model"),
    ],
)
def test_texts_that_no_measurement_gives(path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    _resealed(path, change)
    with pytest.raises(StatisticsFileError, match=message) as caught:
        StatisticsFile.open(path)
    assert path.stem in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested more than"),
        ('{"a":' * 1000 + "1" + "}" * 1000, "nested more than"),
        ('{"format": 1, "format": 2}', "a key is given twice"),
        ('{"format": NaN}', "NaN is not a number"),
        ('{"format": 1' + "0" * 5000 + "}", "."),
        ("[]", "not a JSON object"),
        ("{", "."),
        (json.dumps({"a": "x" * MOST_TEXT}), "more than the"),
    ],
)
def test_texts_that_are_bombs(path: Path, text: str, message: str) -> None:
    _with_text(path, text)
    with pytest.raises(StatisticsFileError, match=message) as caught:
        StatisticsFile.open(path)
    assert len(str(caught.value)) < 1000


def test_a_truncated_file(path: Path) -> None:
    place = _numbers(path, f"gram {Q}")
    os.truncate(place, place.stat().st_size - 8)
    with pytest.raises(StatisticsFileError, match=f"{place.name}.*cannot be read"):
        StatisticsFile.open(path)


def test_a_missing_shard(tmp_path: Path) -> None:
    out = tmp_path / "stats.safetensors"
    write_statistics(out, ORIGIN, MEASURED, _statistics(), TOKENS, shard_size=200)
    gone = _shards(out)[1]
    gone.unlink()
    with pytest.raises(OtherStatisticsError, match=f"{gone.name}.*no such file"):
        StatisticsFile.open(out)


@pytest.mark.parametrize("name", ["../other-00001-of-00002.safetensors", "/etc/passwd", "model.safetensors", 3, None])
def test_an_index_names_its_own_shards_only(tmp_path: Path, name: object) -> None:
    out = tmp_path / "stats.safetensors"
    write_statistics(out, ORIGIN, MEASURED, _statistics(), TOKENS, shard_size=200)
    index = json.loads(index_path(out).read_text("utf-8"))
    index["weight_map"][f"gram {Q}"] = name
    index_path(out).write_text(json.dumps(index), "utf-8")
    with pytest.raises(StatisticsFileError, match="not one of its shards"):
        StatisticsFile.open(out)


def test_files_of_another_kind(tmp_path: Path) -> None:
    other = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(2)}, other)
    with pytest.raises(StatisticsFileError, match="not one of statistics"):
        StatisticsFile.open(other)
    index = tmp_path / "model-2.safetensors.index.json"
    index.write_text('{"weight_map": {}}', "utf-8")
    with pytest.raises(StatisticsFileError, match="an index, but not one of statistics"):
        StatisticsFile.open(index)
    with pytest.raises(ConfigError, match="holds no statistics"):
        require_statistics_or_nothing(other)
    with pytest.raises(ConfigError, match="does not end in"):
        require_statistics_or_nothing(tmp_path / "stats.bin")


def test_what_it_does_not_hold(path: Path) -> None:
    file = StatisticsFile.open(path)
    with pytest.raises(OtherStatisticsError, match=f"no fisher of tensor {K}.*--fisher empirical"):
        file.read(K, "fisher")
    with pytest.raises(OtherStatisticsError, match=r"nothing of tensor lm_head\.weight"):
        file.read("lm_head.weight", "gram")
    assert file.kinds("lm_head.weight") == frozenset()
    with pytest.raises(OtherStatisticsError, match=r"gram of tensor .* is 4 x 4, but the model's tensor needs 5 x 5"):
        file.require_shape(Q, "gram", (5, 5))
    file.require_shape(Q, "gram", (4, 4))


def test_which_model_it_is_of(path: Path) -> None:
    file = StatisticsFile.open(path)
    file.require_model("m", "f" * 64)
    file.require_family("llama", {"layers": 2, "hidden": 4, "more": 1}, "m")
    file.require_tokenizer("m", "t" * 64)
    with pytest.raises(OtherStatisticsError, match="measured on m, but other has other weights"):
        file.require_model("other", "e" * 64)
    with pytest.raises(OtherStatisticsError, match="of family llama, but model other is of family gpt2"):
        file.require_family("gpt2", {"layers": 2, "hidden": 4}, "other")
    with pytest.raises(OtherStatisticsError, match="hidden 4 != 8"):
        file.require_family("llama", {"layers": 2, "hidden": 8}, "other")
    with pytest.raises(OtherStatisticsError, match="another tokenizer than the one of other"):
        file.require_tokenizer("other", "u" * 64)
