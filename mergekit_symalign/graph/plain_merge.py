"""Whether MergeKit's own merge would keep every tensor of a checkpoint: what a refusal may send a user to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import ModelArchitecture, WeightInfo, arch_info_for_config
from mergekit.architecture.auto import infer_architecture_info
from mergekit.architecture.conversion import convert_checkpoint_tensors
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_symalign.errors import ArchitectureError, CheckpointError, SymalignError
from mergekit_symalign.families.known import OTHERWISE
from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.graph.damaged import describe
from mergekit_symalign.graph.headers import Header
from mergekit_symalign.graph.names import Names, Place
from mergekit_symalign.graph.opening import open_headers
from mergekit_symalign.graph.silence import without_warnings

_SHOWN = 3
_OLD_BUFFERS = ("rotary_emb.inv_freq", "masked_bias", "attn.bias", "position_ids")  # where no model tells


def resolve_stored(config: Any, model: ModelReference) -> ModelLayout:
    """The layout of a model whose files may be here.

    Raises:
        ArchitectureError: as `resolve`, with what MergeKit's own merge would do with the checkpoint.
    """
    try:
        return resolve(config, model=str(model))
    except ArchitectureError as error:
        remedy = error.remedy.replace(OTHERWISE, otherwise(config, model))
        raise type(error)(error.where, error.reason, remedy) from error


def otherwise(config: Any, model: ModelReference) -> str:
    """What a user may do with a model that is not aligned: use MergeKit's own methods, if they lose nothing.

    Args:
        config: of transformers.
        model: whose files are looked at, unless they would have to be fetched first.
    """
    if LoaderCache().loaders.get(model) is None and (model.lora is not None or not Path(model.model.path).is_dir()):
        return OTHERWISE
    try:
        headers = open_headers(model).listed
    except SymalignError:
        return OTHERWISE
    return plain_merge(config, model, headers)


def plain_merge(config: Any, model: ModelReference, headers: Mapping[str, Header]) -> str:
    """What MergeKit's own merge would do with these stored tensors, as a remedy."""
    try:
        architecture = _architecture(config, model)
    except Exception as error:  # whatever MergeKit stumbles over
        return f"MergeKit's own methods cannot merge it either ({describe(error)})"
    try:
        planned = architecture.all_weights(config)
    except Exception:  # MergeKit's error is the whole config
        return "MergeKit's own methods cannot merge it either (they do not find its number of layers in the config)"
    names = _names(config, model)
    written, missing = _written(config, headers, planned, names)
    if missing:
        return f"MergeKit's own methods cannot merge it either (they look for a tensor {missing[0]})"
    if lost := _lost(headers, planned, written, names):
        return f"MergeKit's own merge would drop {shown(lost)}: its output would be incomplete. Do not use it"
    return "MergeKit's own methods merge all its tensors"


def shown(names: list[str]) -> str:
    """``5 tensors (a, b, c and 2 more)``."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({', '.join(names[:_SHOWN])}{more})"


def _architecture(config: Any, model: ModelReference) -> ModelArchitecture:
    """From MergeKit's files, or as it infers it from the checkpoint."""
    cache = LoaderCache()
    options = MergeOptions(
        trust_remote_code=cache.trust_remote_code,
        lazy_unpickle=cache.lazy_unpickle,
        transformers_cache=cache.hf_cache_dir,
        lora_merge_cache=cache.lora_cache_dir,
    )
    with without_warnings():  # of each architecture that is inferred
        return arch_info_for_config(config) or infer_architecture_info((model,), None, options)


def _written(
    config: Any, headers: Mapping[str, Header], planned: list[WeightInfo], names: Names | None
) -> tuple[set[str], list[str]]:
    """The tensors that MergeKit's merge writes, and those without which it stops.

    An optional tensor is planned if it is stored under one of its names. Any other is looked for under its names, then
    converted from what is stored, as MergeKit's `LoadTensor` does.
    """
    stored = {} if names is None else _by_place(names.places(headers))
    written, missing = set(), []
    for info in planned:
        own, tied = {info.name, *(info.aliases or ())}, {*(info.tied_names or ())}
        found = bool((own if info.optional else own | tied) & headers.keys())
        if found or (not info.optional and _converts(config, headers, stored.get(info.name, []), info.name)):
            written.add(info.name)
        elif not info.optional:
            missing.append(info.name)
    return written, missing


def _lost(
    headers: Mapping[str, Header], planned: list[WeightInfo], written: set[str], names: Names | None
) -> list[str]:
    """The stored tensors that the model computes with, and that no written one becomes."""
    if names is None:  # the model's code is not here: by names alone
        read = {name for info in planned for name in (info.name, *(info.aliases or ()))}
        return sorted(name for name in headers.keys() - read if not name.endswith(_OLD_BUFFERS))
    there = {name for place in names.places(written).values() for name in names.tied(place.name)}
    places = names.places(headers).items()
    return sorted(name for name, at in places if at.name not in there and not names.is_left_behind(name))


def _converts(config: Any, headers: Mapping[str, Header], pieces: list[str], target: str) -> bool:
    plain = {x: torch.empty(headers[x].shape, dtype=headers[x].dtype or torch.uint8, device="meta") for x in pieces}
    try:
        return convert_checkpoint_tensors(config.model_type, plain, target) is not None
    except Exception:  # pieces of other shapes, or too few of them
        return False


def _by_place(places: Mapping[str, Place]) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for stored, place in places.items():
        table.setdefault(place.name, []).append(stored)
    return table


def _names(config: Any, model: ModelReference) -> Names | None:
    """None where transformers cannot build the model, because its code is not in transformers."""
    try:
        return Names(config, str(model))
    except CheckpointError:
        return None
