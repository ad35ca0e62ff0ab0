"""What Windows and macOS lack or do otherwise, as far as it can be seen on another system."""

from __future__ import annotations

import ast
import errno
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import BIN, OFFLINE, merge_config
from models import make_model, save
from yaml import safe_dump

import mergekit_symalign
from mergekit_symalign.symmetry.neurons import quantized
from mergekit_symalign.whole_file import written_whole

ROOT = Path(__file__).parent.parent
LINUX_ONLY = {ROOT / "tests" / "benchmarks", ROOT / "examples" / "activations"}  # they measure memory
POSIX_MODULES = frozenset(("fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"))
_OF_POSIX = """
chown chroot confstr ctermid fchdir fchmod fchown fork forkpty getegid geteuid getgid getgroups getloadavg getpgid
getpgrp getpriority getresuid getsid getuid getxattr initgroups killpg lchown listxattr lockf makedev mkfifo mknod
nice openpty pathconf pipe2 posix_fadvise posix_fallocate posix_spawn pread preadv pwrite pwritev readv
register_at_fork removexattr sched_getaffinity sched_setaffinity sched_yield sendfile setegid seteuid setgid setgroups
setpgid setpriority setsid setuid setxattr statvfs sync sysconf tcgetpgrp tcsetpgrp ttyname uname wait wait3 wait4
waitid writev WNOHANG
"""
POSIX_OS = frozenset(_OF_POSIX.split())


def _python_files() -> Iterator[Path]:
    for folder in ("mergekit_symalign", "tests", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not LINUX_ONLY & set(path.parents):
                yield path


def _faults(tree: ast.Module) -> Iterator[str]:
    """What breaks elsewhere: modules and functions of POSIX, text in the encoding of the system."""
    guarded = {name for node in ast.walk(tree) if (name := _asked_for(node))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"line {node.lineno}: import {a.name}" for a in node.names if a.name in POSIX_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in POSIX_MODULES:
            yield f"line {node.lineno}: from {node.module}"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (f"line {node.lineno}: os.{a.name}" for a in node.names if a.name in POSIX_OS)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            if node.attr in POSIX_OS - guarded:
                yield f"line {node.lineno}: os.{node.attr}"
        elif isinstance(node, ast.Call) and _text_of_the_system(node):
            yield f"line {node.lineno}: no encoding"


def _asked_for(node: ast.AST) -> str | None:
    """The name in ``hasattr(os, name)``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
        name = node.args[1]
        return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else None
    return None


def _text_of_the_system(call: ast.Call) -> bool:
    """Whether a call reads or writes text without a word on its encoding."""
    if any(k.arg in ("encoding", None) for k in call.keywords):
        return False
    if isinstance(call.func, ast.Attribute):
        method = call.func.attr
        if method in ("read_text", "write_text"):
            return len(call.args) < (1 if method == "read_text" else 2)
        if method != "open":
            return False
        mode = call.args[0] if call.args else _mode(call)
        return _is_text(mode) if isinstance(mode, ast.Constant) or mode is None else False
    if isinstance(call.func, ast.Name) and call.func.id == "open":
        return _is_text(call.args[1] if len(call.args) > 1 else _mode(call))
    return False


def _mode(call: ast.Call) -> ast.expr | None:
    return next((k.value for k in call.keywords if k.arg == "mode"), None)


def _is_text(mode: ast.expr | None) -> bool:
    return mode is None or (isinstance(mode, ast.Constant) and isinstance(mode.value, str) and "b" not in mode.value)


def test_no_code_depends_on_the_operating_system() -> None:
    found = {str(p.relative_to(ROOT)): list(_faults(ast.parse(p.read_text("utf-8")))) for p in _python_files()}
    assert {path: faults for path, faults in found.items() if faults} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import resource",
        "from fcntl import flock",
        "from os import fork",
        "import os\nos.register_at_fork()",
        "open('x')",
        "path.open()",
        "path.open('w')",
        "path.read_text()",
        "path.write_text('x')",
    ],
)
def test_the_search_finds_each_kind(code: str) -> None:
    assert len(list(_faults(ast.parse(code)))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "import os\nif hasattr(os, 'fork'):\n    os.fork()",
        "open('x', 'rb')",
        "open('x', encoding='utf-8')",
        "path.open('rb')",
        "File.open(path)",
        "path.read_text('utf-8')",
        "path.write_text('x', 'utf-8')",
    ],
)
def test_the_search_finds_nothing_else(code: str) -> None:
    assert list(_faults(ast.parse(code))) == []


_AS_ON_WINDOWS = """
import importlib, os, pkgutil, sys
import accelerate, peft, transformers, torch, scipy.optimize, scipy.sparse.csgraph  # they may use what their system has
import transformers.models.llama.modeling_llama
from mergekit.scripts import run_yaml
for name in [m for m in sys.modules if m.startswith("mergekit_symalign")]:
    del sys.modules[name]
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in {modules!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
for name in {modules!r}:
    sys.modules.pop(name, None)
for name in {functions!r}:
    if hasattr(os, name):
        delattr(os, name)
import mergekit_symalign
for module in pkgutil.walk_packages(mergekit_symalign.__path__, "mergekit_symalign."):
    importlib.import_module(module.name)
from mergekit_symalign.hook import install
from mergekit_symalign.cli import main
main()
"""


def test_a_merge_without_what_windows_lacks(tmp_path: Path) -> None:
    """Every module is imported, and an aligned merge runs, in a Python without the modules and functions of POSIX."""
    models = [save(make_model("llama", seed, num_hidden_layers=1), tmp_path / str(seed)) for seed in range(2)]
    config = merge_config("rotation_match", models[0], models, parameters={"save_alignment": str(tmp_path / "saved")})
    (tmp_path / "config.yml").write_text(safe_dump(config), "utf-8")
    code = _AS_ON_WINDOWS.format(modules=sorted(POSIX_MODULES - {"posix"}), functions=sorted(POSIX_OS))
    command = [sys.executable, "-c", code, "yaml", "config.yml", "out", "--no-copy-tokenizer", "--quiet"]
    env = OFFLINE | {"MERGEKIT_SYMALIGN_AUTOLOAD": "0"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "symalign_report.json").exists()
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["1.safetensors"]


def test_a_file_that_another_program_looks_at_is_replaced_a_moment_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, replace = [], Path.replace

    def busy(self: Path, target: Path) -> Path:
        tries.append(target)
        if len(tries) < 3:
            raise PermissionError(errno.EACCES, "Access is denied", str(self))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", busy)
    with written_whole(tmp_path / "file") as scratch:
        scratch.write_text("whole", "utf-8")
    assert len(tries) == 3
    assert (tmp_path / "file").read_text("utf-8") == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_stays_open_keeps_its_content_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, target: Path) -> Path:
        raise PermissionError(errno.EACCES, "Access is denied", str(self))

    (tmp_path / "file").write_text("old", "utf-8")
    monkeypatch.setattr(Path, "replace", refused)
    with (
        pytest.raises(PermissionError, match="cannot be replaced") as error,
        written_whole(tmp_path / "file") as scratch,
    ):
        scratch.write_text("new", "utf-8")
    assert error.value.filename == str(tmp_path / "file")
    assert (tmp_path / "file").read_text("utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_scratch_file_that_cannot_be_removed_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, "Access is denied", str(self))

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(ValueError, match="of the writer"), written_whole(tmp_path / "file"):
        raise ValueError("of the writer")


def test_torch_that_knows_nothing_of_the_processor_gets_the_other_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cpu.get_capabilities is younger than the oldest torch that is supported."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert quantized.usable(torch.device("cpu"), torch.float32, 100) is False


def test_names_that_the_output_has_no_code_for(tmp_path: Path) -> None:
    """A pipe on Windows takes 256 characters; the report goes on with ? for others."""
    models = [save(make_model("llama", i, num_hidden_layers=1), tmp_path / f"模型-{i}") for i in range(2)]
    command = [BIN / "mergekit-symalign", "inspect", *models, "--quiet"]
    env = OFFLINE | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, capture_output=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"??-1" in done.stdout


def test_the_wheel_tells_type_checkers_of_its_types() -> None:
    assert (Path(mergekit_symalign.__file__).parent / "py.typed").exists()
