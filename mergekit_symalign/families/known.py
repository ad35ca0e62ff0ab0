"""The family files that ship with the package, and which of them describes a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from mergekit_symalign.errors import ArchitectureError
from mergekit_symalign.families.classes import LANGUAGE, class_of, classes_of, with_head
from mergekit_symalign.families.combinations import require_known
from mergekit_symalign.families.named import named_architecture
from mergekit_symalign.families.readers import with_readers
from mergekit_symalign.families.schema import Family, Wrapper
from mergekit_symalign.families.wrappers import text_class, without_pictures, wrapped

_ALSO, _EXTENDS, _TITLE = "also", "extends", "title"  # a file without a title is a part of others
OTHERWISE = (
    "MergeKit's own methods may merge it: check that their output has every tensor of the model, as they drop what "
    "MergeKit's architecture files do not list"
)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same in C, if PyYAML was built with it
Raw = dict[str, Any]
Model = TypeVar("Model", bound=BaseModel)


@cache
def families() -> dict[str, Family]:
    """All families of the files that ship with the package, by name."""
    return {name: family_named(name) for name in _titled(_of_package())}


@cache
def family_named(name: str) -> Family:
    """One family of the files that ship with the package: to read and check all of them takes half a second."""
    return _checked(name, _inherit(_of_package(), name))


@cache
def wrappers() -> dict[str, Wrapper]:
    """All files of models around a text model, by name."""
    return {name: _validated(Wrapper, raw, name) for name, raw in _files().items() if _is_wrapper(raw)}


def families_of(raw: Mapping[str, Raw]) -> dict[str, Family]:
    """Validated families, by name.

    Args:
        raw: what the files hold, by name; one file may hold several families (``also``).

    Raises:
        ArchitectureError: naming the family that does not fit the schema, or that combines what no solver knows.
    """
    every = _every(raw)
    return {name: _checked(name, _inherit(every, name)) for name in _titled(every)}


def classes_in(path: Path) -> dict[str, Family | Wrapper]:
    """The classes that a file describes, which need not be in the package and may extend families that are.

    Returns:
        The family of each class, with its head; the wrapper of classes around a text model (`family_around`).

    Raises:
        ArchitectureError: if it cannot be read, or as `families_of`.
    """
    try:
        own = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ArchitectureError(f"file {path}", f"it cannot be read ({error})", "Name a family file") from error
    if not isinstance(own, dict) or not isinstance(own.get("name"), str):
        raise ArchitectureError(f"file {path}", "it is no family file: it has no name", "Name a family file")
    if _is_wrapper(own):
        wrapper = _validated(Wrapper, own, own["name"])
        return dict.fromkeys(wrapper.architectures, wrapper)
    others = {name: raw for name, raw in _files().items() if not _is_wrapper(raw)}
    found = families_of({**others, own["name"]: own})
    return {arch: of for name, _ in _apart(own["name"], own) for arch, of in classes_of(found[name]).items()}


def supported_architectures() -> tuple[str, ...]:
    """transformers class names that some family describes."""
    return tuple(sorted({*_by_class(), *_wrapper_by_class()}))


def title_of(architecture: str) -> str:
    """The title of the family that describes a supported class."""
    wrapper = _wrapper_by_class().get(architecture)
    return _by_class()[architecture].title if wrapper is None else wrapper.title


def family_of(config: Any, model: str) -> Family:
    """The family of the model that a transformers config describes, with the head of its class.

    Raises:
        ArchitectureError: no family has this architecture.
    """
    name = named_architecture(config, model=model, supported=supported_architectures)
    wrapper = _wrapper_by_class().get(name)
    return _of_class(name, model, name) if wrapper is None else family_around(wrapper, config, model)


def family_around(wrapper: Wrapper, config: Any, model: str) -> Family:
    """The family of a model around a text model, which its config tells.

    Raises:
        ArchitectureError: no family has the architecture of the text model.
    """
    return wrapped(wrapper, _text_family(wrapper, config, model))


def family_inside(outer: Any, config: Any, model: str) -> Family | None:
    """The family of a text model by the names that its tensors have inside a model around a text model.

    Args:
        outer: config of the model around a text model.
        config: of a text model.
        model: whose it is, for errors.

    Returns:
        None if the text model is of another kind than the one inside.
    """
    wrapper = _wrapper_by_class()[named_architecture(outer, model=model, supported=supported_architectures)]
    inside, own = _text_family(wrapper, outer, model), family_of(config, model)
    return wrapped(without_pictures(wrapper), inside) if own == inside else None


def _text_family(wrapper: Wrapper, config: Any, model: str) -> Family:
    part = lookup(config, wrapper.config)
    known = wrapper.text_families.get(str(getattr(part, "model_type", None)))
    return (
        _of_class(text_class(part), model, wrapper.name) if known is None else with_head(family_named(known), LANGUAGE)
    )


def lookup(config: Any, key: str) -> Any:
    """``a.b`` in a config whose parts may be attributes or dict items; None where it is absent."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else getattr(config, part, None)
        if config is None:
            return None
    return config


def _of_class(name: str, model: str, shown: str) -> Family:
    listed = _listed().get(name)
    if listed is not None:
        return class_of(family_named(listed), name)
    known = _by_class()
    if name not in known:
        what = f"architecture {name}" if name == shown else f"text model {name} inside a {shown} model"
        raise ArchitectureError(
            f"model {model}", f"{what} is not supported by the aligned methods", f"{_nearest(name)}. {OTHERWISE}"
        )
    return known[name]


def _nearest(name: str) -> str:
    """The supported classes whose names are like this one, and where all are listed."""
    supported = supported_architectures()
    near = get_close_matches(name, supported, n=3)
    named = f", the nearest by name {' or '.join(near)}" if near else ""
    return f"{len(supported)} classes are supported{named}; mergekit-symalign families lists all"


@cache
def _by_class() -> dict[str, Family]:
    return {arch: of for family in families().values() for arch, of in classes_of(family).items()}


@cache
def _listed() -> dict[str, str]:
    """The name of the family of each class that a file names itself."""
    every = _of_package()
    return {arch: name for name in _titled(every) for arch in every[name].get("architectures", ())}


@cache
def _of_package() -> dict[str, Raw]:
    return _every({name: raw for name, raw in _files().items() if not _is_wrapper(raw)})


def _every(raw: Mapping[str, Raw]) -> dict[str, Raw]:
    """The families of some files, and the parts that they extend, as they are written."""
    return dict(item for name, own in raw.items() for item in _apart(name, own))


def _titled(every: Mapping[str, Raw]) -> list[str]:
    """The names of those that are families."""
    return [name for name in sorted(every) if _TITLE in every[name]]


def _checked(name: str, raw: Raw) -> Family:
    family = _validated(Family, with_readers(raw), name)
    require_known(family)
    return family


@cache
def _wrapper_by_class() -> dict[str, Wrapper]:
    return {arch: wrapper for wrapper in wrappers().values() for arch in wrapper.architectures}


@cache
def _files() -> dict[str, Raw]:
    folder = files(__package__)
    return {f.name[:-5]: yaml.load(f.read_text("utf-8"), _LOADER) for f in folder.iterdir() if f.name.endswith(".yaml")}


def _validated(kind: type[Model], raw: Raw, name: str) -> Model:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = (
            f"{where} is {first['input']!r}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")
        )
        raise ArchitectureError(f"family {name}", reason, "Correct the file") from error


def _is_wrapper(raw: Raw) -> bool:
    return "passes_through" in raw


def _apart(name: str, raw: Raw) -> Iterator[tuple[str, Raw]]:
    """A file's own family, and those under ``also``, which extend it."""
    yield name, {key: value for key, value in raw.items() if key != _ALSO}
    for other, own in raw.get(_ALSO, {}).items():
        yield other, {_EXTENDS: name, "name": other, **own}


def _inherit(raw: Mapping[str, Raw], name: str) -> Raw:
    """A family file over those it extends: mappings are merged, null removes an entry, or all that fit a pattern, and
    all else is replaced.

    Of several that it extends, the first gives all that it has, the others what their own files say.
    """
    own = dict(raw[name])
    parents = own.pop(_EXTENDS, None) or ()
    parents = (parents,) if isinstance(parents, str) else tuple(parents)
    for parent in parents:
        if parent not in raw:
            raise ArchitectureError(f"family {name}", f"it extends {parent}, which there is not", "Correct the file")
    found = _inherit(raw, parents[0]) if parents else {}
    for parent in parents[1:]:
        found = _overlaid(found, {key: value for key, value in raw[parent].items() if key != _EXTENDS})
    return _overlaid(found, own) if parents else own


def _overlaid(base: Mapping[str, Any], over: Mapping[str, Any]) -> Raw:
    gone = [key for key, value in over.items() if value is None]
    merged = {key: value for key, value in base.items() if not any(fnmatchcase(key, pattern) for pattern in gone)}
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and "axes" not in value
        merged[key] = _overlaid(merged[key], value) if both else value
    return {key: value for key, value in merged.items() if value is not None}
