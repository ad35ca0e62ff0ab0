"""Installed commands in processes of their own, which begin with MergeKit imported.

Torch, transformers and MergeKit take six seconds to import, and a small merge takes one. So one process imports them,
and every command is a fork of it. Where the start itself is tested (tests/test_autoload.py,
tests/test_entry_points.py), the installed script runs instead. Systems without forks start anew each time.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

_START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CONTEXT: Any = multiprocessing.get_context(_START)
if _START == "forkserver":
    _CONTEXT.set_forkserver_preload(["mergekit.scripts.run_yaml", "mergekit_symalign.commands.models"])


def run_command(
    name: str, *arguments: object, cwd: Path, env: Mapping[str, str], timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run an installed command as a user does; gives its exit code and what it wrote.

    Args:
        name: of the script.
        arguments: of the command line.
        cwd: where it runs.
        env: its environment.
        timeout: seconds, after which it is killed.
    """
    command = [name, *map(str, arguments)]
    with TemporaryDirectory() as folder:
        texts = [Path(folder) / stream for stream in ("out", "err")]
        with patch.dict(os.environ, env):  # the process that all are forked from begins with the first of them
            process = _CONTEXT.Process(target=_command, args=(command, str(cwd), dict(env), *map(str, texts)))
            process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout)
        out, err = (text.read_text("utf-8") for text in texts)
    return subprocess.CompletedProcess(command, process.exitcode, out, err)


def _command(command: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    for number, file in ((1, out), (2, err)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(cwd)
    os.environ.update(env)
    sys.argv = list(command)
    (script,) = entry_points(group="console_scripts", name=command[0])
    sys.exit(script.load()())
