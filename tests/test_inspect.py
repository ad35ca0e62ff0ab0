"""``mergekit-symalign inspect``: what it says of planted twins and of models with nothing to align."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import OFFLINE, merge_config
from models import make_model, perturbed, save, with_weights
from processes import run_command

from mergekit_symalign.cli import main
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import Planted, random_elements, transform

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    anchor = make_model("llama", 0)
    sibling = perturbed(anchor, 0.1, 1)
    layout = resolve(anchor.config, model="m")
    elements = random_elements(layout, 3, Planted(heads=False))
    twin = with_weights(sibling, transform(sibling.state_dict(), layout, elements))
    models = {"anchor": anchor, "sibling": sibling, "twin": twin, "other": make_model("qwen3", 0)}
    return {name: save(model, folder / name) for name, model in models.items()}


def here(*args: object) -> Result:
    """The same in this process."""
    return CliRunner().invoke(main, ["inspect", *map(str, args)])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def command(*args: object) -> subprocess.CompletedProcess[str]:
        return run_command("mergekit-symalign", "inspect", *args, cwd=tmp_path, env=OFFLINE)

    return command


def test_a_twin_shows_what_was_planted_and_totals_are_those_of_the_merge(
    paths: dict[str, Path], run: Run, mergekit_yaml: Run, tmp_path: Path
) -> None:
    file, picture = tmp_path / "numbers.json", tmp_path / "picture.png"
    done = run(paths["anchor"], paths["twin"], "--json", file, "--plot", picture)
    assert done.returncode == 0, done.stderr
    assert "coordinates differ" in done.stdout
    assert "0 of 6 KV heads, 0 of 18 query heads moved" in done.stdout
    assert "proven optimal: 240 " in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if str(tmp_path.parent) not in line)
    assert "\x1b" not in done.stdout + done.stderr  # no colours
    assert "%|" not in done.stderr  # no bars
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {f.name for f in tmp_path.iterdir()} == {"numbers.json", "picture.png"}  # nothing else is written
    config = merge_config("rotation_match", paths["anchor"], [paths["twin"]], dtype=None)
    merge = mergekit_yaml(config, tmp_path / "out")
    assert merge.returncode == 0, merge.stderr
    merged, inspected = (
        json.loads(f.read_text("utf-8"))["models"] for f in (tmp_path / "out" / "symalign_report.json", file)
    )
    assert merged == inspected


def test_a_sibling_has_nothing_to_align(paths: dict[str, Path]) -> None:
    done = here(paths["anchor"], paths["sibling"], "--layers", "1-2", "--no-neuron-scaling")
    assert done.exit_code == 0, done.output
    assert "nothing to align: matching lowers the distance by 0." in done.stdout
    assert [line.split()[:2] for line in done.stdout.splitlines()[4:8]] == [
        ["1", "attention"], ["1", "mlp"], ["2", "attention"], ["2", "mlp"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("{anchor}", "{other}"), 2, "family"),
        (("{anchor}", "/nowhere/at/all"), 2, "nowhere"),
        (("{anchor}", "{twin}", "--layers", "7-9"), 2, "layers 0 to 2"),
        (("{anchor}", "{twin}", "--layers", "x"), 2, "'x' is neither a layer nor a range"),
        (("{anchor}", "{twin}", "--plot", "picture.bmp"), 2, "must end in one of"),
        (("{anchor}", "{twin}", "--json", "no/such/folder.json"), 2, "its directory does not exist"),
        (("{anchor}",), 2, "Missing argument 'MODEL'"),
    ],
)
def test_wrong_usage(args: tuple[str, ...], code: int, message: str, paths: dict[str, Path]) -> None:
    done = here(*(a.format(**paths) for a in args))
    assert done.exit_code == code, done.output
    assert message in done.output
