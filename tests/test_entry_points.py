"""Every way to start a merge gives the same folder, and tells its errors in the same way."""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import BIN, OFFLINE, load, merge_config, merged
from mergekit import multigpu_executor
from mergekit.scripts.multimerge import main as mergekit_multi
from mergekit.scripts.run_yaml import main as mergekit_yaml
from models import make_model, save, with_weights

from mergekit_symalign.cli import main
from mergekit_symalign.errors import GeometryError, SymalignError, UnknownMethodError, ValueInTensorError
from mergekit_symalign.graph import opening, solve

OFF = {"MERGEKIT_SYMALIGN_AUTOLOAD": "0"}
TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    found = {name: save(make_model("llama", i, num_hidden_layers=2), folder / name) for i, name in enumerate("ab")}
    spoilt = make_model("llama", 3, num_hidden_layers=2)
    state = {name: x.clone() for name, x in spoilt.state_dict().items()}
    state[TENSOR][3, 4] = float("nan")
    return found | {"spoilt": save(with_weights(spoilt, state), folder / "spoilt")}


def _config(paths: dict[str, Path], model: str = "b") -> dict[str, Any]:
    weighted = [{"model": paths[model], "parameters": {"weight": 0.5}}]
    return merge_config("aligned_task_arithmetic", paths["a"], weighted) | {"dtype": "bfloat16"}


@pytest.fixture
def file(paths: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """The configuration as a file."""

    def write(model: str = "b") -> Path:
        (tmp_path / "config.yml").write_text(yaml.safe_dump(_config(paths, model)), "utf-8")
        return tmp_path / "config.yml"

    return write


# The same folder


def _contents(out: Path) -> dict[str, bytes]:
    """Every file of a merge: tensors, config, card, configuration, report."""
    return {path.name: path.read_bytes() for path in out.iterdir()}


def _run(command: list[Any], **env: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=OFFLINE | env)
    assert done.returncode == 0, done.stderr


LATE = """
from mergekit.merge import run_merge
from mergekit.merge_methods import get
import mergekit.scripts.multimerge, mergekit.scripts.run_yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
import mergekit_symalign, sys, yaml
mergekit_symalign.install()
assert get("rotation_match").spec.name == "rotation_match"
assert get("aligned_linear") is mergekit.merge_methods.get("aligned_linear")
assert mergekit.scripts.multimerge.run_merge is mergekit.scripts.run_yaml.run_merge is run_merge
source = open(sys.argv[1]).read()
run_merge(MergeConfiguration.model_validate(yaml.safe_load(source)), sys.argv[2], MergeOptions(copy_tokenizer=False, quiet=True), source)
"""  # noqa: E501
"""A user's program that binds MergeKit's names before it installs ours."""


def test_every_entry_point_writes_the_same_folder(file: Callable[..., Path], tmp_path: Path) -> None:
    config, options = file(), ["--quiet", "--no-copy-tokenizer"]
    out = {name: tmp_path / name / "out" for name in ("yaml", "launcher", "launcher without autoload", "late")}
    for folder in out.values():
        folder.parent.mkdir()
    _run([BIN / "mergekit-yaml", config, out["yaml"], *options])
    _run([BIN / "mergekit-symalign", "yaml", config, out["launcher without autoload"], *options], **OFF)
    _run([sys.executable, "-c", LATE, config, out["late"]], **OFF)
    done = CliRunner().invoke(main, ["yaml", str(config), str(out["launcher"]), *options])
    assert done.exit_code == 0, done.output
    expected = _contents(out["yaml"])
    assert {"config.json", "README.md", "mergekit_config.yml", "symalign_report.json"} <= expected.keys()
    assert b"### Parameter alignment" in expected["README.md"]
    assert expected["mergekit_config.yml"] == config.read_bytes()
    assert {x.dtype for x in load(out["yaml"]).values()} == {torch.bfloat16}
    for name, folder in out.items():
        assert _contents(folder) == expected, name


def test_mergekit_multi_writes_what_run_merge_writes(
    paths: dict[str, Path], file: Callable[..., Path], tmp_path: Path
) -> None:
    """Neither is given the text of the configuration: both write MergeKit's own form of it."""
    arguments = [file(), "-I", tmp_path / "between", "--out-path", tmp_path / "multi" / "out"]
    done = CliRunner().invoke(mergekit_multi, [*map(str, arguments), "--quiet", "--no-copy-tokenizer"])
    assert done.exit_code == 0, done.output
    merged(_config(paths), tmp_path / "python" / "out", write_model_card=True)
    found = _contents(tmp_path / "multi" / "out")
    assert b"### Parameter alignment" in found["README.md"]
    assert found == _contents(tmp_path / "python" / "out")


def test_the_launcher_explains_itself_and_has_all_options() -> None:
    shown = CliRunner().invoke(main, ["yaml", "--help"], prog_name="mergekit-symalign").output
    assert "Example: mergekit-symalign yaml merge.yml merged" in shown
    own = {p.name for p in main.commands["yaml"].params} - {p.name for p in mergekit_yaml.params}
    assert own == {"ray", "workers", "gpus_per_worker"}
    assert main.commands["yaml"].params[: -len(own)] == mergekit_yaml.params
    assert mergekit_yaml.name == "mergekit-yaml"


def test_our_methods_may_be_imported_before_mergekit() -> None:
    """The hook then runs in the middle of that import."""
    code = (
        "import mergekit_symalign.methods; from mergekit.merge_methods import get; print(get('aligned_ties').spec.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=OFFLINE)
    assert done.stdout.strip() == "aligned_ties", done.stderr


def test_only_the_hook_imports_the_methods_themselves() -> None:
    package = Path(solve.__file__).parent.parent
    users = {path.name for path in package.rglob("*.py") if "aligned_methods import" in path.read_text("utf-8")}
    assert users == {"hook.py", "methods.py"}


# The same errors


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """MergeKit's multi-GPU executor with its threads, on two devices that are the CPU."""
    for module in (multigpu_executor, opening):  # one schedules, the other asks whether there is any
        monkeypatch.setattr(module, "get_torch_accelerator_type", lambda: "cpu")
        monkeypatch.setattr(module, "get_torch_accelerator_count", lambda *_: 2)
    monkeypatch.setattr(torch.cuda, "Stream", lambda **_: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())


COMMANDS = {
    "mergekit-yaml": lambda file, out: (mergekit_yaml, [file, out]),
    "mergekit-symalign yaml": lambda file, out: (main, ["yaml", file, out]),
    "mergekit-multi": lambda file, out: (mergekit_multi, [file, "-I", out + "-between", "--out-path", out]),
}


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("name", sorted(COMMANDS))
@pytest.mark.parametrize("options", [[], ["--multi-gpu"]])
def test_an_error_of_a_task_is_one_line(
    name: str, options: list[str], file: Callable[..., Path], tmp_path: Path
) -> None:
    """A tensor with NaN is found while tasks run, with --multi-gpu in a thread of its own."""
    command, arguments = COMMANDS[name](str(file("spoilt")), str(tmp_path / "out"))
    done = CliRunner().invoke(command, [*arguments, "--quiet", *options])
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 1
    assert done.output.strip().splitlines()[-1].startswith(f"Error: tensor {TENSOR} of model")
    assert "Traceback" not in done.output
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("multi_gpu", [False, True])
def test_in_python_errors_stay_what_they_are(paths: dict[str, Path], multi_gpu: bool, tmp_path: Path) -> None:
    with pytest.raises(ValueInTensorError, match=TENSOR):
        merged(_config(paths, "spoilt"), tmp_path, multi_gpu=multi_gpu)


@pytest.mark.usefixtures("two_devices")
def test_two_devices_merge_what_one_merges(paths: dict[str, Path], tmp_path: Path) -> None:
    one, two = (merged(_config(paths), tmp_path / str(n), multi_gpu=n == 2) for n in (1, 2))
    assert one.keys() == two.keys()
    assert all(torch.equal(x, two[name]) for name, x in one.items())


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("options", [[], ["--multi-gpu"]])
def test_an_error_of_a_solve_is_one_line(
    options: list[str], file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise GeometryError("tensor w", "it does not fit", "Use another")

    monkeypatch.setattr(solve, "solve_block", fail)
    done = CliRunner().invoke(mergekit_yaml, [str(file()), str(tmp_path / "out"), "--quiet", *options])
    assert done.exit_code == 1
    assert done.output.strip().splitlines()[-1] == "Error: tensor w: it does not fit. Use another."


def test_errors_are_translated_in_one_place() -> None:
    """Tasks, planning and kernels know nothing of command lines; graph/error_translation.py does it for the hook."""
    package = Path(solve.__file__).parent.parent
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "readable_errors" in path.read_text("utf-8")
    }
    assert users == {"hook.py", "graph/error_translation.py"}


@pytest.mark.parametrize("kind", [GeometryError, ValueInTensorError, UnknownMethodError])
def test_errors_travel_between_processes(kind: type[SymalignError]) -> None:
    """As from the workers of mergekit-evolve."""
    error = kind("tensor w", "it does not fit", "Use another")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.where, again.remedy) == (str(error), "tensor w", "Use another")
