"""One table of names: what each stored tensor is called in the model that transformers builds from the config."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights

from mergekit_symalign.errors import ArchitectureError, CheckpointError
from mergekit_symalign.families.resolve import ModelLayout
from mergekit_symalign.families.stream import embedding_name, head_name, ties_embeddings
from mergekit_symalign.graph.linear import Linear, linear_layers

_MOVED = ("rotary_emb.inv_freq", "position_ids")  # buffers that were stored once


@dataclass(frozen=True)
class Place:
    """Where transformers puts a stored tensor.

    Attributes:
        name: of the parameter or buffer in the model.
        piece: whether it is converted: it is only a part of it, to be joined with others, or is to be taken apart.
        others: further parameters that it is taken apart into.
    """

    name: str
    piece: bool
    others: tuple[str, ...] = ()


class Names:
    """How transformers reads the checkpoints of one config: older names, prefixes, ties, and what it ignores.

    Args:
        config: the model's transformers config.
        model: its name, for errors.
    """

    def __init__(self, config: Any, model: str) -> None:
        self._model = _without_weights(config, model)
        transforms = get_model_conversion_mapping(self._model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._state = self._model.state_dict()
        self._parameters = frozenset(name for name, _ in self._model.named_parameters(remove_duplicate=False))

    def place(self, stored: str) -> Place | None:
        """Where transformers puts a tensor of this name; None if it has no place for it."""
        prefix = self._model.base_model_prefix
        name, pattern = rename_source_key(stored, self._renamings, self._converters, prefix, self._state)
        if name not in self._state and stored in self._state:
            name, pattern = stored, None
        return Place(name, pattern is not None, self._others(name, pattern)) if name in self._state else None

    def places(self, stored: Iterable[str]) -> dict[str, Place]:
        """Of all these tensors that have one."""
        found = ((name, self.place(name)) for name in stored)
        return {name: place for name, place in found if place is not None}

    def prefixed(self, name: str) -> str:
        """A tensor's name as models with a head have it, if this one lacks the prefix."""
        return f"{self._model.base_model_prefix}.{name}"

    def tied(self, name: str) -> frozenset[str]:
        """All names in the model of the parameter that has this one."""
        return self._ties.get(name, frozenset((name,)))

    def all_tied(self) -> frozenset[str]:
        """The names of all parameters that have more than one."""
        return frozenset(self._ties)

    def is_learned(self, name: str) -> bool:
        """Whether a tensor of the model is a parameter: a buffer (the bias of a router) has no gradients."""
        return name in self._parameters

    def is_left_behind(self, stored: str) -> bool:
        """Whether old checkpoints of this model carry such a tensor, and transformers passes over it in silence."""
        return self._silent is not None and self._silent.search(stored) is not None

    def _others(self, name: str, pattern: str | None) -> tuple[str, ...]:
        """What else is made of a tensor that a converter took for the first of its targets."""
        targets = (t.target_patterns for t in self._converters if pattern in t.source_patterns)
        first, *rest = next((found for found in targets if found[0] in name), [""])
        possible = (name.replace(first, other, 1) for other in rest)
        return tuple(other for other in possible if other in self._state)

    @cached_property
    def linear(self) -> Mapping[str, Linear]:
        """The linear layers, by the name of their weight in the model."""
        return linear_layers(self._model)

    @cached_property
    def _ties(self) -> Mapping[str, frozenset[str]]:
        groups: dict[int, set[str]] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), set()).add(name)
        return {name: frozenset(group) for group in groups.values() if len(group) > 1 for name in group}

    @cached_property
    def _silent(self) -> re.Pattern[str] | None:
        """As `PreTrainedModel._adjust_missing_and_unexpected_keys` puts it together."""
        buffers = [name for name, _ in self._model.named_buffers()]
        patterns = set(self._model._keys_to_ignore_on_load_unexpected or ())
        patterns |= {rf"(^|\.){re.escape(last)}$" for last in _MOVED if any(name.endswith(last) for name in buffers)}
        return re.compile("|".join(f"({pattern})" for pattern in sorted(patterns))) if patterns else None


class StoredNames:
    """The same for a model whose code transformers does not have: stored tensors are called as in the model.

    Args:
        layout: of the model.
        config: its transformers config.
    """

    def __init__(self, layout: ModelLayout, config: Any) -> None:
        self._layout = layout
        tied = (embedding_name(layout), head_name(layout)) if ties_embeddings(config, layout) else ()
        self._tied = frozenset(name for name in tied if name is not None)

    def place(self, stored: str) -> Place | None:
        return None if self._layout.claim(stored) is None else Place(self._layout.canonical(stored), False)

    def places(self, stored: Iterable[str]) -> dict[str, Place]:
        found = ((name, self.place(name)) for name in stored)
        return {name: place for name, place in found if place is not None}

    def prefixed(self, name: str) -> str:
        return self._layout.family.prefix + name

    def tied(self, name: str) -> frozenset[str]:
        return self._tied if name in self._tied else frozenset((name,))

    def all_tied(self) -> frozenset[str]:
        return self._tied

    def is_learned(self, name: str) -> bool:
        return True

    def is_left_behind(self, stored: str) -> bool:
        return stored.endswith(_MOVED)

    @property
    def linear(self) -> Mapping[str, Linear]:
        """
        Raises:
            ArchitectureError: always, as nothing tells which tensors are linear layers.
        """
        title = self._layout.family.title
        raise ArchitectureError(
            f"architecture {title}",
            "its code is not in transformers, and methods that use data have to run it",
            "Use a method without data",
        )


def names_of(config: Any, layout: ModelLayout, model: str) -> Names | StoredNames:
    """What the stored tensors of a model are called, whether or not transformers has its code."""
    known = hasattr(transformers, config.architectures[0])
    return Names(config, model) if known else StoredNames(layout, config)


def _without_weights(config: Any, model: str) -> PreTrainedModel:
    """The model that the config describes, without memory for its weights.

    Raises:
        CheckpointError: if transformers cannot build it.
    """
    try:
        model_type: Any = getattr(transformers, config.architectures[0])
        with torch.device("meta"), no_init_weights():
            built: PreTrainedModel = model_type._from_config(copy.deepcopy(config))
    except Exception as error:  # whatever a value of the config leads it to
        raise CheckpointError(
            f"model {model}", f"transformers cannot build it from its config ({error})", "Check its config.json"
        ) from error
    built.tie_weights()
    return built
