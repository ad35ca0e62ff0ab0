"""barrier: the curves are those of interpolated models, a planted twin has no barrier once aligned, refusals."""

from __future__ import annotations

import errno
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from matplotlib.figure import Figure
from models import make_model, perturbed, planted_twin, save, with_weights, word_tokenizer

from mergekit_symalign.cli import main
from mergekit_symalign.commands.barrier import Curve

WORDS = word_tokenizer(97)


def command(*args: Any) -> Result:
    return CliRunner().invoke(main, ["barrier", *map(str, args)])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model and a twin of its near sibling, both with tokenizers, and a text that the model itself would write."""
    folder = tmp_path_factory.mktemp("pair")
    model = make_model("llama", 0)
    sibling = perturbed(model, 0.02, 1)
    twin = planted_twin(sibling)
    paths = {name: save(m, folder / name) for name, m in (("a", model), ("sibling", sibling), ("twin", twin))}
    for path in paths.values():
        WORDS.save_pretrained(path)
    start = torch.arange(3, 13).unsqueeze(1)
    texts = model.float().generate(start, max_length=24, do_sample=False, pad_token_id=0, eos_token_id=None)
    (folder / "text.txt").write_text(
        "\n".join(" ".join(f"w{max(3, i)}" for i in row) for row in texts.tolist()), "utf-8"
    )
    return paths | {"text": folder / "text.txt"}


def _rows(output: str) -> list[list[float]]:
    return [[float(x) for x in line.split()] for line in output.splitlines() if line.strip()[:1].isdigit()]


def test_aligned_twin_has_the_curve_of_its_original(pair: dict[str, Path], tmp_path: Path) -> None:
    plot = tmp_path / "curve.svg"
    done = command(pair["a"], pair["twin"], "--text", pair["text"], "--points", 5, "--plot", plot)
    assert done.exit_code == 0, done.output
    assert all(len(line) <= 80 for line in done.output.splitlines() if not line.startswith("wrote"))
    rows = _rows(done.output)
    assert [row[0] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    original = _rows(command(pair["a"], pair["sibling"], "--text", pair["text"], "--points", 5, "--quiet").output)
    for (_, _, aligned), (_, plain, again) in zip(rows, original, strict=True):
        assert aligned == pytest.approx(plain, abs=0.01)
        assert again == pytest.approx(plain, abs=0.01)
    assert rows[2][1] > rows[2][2] + 1  # half way to the twin as it is
    assert rows[-1][1] == pytest.approx(rows[-1][2], abs=2e-4)  # the same function at the end
    drawn = plot.read_text("utf-8")
    assert drawn.count("<path") > 10
    assert "matplotlib" in drawn


def test_losses_are_those_of_interpolated_models(pair: dict[str, Path]) -> None:
    """Against transformers' own loss of a model that is interpolated here."""
    from transformers import LlamaForCausalLM

    rows = _rows(command(pair["a"], pair["twin"], "--text", pair["text"], "--points", 3).output)
    a, b = (LlamaForCausalLM.from_pretrained(pair[name], dtype=torch.float32) for name in ("a", "twin"))
    b_state = b.state_dict()
    half = with_weights(a, {name: (x + b_state[name]) / 2 for name, x in a.state_dict().items()})
    for row, model in ((rows[0], a), (rows[1], half), (rows[2], b)):
        ids = [WORDS(line, return_tensors="pt")["input_ids"] for line in pair["text"].read_text("utf-8").splitlines()]
        with torch.no_grad():
            losses = [float(model(x, labels=x).loss) for x in ids]
        assert row[1] == pytest.approx(sum(losses) / len(losses), abs=2e-4)


def test_height_of_a_barrier() -> None:
    at = (0.0, 0.25, 0.5, 0.75, 1.0)
    assert Curve("", at, (1.0, 2.0, 5.0, 3.0, 2.0)).height == pytest.approx(3.5)
    assert Curve("", at, (1.0, 1.0, 1.0, 1.0, 2.0)).height == pytest.approx(0.0)


def test_help_has_an_example() -> None:
    for name in ("verify", "barrier"):
        done = CliRunner().invoke(main, [name, "--help"])
        assert done.exit_code == 0
        assert f"Example: mergekit-symalign {name}" in done.output


def test_a_full_disk_leaves_no_half_picture(
    pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Figure, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Figure, "savefig", full)
    plot = tmp_path / "curve.png"
    done = command(pair["a"], pair["sibling"], "--text", pair["text"], "--points", 2, "--plot", plot)
    assert done.exit_code == 1
    assert "No space left on device" in done.output
    assert not plot.exists()


def test_bad_input_is_exit_code_2(pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, twin, text = pair["a"], pair["twin"], ["--text", pair["text"]]
    bert, bare = (save(make_model(f, 0), tmp_path / f) for f in ("bert", "llama"))
    other = save(make_model("llama", 0), tmp_path / "other")
    word_tokenizer(90).save_pretrained(other)
    cases = [
        ([a, tmp_path / "absent", *text], "it cannot be opened"),
        ([a, bert, *text], "differ in architecture"),
        ([bert, bert, *text], "does not predict the next token"),
        ([a, bare, *text], "tokenizer cannot be loaded"),
        ([a, other, *text], "different tokens"),
        ([a, twin, "--text", tmp_path / "absent.txt"], "cannot be read"),
        ([a, twin], "Missing option"),
        ([a, twin, *text, "--points", 1], "--points"),
        ([a, twin, *text, "--plot", tmp_path / "curve.gif"], ".png, .svg, .pdf"),
        ([a, twin, *text, "--plot", tmp_path / "nowhere" / "curve.png"], "directory does not exist"),
    ]
    for args, message in cases:
        done = command(*args)
        assert done.exit_code == 2, (args, done.output)
        assert message in " ".join(done.output.split()), done.output
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    done = command(tmp_path / "absent", tmp_path / "absent", *text, "--plot", tmp_path / "curve.png")
    assert done.exit_code == 2
    assert "pip install 'mergekit-symalign[plots]'" in done.output
