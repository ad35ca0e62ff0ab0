"""Shared fixtures: merges through MergeKit, in this process or as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from processes import run_command
from safetensors import safe_open

from mergekit_symalign.demo.source import unpack_smollm2

State = dict[str, torch.Tensor]
BIN = Path(sys.executable).parent
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def load(path: Path) -> State:
    """All tensors of a checkpoint directory."""
    state: State = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            state |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return state


def merge_config(method: str, base: Path | str | None, models: list[Any], **rest: Any) -> dict[str, Any]:
    """A merge configuration; models are paths, or dicts as in the YAML."""
    listed = [{"model": str(m)} if isinstance(m, (str, Path)) else m | {"model": str(m["model"])} for m in models]
    config: dict[str, Any] = {"merge_method": method, "models": listed, "dtype": "float32"} | rest
    return config if base is None else config | {"base_model": str(base)}


def merged(config: dict[str, Any], out: Path, **options: Any) -> State:
    """Run a merge in this process (the plugin was autoloaded when mergekit was imported) and load its output."""
    settings = {"copy_tokenizer": False, "quiet": True, "write_model_card": False} | options
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(**settings))
    return load(out)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M, unpacked once for all processes of a run. Not to be written to."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that all workers share
    with FileLock(folder / "smollm2.lock"):
        return unpack_smollm2(folder / "smollm2")


@pytest.fixture
def mergekit_yaml(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Write a config and run the real ``mergekit-yaml`` on it, in a directory that is not the repository."""

    def run(
        config: dict[str, Any] | str, out: Path, *args: str, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "config.yml"
        file.write_text(config if isinstance(config, str) else yaml.safe_dump(config), "utf-8")
        if env is None:
            return run_command("mergekit-yaml", file, out, "--quiet", *args, cwd=tmp_path, env=OFFLINE)
        command = [BIN / "mergekit-yaml", file, out, "--quiet", *args]  # variables are read when MergeKit is imported
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=OFFLINE | env)

    return run


def squared_distance(a: State, b: State) -> float:
    """Over all tensors of ``a``, in float64."""
    return float(sum((x.double() - b[name].double()).square().sum() for name, x in a.items()))
