"""The family files that ship with the package, and which of them describes a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from mergekit_symalign.errors import ArchitectureError
from mergekit_symalign.families.classes import LANGUAGE, classes_of, with_head
from mergekit_symalign.families.named import named_architecture
from mergekit_symalign.families.schema import Family, Wrapper
from mergekit_symalign.families.wrappers import text_class, wrapped

_ALSO, _EXTENDS = "also", "extends"
Raw = dict[str, Any]


@cache
def families() -> dict[str, Family]:
    """All families of the files that ship with the package, by name."""
    return families_of({name: raw for name, raw in _files().items() if not _is_wrapper(raw)})


@cache
def wrappers() -> dict[str, Wrapper]:
    """All files of models around a text model, by name."""
    return {name: Wrapper.model_validate(raw) for name, raw in _files().items() if _is_wrapper(raw)}


def families_of(raw: Mapping[str, Raw]) -> dict[str, Family]:
    """Validated families, by name.

    Args:
        raw: what the files hold, by name; one file may hold several families (``also``).

    Raises:
        ValueError: naming the family that does not fit the schema, or that no solver knows.
    """
    every = dict(item for name, own in raw.items() for item in _apart(name, own))
    return {name: Family.model_validate(_inherit(every, name)) for name in sorted(every)}


def supported_architectures() -> tuple[str, ...]:
    """transformers class names that some family describes."""
    return tuple(sorted({*_by_class(), *_wrapper_by_class()}))


def family_of(config: Any, model: str) -> Family:
    """The family of the model that a transformers config describes, with the head of its class.

    Raises:
        ArchitectureError: no family has this architecture.
    """
    supported = supported_architectures()
    name = named_architecture(config, model=model, supported=supported)
    wrapper = _wrapper_by_class().get(name)
    if wrapper is None:
        return _of_class(name, model, name)
    part = lookup(config, wrapper.config)
    known = wrapper.text_families.get(str(getattr(part, "model_type", None)))
    text = _of_class(text_class(part), model, name) if known is None else with_head(families()[known], LANGUAGE)
    return wrapped(wrapper, text)


def lookup(config: Any, key: str) -> Any:
    """``a.b`` in a config whose parts may be attributes or dict items; None where it is absent."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else getattr(config, part, None)
        if config is None:
            return None
    return config


def _of_class(name: str, model: str, shown: str) -> Family:
    known = _by_class()
    if name not in known:
        inside = "" if name == shown else f" around {name}"
        raise ArchitectureError(
            f"model {model}",
            f"architecture {shown}{inside} is not supported by the aligned methods",
            f"Supported: {', '.join(supported_architectures())}; use MergeKit's own method for others",
        )
    return known[name]


@cache
def _by_class() -> dict[str, Family]:
    return {arch: of for family in families().values() for arch, of in classes_of(family).items()}


@cache
def _wrapper_by_class() -> dict[str, Wrapper]:
    return {arch: wrapper for wrapper in wrappers().values() for arch in wrapper.architectures}


@cache
def _files() -> dict[str, Raw]:
    folder = files(__package__)
    return {f.name[:-5]: yaml.safe_load(f.read_text("utf-8")) for f in folder.iterdir() if f.name.endswith(".yaml")}


def _is_wrapper(raw: Raw) -> bool:
    return "passes_through" in raw


def _apart(name: str, raw: Raw) -> Iterator[tuple[str, Raw]]:
    """A file's own family, and those under ``also``, which extend it."""
    yield name, {key: value for key, value in raw.items() if key != _ALSO}
    for other, own in raw.get(_ALSO, {}).items():
        yield other, {_EXTENDS: name, "name": other, **own}


def _inherit(raw: Mapping[str, Raw], name: str) -> Raw:
    """A family file over the one it extends: mappings are merged, null removes an entry, all else is replaced."""
    own = dict(raw[name])
    parent = own.pop(_EXTENDS, None)
    return own if parent is None else _overlaid(_inherit(raw, parent), own)


def _overlaid(base: Mapping[str, Any], over: Mapping[str, Any]) -> Raw:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and "axes" not in value
        merged[key] = _overlaid(merged[key], value) if both else value
    return {key: value for key, value in merged.items() if value is not None}
