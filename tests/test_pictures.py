"""Pictures and tables name models as a model card would: no absolute and no temporary paths."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from models import make_model, save, word_tokenizer

from mergekit_symalign.cli import main
from mergekit_symalign.commands.names import in_a_table, short_names

FIGURES = Path(__file__).parents[1] / "docs" / "figures"


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("gpt2", "gpt2"),
        ("HuggingFaceTB/SmolLM2-135M@main", "HuggingFaceTB/SmolLM2-135M@main"),
        ("meta-llama/Llama-3.1-8B+org/adapter", "meta-llama/Llama-3.1-8B+org/adapter"),
        ("./models/tuned", "tuned"),
        ("./tuned/", "tuned"),
        ("models/tuned", "tuned"),  # a folder that is there
        ("{tmp}/models/tuned@v2", "tuned@v2"),
        ("{tmp}/models/../models/tuned+{tmp}/lora", "tuned+lora"),
        ("/nowhere/ütf 8", "ütf 8"),
        ("{tmp}/hub/models--org--name/snapshots/0123abc", "org/name"),
    ],
)
def test_short_names(reference: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tuned").mkdir(parents=True)
    full = reference.format(tmp=tmp_path)
    assert short_names([full]) == [name]
    assert in_a_table(full) == (name if "{tmp}" in reference else reference)


def test_names_that_are_the_same_get_the_folder_around_them() -> None:
    assert short_names(["/a/x", "/b/x"]) == ["a/x", "b/x"]
    assert short_names(["/a/x", "/b/y"]) == ["x", "y"]


def test_pictures_do_not_show_where_models_lie(tmp_path: Path) -> None:
    paths = [save(make_model("llama", seed), tmp_path / name) for seed, name in enumerate(("first", "$second$"))]
    for path in paths:
        word_tokenizer(97).save_pretrained(path)
    (tmp_path / "text.txt").write_text("w3 w4 w5\n", "utf-8")
    for command, more in (
        ("inspect", ["--layers", "0"]),
        ("barrier", ["--text", tmp_path / "text.txt", "--points", 2]),
    ):
        for suffix in ("svg", "pdf") if command == "inspect" else ("svg",):
            picture = tmp_path / f"{command}.{suffix}"
            args = [command, *paths, *more, "--plot", picture]
            done = CliRunner().invoke(main, [str(arg) for arg in args])
            assert done.exit_code == 0, done.output
            assert str(tmp_path.parent).encode() not in picture.read_bytes()
        drawn = (tmp_path / f"{command}.svg").read_text("utf-8")  # its texts are paths; each stands in a comment too
        comments = "".join(part.partition("-->")[0] for part in drawn.split("<!--")[1:])
        assert "first" in comments
        assert "second" in comments
        assert tmp_path.name not in comments


def test_figures_of_the_documents_hold_no_paths() -> None:
    """As far as their metadata go; what they show is looked at when they are drawn."""
    for figure in FIGURES.glob("*.png"):
        content = figure.read_bytes()
        assert not [path for path in (b"/tmp", b"/home", b"/work", b"/root", b"C:\\") if path in content], figure
