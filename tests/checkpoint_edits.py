"""Small checkpoints as people have them: with older names, pickled, damaged, or not there at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from click.testing import CliRunner
from conftest import State, load, merge_config
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import save_file

from mergekit_symalign.cli import main


def copied(source: Path, out: Path) -> Path:
    shutil.copytree(source, out)
    return out


def edited(source: Path, out: Path, edit: Callable[[State], State | None], **config: object) -> Path:
    """A copy of a checkpoint with other tensors and config entries."""
    copied(source, out)
    state = load(out)
    state = edit(state) or state
    save_file({name: x.contiguous() for name, x in state.items()}, out / "model.safetensors", metadata={"format": "pt"})
    file = out / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | config), "utf-8")
    return out


def pickled(source: Path, out: Path, edit: Callable[[State], object] = lambda state: state, **options: object) -> Path:
    """A copy of a checkpoint as pytorch_model.bin."""
    copied(source, out)
    state = load(out)
    (out / "model.safetensors").unlink()
    torch.save(edit(state), out / "pytorch_model.bin", **options)
    return out


def merge_output(anchor: object, model: object, out: Path, *options: str, method: str = "rotation_match") -> str:
    """What `mergekit-yaml` prints when it refuses a merge; nothing may be written."""
    parameters = {} if method == "rotation_match" else {"weight": 1.0}
    config = out.with_name(f"{out.name}.yml")
    config.write_text(
        yaml.safe_dump(merge_config(method, str(anchor), [{"model": str(model)}], parameters=parameters)), "utf-8"
    )
    result = CliRunner().invoke(mergekit_yaml, [str(config), str(out), "--quiet", *options])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code != 0
    assert not out.exists()
    return result.output


def command_output(*args: object, code: tuple[int, ...] = (1, 2)) -> str:
    """What a command prints, without a traceback."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in code, result.output
    return result.output


def brief_refusals(anchor: Path, model: object, folder: Path) -> dict[str, str]:
    """What a merge and a command say, which open models by the same code as all others do."""
    return {
        "merge": merge_output(anchor, model, folder / "out"),
        "verify": command_output("verify", anchor, model, "--random"),
    }


def refusals(anchor: Path, model: object, folder: Path, *options: str) -> dict[str, str]:
    """What a merge and each command say about a model that cannot be read."""
    alignment = folder / "a.safetensors"
    return {
        "merge": merge_output(anchor, model, folder / "out", *options),
        "as anchor": merge_output(model, anchor, folder / "out", *options),
        "inspect": command_output("inspect", anchor, model, *options),
        "solve": command_output("solve", anchor, model, "-o", alignment, *options),
        "apply": command_output("apply", alignment, model, "-o", folder / "applied", *options),
        "verify": command_output("verify", anchor, model, "--random"),
        "barrier": command_output("barrier", anchor, model, "--text", __file__),
    }
