"""The autoload: there when MergeKit is imported, cheap, harmless when broken, gone after uninstalling."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import types
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import mergekit
import pytest
from conftest import OFFLINE
from mergekit import merge_methods

import mergekit_symalign
from mergekit_symalign import hook
from mergekit_symalign.errors import HostError

SITE = Path(sysconfig.get_paths()["purelib"])
LINE = (SITE / "mergekit_symalign.pth").read_text("utf-8")
NAMES = ("rotation_match", "aligned_task_arithmetic", "aligned_ties", "aligned_slerp")
REPOSITORY = Path(__file__).parent.parent
LIST_METHODS = "from mergekit import merge_methods as m; print([x.spec.name for x in m.registered_methods()])"


def _python(code: str, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=OFFLINE | env, cwd=Path(__file__).parent)


def test_mergekit_knows_the_methods_by_itself() -> None:
    found = _python(LIST_METHODS)
    assert found.returncode == 0, found.stderr
    assert all(name in found.stdout for name in NAMES)


def test_switched_off() -> None:
    found = _python(LIST_METHODS, MERGEKIT_SYMALIGN_AUTOLOAD="0")
    assert found.returncode == 0, found.stderr
    assert not any(name in found.stdout for name in NAMES)
    install = "import mergekit_symalign as s; s.install(); s.install(); "
    by_hand = _python(install + LIST_METHODS, MERGEKIT_SYMALIGN_AUTOLOAD="0")
    assert all(by_hand.stdout.count(repr(name)) == 1 for name in NAMES), by_hand.stderr


def test_nothing_of_ours_is_imported_before_mergekit() -> None:
    code = "import sys; print([m for m in sys.modules if m.startswith('mergekit')], 'torch' in sys.modules)"
    assert _python(code).stdout.strip() == "[] False"


def test_line_run_twice_puts_one_finder() -> None:
    code = f"import sys; exec({LINE!r}); exec({LINE!r}); print([type(f).__name__ for f in sys.meta_path])"
    assert _python(code).stdout.count("SymalignFinder") == 1
    start = "import sys; from mergekit_symalign.autoload import start; start(); start(); "
    assert _python(start + "print([type(f).__name__ for f in sys.meta_path])").stdout.count("SymalignFinder") == 1


def test_start_file_of_pep_829_names_a_function_that_installs_the_finder() -> None:
    module, function = (SITE / "mergekit_symalign.start").read_text("utf-8").strip().split(":")
    code = f"import importlib; importlib.import_module({module!r}).{function}(); " + LIST_METHODS
    site = f"import sys; sys.path.append({str(SITE)!r}); "
    found = _python(site + code, "-S")
    assert all(name in found.stdout for name in NAMES), found.stderr


def test_the_line_imports_nothing() -> None:
    """What it costs is in tests/benchmarks/timings.py: under a millisecond."""
    code = f"import os, sys; before = set(sys.modules); exec({LINE!r}); print(sorted(set(sys.modules) - before))"
    assert _python(code, "-S").stdout.strip() == "[]"


def test_half_removed_package_breaks_nothing(tmp_path: Path) -> None:
    """The line is there, the package is not: MergeKit (a stand-in) still imports."""
    _stand_in(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); exec({LINE!r}); "
    found = _python(code + "from mergekit.merge_methods import answer; print(answer)", "-S")
    assert found.stdout.strip() == "42", found.stderr


def _stand_in(folder: Path) -> None:
    """A package called mergekit with one of the modules that the finder waits for."""
    (folder / "mergekit").mkdir()
    (folder / "mergekit" / "__init__.py").touch()
    (folder / "mergekit" / "merge_methods.py").write_text("answer = 42", "utf-8")


def test_other_errors_are_not_swallowed(tmp_path: Path) -> None:
    _stand_in(tmp_path)
    (tmp_path / "mergekit_symalign").mkdir()
    (tmp_path / "mergekit_symalign" / "__init__.py").touch()
    (tmp_path / "mergekit_symalign" / "autoload.py").write_text("import a_module_that_is_missing", "utf-8")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); exec({LINE!r}); import mergekit.merge_methods"
    assert "a_module_that_is_missing" in _python(code, "-S").stderr


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_wheels_carry_the_startup_files(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hatchling.build

    monkeypatch.chdir(REPOSITORY)
    name = getattr(hatchling.build, f"build_{kind}")(str(tmp_path))
    with zipfile.ZipFile(tmp_path / name) as wheel:
        names = wheel.namelist()
        assert wheel.read("mergekit_symalign.pth").decode() == LINE
    assert "mergekit_symalign.start" in names
    assert not any(n.startswith(("tests", "docs", "examples")) for n in names)
    assert kind == "editable" or "mergekit_symalign/families/llama.yaml" in names


def test_uninstalling_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hatchling.build

    monkeypatch.chdir(REPOSITORY)
    wheel = hatchling.build.build_wheel(str(tmp_path))
    venv.create(tmp_path / "env", with_pip=False)
    python = venv.EnvBuilder().ensure_directories(tmp_path / "env").env_exe
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(subprocess.check_output([python, "-c", where], text=True).strip())
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    before = sorted(site.rglob("*"))
    subprocess.run([*pip, "install", "--quiet", "--no-deps", tmp_path / wheel], check=True, capture_output=True)
    finders = "import sys; print([type(f).__name__ for f in sys.meta_path])"
    assert "SymalignFinder" in subprocess.run([python, "-c", finders], capture_output=True, text=True).stdout
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "mergekit-symalign"], check=True, capture_output=True)
    assert sorted(site.rglob("*")) == before


def test_unknown_internals_are_reported_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_methods, "get", merge_methods.get)  # restored afterwards
    hook.on_import(types.ModuleType("mergekit.plan"))
    assert merge_methods.get("linear").spec.name == "linear"
    with pytest.raises(HostError) as error:
        merge_methods.get("rotation_match")
    assert metadata.version("mergekit") in str(error.value)
    assert mergekit_symalign.__version__ in str(error.value)
    assert "MergePlanner._plan is missing" in str(error.value)


def test_a_mergekit_with_other_internals(tmp_path: Path) -> None:
    """The real command on a MergeKit whose planner has another shape: stock merges run, ours give one clear error."""
    from conftest import merge_config
    from models import make_model, save
    from yaml import safe_dump

    shutil.copytree(Path(mergekit.__file__).parent, tmp_path / "site" / "mergekit")
    plan = tmp_path / "site" / "mergekit" / "plan.py"
    plan.write_text(plan.read_text("utf-8").replace("_plan(", "_make_plan("), "utf-8")
    models = [save(make_model("llama", i, num_hidden_layers=1), tmp_path / str(i)) for i in range(2)]
    results = {}
    for method in ("linear", "rotation_match"):
        config = merge_config(method, models[0], models, parameters={"weight": 1.0})
        (tmp_path / f"{method}.yml").write_text(safe_dump(config), "utf-8")
        command = [sys.executable, "-m", "mergekit.scripts.run_yaml", tmp_path / f"{method}.yml", tmp_path / method]
        env = OFFLINE | {"PYTHONPATH": str(tmp_path / "site")}
        results[method] = subprocess.run([*command, "--quiet"], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert results["linear"].returncode == 0, results["linear"].stderr
    assert (tmp_path / "linear" / "model.safetensors").exists() or list((tmp_path / "linear").glob("*.safetensors"))
    assert results["rotation_match"].returncode == 1
    message = results["rotation_match"].stderr
    assert "Traceback" not in message
    assert metadata.version("mergekit") in message
    assert mergekit_symalign.__version__ in message
    assert not (tmp_path / "rotation_match").exists()
