"""Models and devices are tried before MergeKit opens them, so that what is wrong with them has a name and a remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from mergekit.common import (
    ModelPath,
    ModelReference,
    get_torch_accelerator_count,
    get_torch_accelerator_type,
)
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_symalign.errors import CheckpointError, ConfigError, ModelError, SymalignError
from mergekit_symalign.graph.damaged import describe, read_json
from mergekit_symalign.graph.fresh import forget_loader
from mergekit_symalign.graph.headers import Headers, read_headers, shard_headers, shards_of
from mergekit_symalign.graph.pickles import is_pickle, require_lazily_readable
from mergekit_symalign.graph.weight_files import ADAPTER, require_directory

_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@contextmanager
def opening(name: str) -> Iterator[None]:
    """What transformers, huggingface_hub, peft and MergeKit's loader raise for a model, as our error.

    Raises:
        ModelError: in place of theirs.
    """
    try:
        yield
    except SymalignError:
        raise
    except Exception as error:  # they raise whatever a config or a file leads them to
        file = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        raise ModelError(
            f"model {name}",
            f"it cannot be opened ({file}{describe(error)})",
            "Name a directory with config.json and weights, or a model of the Hugging Face hub",
        ) from error


def require_openable(models: Iterable[ModelReference], options: MergeOptions) -> None:
    """Try the device, and the configs and files of all models; then open them anew, and merge their adapters.

    Raises:
        ModelError: if there is no such model, or not in a form that MergeKit reads.
        CheckpointError: naming the file that is damaged.
        ConfigError: if an option is missing or wrong.
    """
    require_device(options.device)
    if options.multi_gpu:
        _require_accelerator()
    cache, models = LoaderCache(), list(dict.fromkeys(models))
    cache.setup(options)
    for model in models:
        require_config(model, trust_remote_code=options.trust_remote_code)
    for model in models:
        _require_readable(model)
        forget_loader(model)
    for model in models:
        _opened(model)


def open_headers(model: ModelReference) -> Headers:
    """The headers of what MergeKit loads for a model: as it is stored, or with its adapter merged.

    Raises:
        ModelError, CheckpointError, ConfigError: if it cannot be opened.
    """
    if model not in LoaderCache().loaders:
        _require_readable(model)
    folder = _opened(model)
    with opening(str(model)):
        return read_headers(folder)


def _opened(model: ModelReference) -> Path:
    """The directory that MergeKit's loader reads, of a model whose files were found readable."""
    cache = LoaderCache()
    if model.lora is not None and model not in cache.loaders:
        _merge_adapter(model)
    with opening(str(model)):
        return Path(cache.get(model).index.base_path)


def require_device(device: str | None) -> None:
    """
    Raises:
        ConfigError: if torch knows no such device, or this machine has none.
    """
    try:
        if torch.device(device or "cpu").type == "meta":
            raise ValueError("it has no memory")
        torch.zeros(1, device=device or "cpu").sum().item()
    except Exception as error:  # each backend has errors of its own
        raise ConfigError(
            f"--device {device}", f"it cannot be used ({describe(error)})", "Use cpu, or a device of this machine"
        ) from error


def _require_accelerator() -> None:
    try:
        there = get_torch_accelerator_count(get_torch_accelerator_type()) > 0
    except Exception:  # MergeKit asks for the type of what is not there
        there = False
    if not there:
        raise ConfigError("--multi-gpu", "this machine has no accelerator that torch can use", "Leave it out")


def require_config(model: ModelReference, *, trust_remote_code: bool) -> Any:
    """The model's config, whether its weights can be read or not.

    Raises:
        ModelError: if there is no such model, or its config is not one that transformers reads.
        CheckpointError: if config.json is damaged.
    """
    here = Path(model.model.path)
    if here.exists():
        _check_config(require_directory(here))
    with opening(str(model)) if here.exists() else _from_the_hub(model.model):
        return model.config(trust_remote_code=trust_remote_code)


def _check_config(folder: Path) -> None:
    if (folder / "config.json").exists():
        read_json(folder / "config.json", strictly=False)
    elif (folder / ADAPTER).exists():
        raise _only_an_adapter(folder)
    else:
        read_headers(folder)  # says what a directory without anything of a model holds instead
        raise ModelError(f"model {folder}", "it has no config.json", "Download the model again, or name another")


def _require_readable(model: ModelReference) -> None:
    """Everything that can be known of a model's files before MergeKit opens them."""
    require_config(model, trust_remote_code=LoaderCache().trust_remote_code)
    if model.lora is not None:
        _require_adapter(model, model.lora)
    folder = _folder(model.model)
    read_headers(folder)
    if LoaderCache().lazy_unpickle:
        for path in filter(is_pickle, shards_of(folder)):
            require_lazily_readable(path)


def _folder(path: ModelPath) -> Path:
    """Where a model's files are on this machine; files of the hub are downloaded."""
    if Path(path.path).exists():
        return require_directory(Path(path.path))
    with _from_the_hub(path):
        return Path(ModelReference(model=path).local_path(cache_dir=LoaderCache().hf_cache_dir))


@contextmanager
def _from_the_hub(path: ModelPath) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # huggingface_hub has errors of its own, and so have those that it calls
        raise ModelError(
            f"model {path}",
            "it cannot be opened: there is no such directory, and it could not be loaded from the Hugging Face hub "
            f"({describe(error)})",
            "Correct the name, or download the model first: hf download",
        ) from error


def _only_an_adapter(folder: Path) -> ModelError:
    base = read_json(folder / ADAPTER, strictly=False).get("base_model_name_or_path") or "BASE"
    return ModelError(
        f"model {folder}",
        "it is an adapter (LoRA), not a whole model",
        f"Write {base}+{folder} and add --lora-merge-cache DIR",
    )


def _require_adapter(model: ModelReference, adapter: ModelPath) -> None:
    if not LoaderCache().lora_cache_dir:
        raise ConfigError(
            f"model {model}",
            "its adapter has to be merged into its base first, but no directory is named for the result",
            "Add --lora-merge-cache DIR",
        )
    if not Path(adapter.path).exists():
        return  # of the hub: peft downloads it
    folder = require_directory(Path(adapter.path))
    if not (folder / ADAPTER).exists():
        raise ModelError(f"adapter {folder}", f"it has no {ADAPTER}", "Name the directory of a LoRA adapter")
    read_json(folder / ADAPTER, strictly=False)
    weights = next((folder / name for name in _ADAPTER_WEIGHTS if (folder / name).exists()), None)
    if weights is None:
        raise ModelError(f"adapter {folder}", f"it has no {_ADAPTER_WEIGHTS[0]}", "Download the adapter again")
    shard_headers(weights)


def _merge_adapter(model: ModelReference) -> None:
    """What MergeKit does when it opens the model, with a name for a merge of the adapter that was broken off."""
    cache = LoaderCache()
    with _without_leftovers(Path(cache.lora_cache_dir or "")), opening(str(model)):
        merged = model.merged(cache.lora_cache_dir, cache.trust_remote_code, cache.lora_merge_dtype)
    folder = Path(merged.model.path)
    try:
        read_headers(folder)
    except (ModelError, CheckpointError) as error:
        raise CheckpointError(
            f"model {model}",
            f"the directory {folder}, where its adapter was merged before, is incomplete ({error.reason})",
            "Delete this directory, so that the adapter is merged again",
        ) from error


@contextmanager
def _without_leftovers(folder: Path) -> Iterator[None]:
    """Take away the empty directory that MergeKit leaves on an error, and would take for a merged adapter next time."""
    before = set(folder.glob("*"))
    try:
        yield
    except SymalignError:
        for left in set(folder.glob("*")) - before:
            with suppress(OSError):  # it is not empty
                left.rmdir()
        raise
