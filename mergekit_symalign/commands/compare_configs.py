"""What a comparison is asked for, and its merge configs: read, varied, and planned before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import yaml
from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import _model_out_config, get_architecture_info
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_symalign.commands.common import parsed
from mergekit_symalign.commands.whole_models import silent
from mergekit_symalign.comparing.tasks import Harness
from mergekit_symalign.comparing.variants import Setting, Variant, parameter_names, variants
from mergekit_symalign.errors import ConfigError, SymalignError
from mergekit_symalign.graph.damaged import describe
from mergekit_symalign.graph.fresh import forget_architectures
from mergekit_symalign.graph.planner import before_merge
from mergekit_symalign.planned_methods import PlannedMethod

DEFAULT_TOKENS = 65536  # of a file
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


def averages(anchor: str, model: str) -> dict[str, Any]:
    """The config of the average of two models, half and half."""
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in (anchor, model)]
    return {_METHOD: "linear", "base_model": anchor, "models": models}


def sources(asked: Asked) -> tuple[list[Variant], list[ModelReference]]:
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


def validated(variant: Variant) -> MergeConfiguration:
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


def require_known(settings: Sequence[Setting], configs: Sequence[MergeConfiguration]) -> None:
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


def require_planned(variant: Variant, config: MergeConfiguration, options: MergeOptions) -> None:
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


def _in_a_line(error: Exception) -> str:
    """pydantic begins with a headline, YAML with the place."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:300].rstrip(".:") or describe(error)
