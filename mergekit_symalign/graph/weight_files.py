"""Which files of a model's directory hold its weights, as MergeKit chooses them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from mergekit_symalign.errors import CheckpointError, ModelError
from mergekit_symalign.graph.damaged import damaged, read_json, shown

_MAIN = ("model.safetensors", "pytorch_model.bin")  # in the order in which MergeKit looks for them
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
_READS = "MergeKit reads model.safetensors or pytorch_model.bin, or their .index.json"
ADAPTER = "adapter_config.json"


def main_file(folder: Path) -> Path:
    """The file that MergeKit reads, or that the index which it reads is named after.

    Raises:
        ModelError: if there is none, saying what is there instead.
    """
    for name in _MAIN:
        if (folder / name).exists() or index_of(folder / name).exists():
            return folder / name
    raise _without_weights(folder)


def require_directory(path: Path) -> Path:
    """
    Raises:
        ModelError: if it is a file.
    """
    if path.is_dir():
        return path
    gguf = path.suffix.lower() == ".gguf"
    raise ModelError(
        f"model {path}",
        "it is a GGUF file, which cannot be merged" if gguf else "it is a file, but a model is a directory",
        "Use the original checkpoint, or convert it to safetensors" if gguf else f"Name its directory: {path.parent}",
    )


def index_of(main: Path) -> Path:
    return main.with_name(f"{main.name}.index.json")


def weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, from the index of a checkpoint in several files.

    Raises:
        CheckpointError: if it is no index, or names files outside its directory, or files that are not there.
    """
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(shard, str) for shard in found.values()):
        raise damaged(index, "its weight_map does not give each tensor's file")
    for shard in sorted(set(found.values())):
        _check_shard(index, shard)
    return found


def _check_shard(index: Path, shard: str) -> None:
    if not _is_inside(shard):
        raise CheckpointError(
            str(index),
            f"it names {shown(shard)}, which is not a file of this directory",
            "Download or export the index again",
        )
    try:
        there = (index.parent / shard).is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there:
        raise CheckpointError(
            str(index), f"it names {shown(shard)}, and this file is missing", "Download or export the checkpoint again"
        )
    if index.name.startswith(_MAIN[0]) and not shard.lower().endswith(".safetensors"):
        raise damaged(index, f"it names {shown(shard)}, which is not a safetensors file")


def _is_inside(shard: str) -> bool:
    """Whether a name stays below its directory, on every system; symbolic links are the hub cache's own."""
    paths = (PurePosixPath(shard), PureWindowsPath(shard))
    return all(path.parts and not path.anchor and ".." not in path.parts for path in paths)


def _without_weights(folder: Path) -> ModelError:
    files = sorted(folder.iterdir())
    if broken := [path.name for path in files if not path.exists()]:
        reason, remedy = f"{_some(broken)} is a link to a file that is not there", "Download the model again"
    else:
        reason, remedy = _what_is_there([path.name for path in files])
    return ModelError(f"model {folder}", reason, remedy)


def _what_is_there(names: Sequence[str]) -> tuple[str, str]:
    """Why a directory without weights has none, and what to do."""
    if not names:
        return "the directory is empty", "Download the model, or name another directory"
    gguf = [name for name in names if name.lower().endswith(".gguf")]
    weights = [name for name in names if name.lower().endswith(_WEIGHTS) and not name.startswith("adapter_")]
    if weights:
        return f"its weights are in {_some(weights)}, which MergeKit does not read", f"{_READS}: rename or convert them"
    if gguf:
        return (
            f"it has weights as GGUF only ({_some(gguf)}), which cannot be merged",
            "Use the original checkpoint, or convert it to safetensors",
        )
    if ADAPTER in names:
        return (
            "it is an adapter (LoRA) and has no weights of a whole model",
            "Write base+adapter, the model that it was trained on and this one, and add --lora-merge-cache DIR",
        )
    return "it has no weights", f"{_READS}: download or export them"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
