"""What a comparison reads, checked before any work: the models of its merges, data and tasks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_symalign.activations.objectives import predicts_text
from mergekit_symalign.commands.compare_configs import Asked, require_known, require_planned, sources, validated
from mergekit_symalign.commands.names import short_names
from mergekit_symalign.commands.whole_models import has_no_loss
from mergekit_symalign.comparing.documents import read_file
from mergekit_symalign.comparing.selection import Selection, select
from mergekit_symalign.comparing.tasks import require_tasks
from mergekit_symalign.comparing.variants import Variant
from mergekit_symalign.errors import CalibrationError, ConfigError
from mergekit_symalign.graph.headers import read_headers
from mergekit_symalign.graph.opening import open_headers, require_config, require_openable
from mergekit_symalign.graph.readers import tokenizer_of

DEFAULT_LENGTH = 1024  # tokens of a document
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class File:
    """A file of documents that all models read."""

    name: str
    selection: Selection


@dataclass(frozen=True)
class Prepared:
    """What is compared.

    Attributes:
        models: those that the merges are of, the first base model first, by label.
        merges: to make.
        folders: merges that are there, by label.
        files: of documents.
        dtype: in which models compute.
    """

    models: Mapping[str, ModelReference]
    merges: tuple[Variant, ...]
    folders: Mapping[str, ModelReference]
    files: tuple[File, ...]
    dtype: torch.dtype


def prepare(asked: Asked, options: MergeOptions) -> Prepared:
    """Read and check all of it. Nothing is written.

    Raises:
        ConfigError: if a config, an option or a value is wrong.
        ModelError, CheckpointError: if a model cannot be opened.
        ArchitectureError: if a model predicts no next token, and a loss is asked for.
        CalibrationError: if data or a tokenizer cannot be used.
    """
    if not asked.data and asked.harness is None:
        raise ConfigError("compare", "there is nothing to measure", "Add --data FILE or --tasks NAME")
    if asked.harness is not None:
        require_tasks(asked.harness)
    merges, folders = sources(asked)
    configs = [validated(variant) for variant in merges]
    require_known(asked.settings, configs)
    models = _models_of(merges, configs)
    require_openable([*models, *folders], options)
    for variant, config in zip(merges, configs, strict=True):
        require_planned(variant, config, options)
    all_models = [*models, *folders]
    if asked.data:
        for model in all_models:
            _require_next_token(model, options)
    files = _files(asked, all_models, options) if asked.data else ()
    labels = short_names(list(map(str, models)))
    return Prepared(
        models=dict(zip(labels, models, strict=True)),
        merges=tuple(merges),
        folders=dict(zip(short_names(list(map(str, folders))), folders, strict=True)),
        files=files,
        dtype=_stored_dtype(all_models[0]) if asked.dtype == "auto" else getattr(torch, asked.dtype),
    )


def _models_of(merges: Sequence[Variant], configs: Sequence[MergeConfiguration]) -> list[ModelReference]:
    """Every model once, the base model of each config before its others, which stand in the config's order."""
    found: dict[ModelReference, None] = {}
    for variant, config in zip(merges, configs, strict=True):
        text = json.dumps(variant.config, ensure_ascii=False, default=str)
        named = config.referenced_models()
        found |= dict.fromkeys(sorted(named, key=lambda m: (m != config.base_model, text.find(str(m)), str(m))))
    return list(found)


def _require_next_token(model: ModelReference, options: MergeOptions) -> None:
    """
    Raises:
        ArchitectureError: if a model has no loss on texts.
    """
    config = require_config(model, trust_remote_code=options.trust_remote_code)
    if not predicts_text(config):
        name = next(iter(config.architectures or ()), type(config).__name__)
        raise has_no_loss(str(model), name)


def _files(asked: Asked, models: Sequence[ModelReference], options: MergeOptions) -> tuple[File, ...]:
    """The documents as the tokenizer of the first model cuts and counts them; conversations by the first template."""
    length = _length(asked, models, options)
    read = [read_file(path) for path in asked.data]
    tokenizers = [tokenizer_of(model, options) for model in models]
    first = tokenizers[0]
    if not getattr(first, "chat_template", None):
        first.chat_template = next((t for x in tokenizers if (t := getattr(x, "chat_template", None))), None)
    selections = [
        select(lines, path, first, tokens=asked.tokens, length=length)
        for lines, path in zip(read, asked.data, strict=True)
    ]
    names = [path.name for path in asked.data]
    shown = [n if names.count(n) == 1 else str(path) for n, path in zip(names, asked.data, strict=True)]
    return tuple(File(*x) for x in zip(shown, selections, strict=True))


def _length(asked: Asked, models: Sequence[ModelReference], options: MergeOptions) -> int:
    """Tokens of a document.

    Raises:
        CalibrationError: if a model has no positions for so many.
    """
    known = list(_positions(models, options))
    if asked.length is not None and known and asked.length > min(known):
        reason = f"the models have {min(known)} positions"
        raise CalibrationError(f"--max-length {asked.length}", reason, f"Give at most {min(known)}")
    return asked.length or min((DEFAULT_LENGTH, *known))


def _positions(models: Sequence[ModelReference], options: MergeOptions) -> Iterator[int]:
    for model in models:
        config = model.config(trust_remote_code=options.trust_remote_code).get_text_config()
        if isinstance(there := getattr(config, "max_position_embeddings", None), int) and there > 0:
            yield there


def _stored_dtype(model: ModelReference) -> torch.dtype:
    """Of most of the model's tensors."""
    path = Path(model.model.path)
    headers = read_headers(path) if path.is_dir() and model.lora is None else open_headers(model)
    dtypes = Counter(header.dtype for header in headers.listed.values() if header.dtype is not None)
    return dtypes.most_common(1)[0][0] if dtypes else torch.bfloat16
