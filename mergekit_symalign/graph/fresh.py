"""Nothing of an earlier merge in the same process: what MergeKit keeps of files is let go before we read them."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mergekit.architecture.auto import infer_architecture_info
from mergekit.common import ModelPath, ModelReference
from mergekit.io.tasks import LoaderCache

LOG = logging.getLogger(__name__)


def forget_loader(model: ModelReference) -> None:
    """Let MergeKit open a model anew.

    MergeKit keeps the loaders of all models by name as long as the process lives. It keeps a model that it has merged
    with its adapter as long as the directory is there. Both may be older than the files behind the name.
    """
    cache = LoaderCache()
    cache.loaders.pop(model, None)
    if model.lora is not None and cache.lora_cache_dir is not None:
        _drop_if_older(merged_folder(model, cache.lora_cache_dir), [model.model, model.lora])


def forget_architectures() -> None:
    """Let MergeKit look again at checkpoints whose architecture it infers from their tensors."""
    infer_architecture_info.cache_clear()


def merged_folder(model: ModelReference, cache: str) -> Path:
    """Where MergeKit keeps a model that it has merged with its adapter."""
    assert model.lora is not None
    return Path(cache, f"{model.model._unique_id()}_{model.lora._unique_id()}")


def _drop_if_older(merged: Path, sources: list[ModelPath]) -> None:
    """Remove a merged model that is older than the files it was made of, so that MergeKit makes it again."""
    made = min(_changed(merged), default=None)
    changed = max((time for source in sources for time in _changed(Path(source.path))), default=None)
    if made is not None and changed is not None and changed > made:
        LOG.warning("%s is older than the model or the adapter it was made of: it is made again", merged)
        shutil.rmtree(merged)


def _changed(folder: Path) -> Iterator[int]:
    """When each file of a local folder was changed, in nanoseconds; nothing for a model of the hub."""
    if folder.is_dir():
        for file in os.scandir(folder):
            if file.is_file():
                yield file.stat().st_mtime_ns
