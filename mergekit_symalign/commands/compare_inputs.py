"""What a comparison is of, checked before any work: configs, the models they name, data and tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
import yaml
from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import _model_out_config, get_architecture_info
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_symalign.activations.objectives import predicts_text
from mergekit_symalign.commands.common import parsed
from mergekit_symalign.commands.names import short_names
from mergekit_symalign.commands.whole_models import silent
from mergekit_symalign.comparing.documents import Selection, read_file, select
from mergekit_symalign.comparing.tasks import Harness, require_tasks
from mergekit_symalign.comparing.variants import Setting, Variant, parameter_names, variants
from mergekit_symalign.errors import ArchitectureError, CalibrationError, ConfigError, SymalignError
from mergekit_symalign.graph.damaged import describe
from mergekit_symalign.graph.fresh import forget_architectures
from mergekit_symalign.graph.headers import read_headers
from mergekit_symalign.graph.opening import open_headers, require_config, require_openable
from mergekit_symalign.graph.planner import before_merge
from mergekit_symalign.graph.readers import tokenizer_of
from mergekit_symalign.planned_methods import PlannedMethod

DEFAULT_LENGTH = 1024  # tokens of a document
DEFAULT_TOKENS = 65536  # of a file
DTYPES = ("auto", "float32", "bfloat16", "float16")
_METHOD = "merge_method"
_AVERAGES = "merge_method=linear,rotation_match"
_FIELDS = tuple(MergeConfiguration.model_fields)


@dataclass(frozen=True)
class Asked:
    """What the user wants.

    Attributes:
        configs: merge configs, and folders of models that are there.
        average: two models whose plain and aligned averages are compared.
        settings: values to try.
        data: files of texts, or of prompts and answers.
        harness: tasks of lm-eval, if any.
        out: the folder of the results.
        keep: which merges stay: ``none``, ``best`` or ``all``.
        dtype: in which models compute; ``auto`` as the first one is stored.
        tokens, length: of a file and of a document at most; None for as many as the models have positions for.
    """

    configs: tuple[str, ...] = ()
    average: tuple[str, str] | None = None
    settings: tuple[Setting, ...] = ()
    data: tuple[Path, ...] = ()
    harness: Harness | None = None
    out: Path = Path("symalign-compare")
    keep: str = "none"
    dtype: str = "auto"
    tokens: int = DEFAULT_TOKENS
    length: int | None = None


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
    merges, folders = _sources(asked)
    configs = [_validated(variant) for variant in merges]
    _require_known(asked.settings, configs)
    models = _models_of(configs)
    require_openable([*models, *folders], options)
    for variant, config in zip(merges, configs, strict=True):
        _require_planned(variant, config, options)
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


def averages(anchor: str, model: str) -> dict[str, Any]:
    """The config of the average of two models, half and half."""
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in (anchor, model)]
    return {_METHOD: "linear", "base_model": anchor, "models": models}


def _sources(asked: Asked) -> tuple[list[Variant], list[ModelReference]]:
    """Merges to make, and folders of models."""
    folders = [parsed(name) for name in asked.configs if Path(name).is_dir()]
    files = [Path(name) for name in asked.configs if not Path(name).is_dir()]
    names = _names(files)
    configs = {name: _read(path) for name, path in zip(names, files, strict=True)}
    found = variants(configs, asked.settings, _FIELDS) if configs else []
    if asked.average is not None:
        settings = list(asked.settings)
        if all(setting.path != (_METHOD,) for setting in settings):
            settings.insert(0, Setting.parse(_AVERAGES))
        made = variants({"average": averages(*asked.average)}, settings, _FIELDS)
        taken = {variant.label for variant in found}
        found += [Variant(f"average {v.label}", v.config, v.values) if v.label in taken else v for v in made]
    if asked.settings and not found:
        raise ConfigError("--set", "there is no config whose values it could change", "Name a merge config")
    if not found and not folders:
        raise ConfigError("compare", "there is nothing to compare", "Name merge configs, or use --average ANCHOR MODEL")
    return found, folders


def _names(files: Sequence[Path]) -> list[str]:
    """What configs are called: their file's name, with its folder where two have the same."""
    stems = [path.stem for path in files]
    return [
        path.stem if stems.count(path.stem) == 1 else path.with_suffix("").as_posix() if path.suffix else str(path)
        for path in files
    ]


def _read(path: Path) -> dict[str, Any]:
    """
    Raises:
        ConfigError: if it is no YAML file with one merge.
    """
    where = f"config {path}"
    if not path.exists():
        raise ConfigError(where, "there is no such file or folder", "Name a merge config, or the folder of a model")
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(where, f"it cannot be read as YAML ({_in_a_line(error)})", "Correct the file") from error
    if not isinstance(found, dict):
        raise ConfigError(where, "it holds no merge config", "Name a file such as those that mergekit-yaml takes")
    return found


def _validated(variant: Variant) -> MergeConfiguration:
    """
    Raises:
        ConfigError: if MergeKit does not take the config.
    """
    try:
        config: MergeConfiguration = MergeConfiguration.model_validate(dict(variant.config))
        merge_methods.get(config.merge_method)
    except SymalignError:
        raise
    except Exception as error:  # pydantic's errors, and MergeKit's own RuntimeError
        reason = f"MergeKit does not take it ({_in_a_line(error)})"
        raise ConfigError(
            f"config {variant.label}", reason, "Correct the config, or what --set puts into it"
        ) from error
    return config


def _require_known(settings: Sequence[Setting], configs: Sequence[MergeConfiguration]) -> None:
    """MergeKit passes over parameters that a method does not have.

    Raises:
        ConfigError: if a parameter that is set belongs to no method of the merges.
    """
    specs = [merge_methods.get(name).spec for name in dict.fromkeys(config.merge_method for config in configs)]
    known = {p.name for spec in specs for p in (*spec.shared_parameters, *spec.input_parameters)}
    for setting, name in parameter_names(settings):
        if name not in known:
            methods = ", ".join(spec.name for spec in specs)
            reason = f"{methods} has no parameter {name}"
            raise ConfigError(f"--set {setting}", reason, f"Known are {', '.join(sorted(known)) or 'none'}")


def _models_of(configs: Sequence[MergeConfiguration]) -> list[ModelReference]:
    """Every model once, the base model of each config before its others."""
    found: dict[ModelReference, None] = {}
    for config in configs:
        text = config.to_yaml()
        named = config.referenced_models()
        found |= dict.fromkeys(sorted(named, key=lambda m: (m != config.base_model, text.find(str(m)), str(m))))
    return list(found)


def _require_planned(variant: Variant, config: MergeConfiguration, options: MergeOptions) -> None:
    """
    Raises:
        ConfigError: if MergeKit cannot plan the merge, with what it says.
        SymalignError: what our methods refuse.
    """
    try:
        if isinstance(merge_methods.get(config.merge_method), PlannedMethod):
            before_merge(config, options)
        forget_architectures()
        architecture = get_architecture_info(config, options)
        with silent():  # MergeKit sets a dtype by its older name
            out = _model_out_config(config, architecture, trust_remote_code=options.trust_remote_code)
        MergePlanner(config, architecture, options=options, out_model_config=out).plan_to_disk(gettempdir())
    except SymalignError:
        raise
    except Exception as error:  # MergeKit has no errors of its own
        reason = f"MergeKit cannot plan the merge ({_in_a_line(error)})"
        raise ConfigError(
            f"config {variant.label}", reason, "Correct the config, or try it with mergekit-yaml"
        ) from error


def _require_next_token(model: ModelReference, options: MergeOptions) -> None:
    """
    Raises:
        ArchitectureError: if a model has no loss on texts.
    """
    config = require_config(model, trust_remote_code=options.trust_remote_code)
    if not predicts_text(config):
        name = next(iter(config.architectures or ()), type(config).__name__)
        reason = f"{name} does not predict the next token, so it has no loss on text"
        raise ArchitectureError(f"model {model}", reason, "Compare language models that write text")


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


def _in_a_line(error: Exception) -> str:
    """pydantic begins with a headline, YAML with the place."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:300].rstrip(".:") or describe(error)
