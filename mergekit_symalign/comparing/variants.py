"""One merge for each value to try: ``--set parameters.weight=0.3,0.5``."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from mergekit_symalign.errors import ConfigError

_FREE = "parameters"  # the only place of a config where a name may be new


@dataclass(frozen=True)
class Setting:
    """A place of a config, and the values to put there.

    Attributes:
        path: keys and indices.
        values: as YAML reads them.
    """

    path: tuple[str, ...]
    values: tuple[Any, ...]

    def __str__(self) -> str:
        return ".".join(self.path)

    @staticmethod
    def parse(text: str) -> Setting:
        """
        Raises:
            ConfigError: if it is not of the form path=value,value.
        """
        path, equals, values = text.partition("=")
        try:
            read = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError:
            read = None
        keys = tuple(path.strip().split("."))
        if not equals or not all(keys) or not read or any(x is None or isinstance(x, dict) for x in read):
            reason = "it is not of the form path=value,value"
            raise ConfigError(f"--set {text}", reason, "Write it like --set parameters.weight=0.3,0.5")
        return Setting(keys, tuple(read))


@dataclass(frozen=True)
class Variant:
    """A merge to make.

    Attributes:
        label: in the table.
        config: what MergeKit is given.
        values: what was set, by path.
    """

    label: str
    config: Mapping[str, Any]
    values: Mapping[str, Any]

    @property
    def text(self) -> str:
        """As YAML."""
        return yaml.safe_dump(dict(self.config), sort_keys=False, allow_unicode=True)


def variants(
    configs: Mapping[str, Mapping[str, Any]], settings: Sequence[Setting], fields: Sequence[str]
) -> list[Variant]:
    """Every config with every combination of values; equal ones once.

    Args:
        configs: by name.
        settings: what to try.
        fields: the names that a config may have at its top.

    Raises:
        ConfigError: if a config has no such place.
    """
    names = _short([setting.path for setting in settings])
    found: dict[str, Variant] = {}
    for name, config in configs.items():
        for values in itertools.product(*(setting.values for setting in settings)):
            changed = copy.deepcopy(dict(config))
            for setting, value in zip(settings, values, strict=True):
                _put(changed, setting, value, name, fields)
            words = [_said(*x) for x in zip(names, values, strict=True)]
            label = " ".join(words if len(configs) == 1 and words else [name, *words])
            made = Variant(label, changed, {str(s): value for s, value in zip(settings, values, strict=True)})
            found.setdefault(json.dumps(changed, sort_keys=True, default=str), made)
    return list(found.values())


def _put(config: dict[str, Any], setting: Setting, value: Any, name: str, fields: Sequence[str]) -> None:
    """Change one place of a config."""
    place: Any = config
    *above, last = setting.path
    if setting.path[0] not in fields:
        raise _no_place(setting, name, f"a merge has no {setting.path[0]}", f"It has {', '.join(sorted(fields))}")
    for i, key in enumerate(above):
        place = _step(place, key, setting, name, ".".join(setting.path[:i]))
    if isinstance(place, list):
        place[_index(place, last, setting, name)] = value
    elif isinstance(place, dict) and (last in place or not above or above[-1] == _FREE):
        place[last] = value
    else:
        raise _no_place(setting, name, f"{'.'.join(above)} has no {last}", "Name a place that the config has")


def _step(place: Any, key: str, setting: Setting, name: str, so_far: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, key, setting, name)]
    if isinstance(place, dict) and key == _FREE and place.get(key) is None:
        place[key] = {}
    if isinstance(place, dict) and isinstance(place.get(key), (dict, list)):
        return place[key]
    raise _no_place(setting, name, f"{so_far or 'it'} has no {key} with something inside", "Name a place that it has")


def _index(place: list[Any], key: str, setting: Setting, name: str) -> int:
    if not key.isdigit() or int(key) >= len(place):
        reason = f"{key} is no index of a list of {len(place)}"
        raise _no_place(setting, name, reason, "Count from 0")
    return int(key)


def _no_place(setting: Setting, name: str, reason: str, remedy: str) -> ConfigError:
    return ConfigError(f"--set {setting} in {name}", reason, remedy)


def _short(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """The last word of each path, or all of it where two end alike."""
    lasts = [path[-1] for path in paths]
    return [last if lasts.count(last) == 1 else ".".join(path) for last, path in zip(lasts, paths, strict=True)]


def _said(name: str, value: Any) -> str:
    """``weight=0.3``, and of a method its name."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if name == "merge_method" else f"{name}={text}"


def parameter_names(settings: Sequence[Setting]) -> Iterator[tuple[Setting, str]]:
    """The names of parameters that are set."""
    return ((s, s.path[-1]) for s in settings if len(s.path) > 1 and s.path[-2] == _FREE)
