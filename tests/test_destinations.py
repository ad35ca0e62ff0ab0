"""Where people ask for output that cannot be written: said before any work, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import merge_config
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from models import make_model, save, word_tokenizer

from mergekit_symalign.cli import main
from mergekit_symalign.errors import ConfigError
from mergekit_symalign.graph.load import LoadFinite
from mergekit_symalign.whole_file import require_writable, require_writable_folder, written_whole


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    paths = tuple(save(make_model("llama", i), folder / f"m{i}") for i in range(2))
    for path in paths:
        word_tokenizer(97).save_pretrained(path)
    return paths[0], paths[1]


@pytest.fixture(scope="module")
def solved(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("solved") / "a.safetensors"
    assert _run("solve", *models, "-o", file, "--quiet").exit_code == 0
    return file


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a single tensor of a model is an error."""

    def execute(self: LoadFinite, **_: Any) -> None:
        raise AssertionError(f"{self.tensor} was read")

    monkeypatch.setattr(LoadFinite, "execute", execute)


def _run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def _files(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def _below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("not a directory", "utf-8")
    return folder / "file" / "out.png"


def _too_long(folder: Path) -> Path:
    return folder / f"{300 * 'x'}.png"


def _folder_too_long(folder: Path) -> Path:
    return folder / (300 * "x") / "out.png"


def _null(folder: Path) -> Path:
    return folder / "out\0.png"


COMPARE = ["compare --json", "compare --plot", "compare --out"]
PLACES = [_below_a_file, _too_long, _folder_too_long]


def _commands(models: tuple[Path, Path], solved: Path, out: Path, text: Path) -> dict[str, tuple[Any, ...]]:
    return {
        "solve": ("solve", *models, "-o", out),
        "apply": ("apply", solved, models[1], "-o", out),
        "inspect --json": ("inspect", *models, "--json", out),
        "inspect --plot": ("inspect", *models, "--plot", out),
        "barrier --plot": ("barrier", *models, "--text", text, "--plot", out),
        "compare --json": ("compare", "--average", *models, "--data", text, "--json", out),
        "compare --plot": ("compare", "--average", *models, "--data", text, "--plot", out),
        "compare --out": ("compare", "--average", *models, "--data", text, "--out", out),
        "demo": ("demo", "--out", out),
    }


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "name", ["solve", "apply", "inspect --json", "inspect --plot", "barrier --plot", *COMPARE, "demo"]
)
@pytest.mark.usefixtures("no_work")
def test_commands_try_the_destination_first(
    name: str, place: Callable[[Path], Path], models: tuple[Path, Path], solved: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("w5 w6 w7\n", "utf-8")
    out = place(tmp_path)
    before = _files(tmp_path)
    done = _run(*_commands(models, solved, out, tmp_path / "text.txt")[name])
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert "Error: " in done.output
    assert _files(tmp_path) == before


@pytest.mark.parametrize("place", [*PLACES, _null])
@pytest.mark.parametrize("what", ["save_alignment", "output"])
@pytest.mark.usefixtures("no_work")
def test_merges_try_the_destination_first(
    what: str, place: Callable[[Path], Path], models: tuple[Path, Path], tmp_path: Path
) -> None:
    wrong = place(tmp_path)
    before = _files(tmp_path)
    config = merge_config("rotation_match", models[0], [models[1]])
    config |= {"parameters": {"save_alignment": str(wrong)}} if what == "save_alignment" else {}
    out = tmp_path / "out" if what == "save_alignment" else wrong
    with pytest.raises((ConfigError, click.ClickException), match=f"{what} .*: it cannot be written"):
        run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(quiet=True))
    assert _files(tmp_path) == before


def test_a_merge_says_so_in_one_line(models: tuple[Path, Path], tmp_path: Path) -> None:
    config = merge_config("rotation_match", models[0], [models[1]], parameters={"save_alignment": str(tmp_path / "a")})
    (tmp_path / "a").write_text("a file", "utf-8")
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config), "utf-8")
    done = _run("yaml", tmp_path / "config.yml", tmp_path / "out", "--quiet")
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert "save_alignment" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_work")
def test_weights_are_never_overwritten_by_an_alignment(models: tuple[Path, Path]) -> None:
    before = _files(models[1])
    done = _run("solve", *models, "-o", models[1] / "model.safetensors")
    assert done.exit_code == 2
    assert "a file is there that is not an alignment" in done.output
    assert _files(models[1]) == before


def test_devices_are_no_destination(tmp_path: Path) -> None:
    device = Path("/dev/null")
    if not device.exists():
        pytest.skip("no such device here")
    with pytest.raises(ConfigError, match="not a regular file"):
        require_writable(device)
    with pytest.raises(ConfigError, match="is a directory"):
        require_writable(tmp_path)


def test_trying_leaves_everything_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("kept", "utf-8")
    require_writable(tmp_path / "there")
    require_writable(tmp_path / "a" / "b" / "c")
    require_writable_folder(tmp_path / "d" / "e")
    longest = tmp_path / (251 * "n" + ".png")  # 255 bytes, as long as a name may be
    require_writable(longest)
    with written_whole(longest) as scratch:
        scratch.write_text("x", "utf-8")
    assert _files(tmp_path) == {"there": b"kept", longest.name: b"x"}
