"""What configs say of the same weights: the values in which two models of a family compute different functions."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from typing import Any

from mergekit_symalign.families.resolve import ModelLayout

Differences = dict[str, tuple[Any, Any]]  # config key -> the anchor's value and the model's

HARMLESS: Mapping[str, tuple[str, ...]] = {
    "names and versions": ("architectures", "model_type", "_name_or_path", "*_version", "auto_map", "tokenizer_class"),
    "how weights are stored": ("dtype", "torch_dtype"),
    "tokens, which come with the tokenizer": ("*_token_id", "vocab_size"),
    "training only": (
        "*dropout*",
        "*_pdrop",
        "initializer_*",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "gradient_checkpointing",
        "problem_type",
        "sparse_pred*",
    ),
    "what a call returns": ("output_*", "return_dict", "use_cache", "id2label", "label2id", "num_labels"),
    "how the same numbers are computed": (
        "_*_implementation*",
        "pretraining_tp",
        "chunk_size_feed_forward",
        "deterministic_flash_attn",
        "reorder_and_upcast_attn",
    ),
    "heads that no family has": ("summary_*",),
}
"""Keys that do not change what the same weights compute at inference. Every other key does."""

_SHARED = ("transformers.masking_utils", "transformers.modeling_layers", "transformers.modeling_rope_utils")
_LENGTHS = ("max_position_embeddings", "n_positions")  # a limit, unless something below reads it
_INTO_ROPE_PARAMETERS = (
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    "global_rope_theta",
    "local_rope_theta",
    "rotary_emb_base",
    "rotary_pct",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)  # older names of what transformers puts into rope_parameters
_ROPE: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "linear": {"factor": None},
    "dynamic": {"factor": None},
    "yarn": {"factor": None, "original_max_position_embeddings": None, "attention_factor": None, "beta_fast": 32}
    | {"beta_slow": 1, "mscale": None, "mscale_all_dim": None, "truncate": True},
    "longrope": {"factor": None, "original_max_position_embeddings": None, "attention_factor": None}
    | {"short_factor": None, "long_factor": None},
    "llama3": {"factor": None, "original_max_position_embeddings": None, "low_freq_factor": None}
    | {"high_freq_factor": None},
    "proportional": {"factor": 1.0},
}  # what each kind of RoPE reads beside theta, with transformers' defaults; of an unknown kind everything counts
_ROPE_OF_ALL: Mapping[str, Any] = {
    "rope_type": "default",
    "rope_theta": None,
    "partial_rotary_factor": 1.0,
    "llama_4_scaling_beta": None,  # how much queries grow with the position
}
_WINDOW = ("sliding_window", "use_sliding_window")


def config_differences(anchor: Any, model: Any, layout: ModelLayout) -> Differences:
    """The config values in which a model computes something else from the same weights than the anchor.

    Values are compared after transformers has filled in its defaults. These keys do not count: `HARMLESS` ones,
    sizes that the layouts compare already, and names that transformers' code for these models does not contain.

    Args:
        anchor, model: transformers configs of one family.
        layout: the anchor's.
    """
    one, other = (_function(config, layout) for config in (anchor, model))
    found = {key: (one.get(key), other.get(key)) for key in {**one, **other}}
    different = {key: values for key, values in found.items() if not _same(*values)}
    if _head_stays(anchor, model, layout):
        different.pop("tie_word_embeddings", None)
    names = {name for config in (anchor, model) for name in _read_names(config, different)}
    return {key: different[key] for key in sorted(names)}


def _function(config: Any, layout: ModelLayout) -> dict[str, Any]:
    """The values that may matter, by dotted key."""
    values = dict(config.to_dict())
    sizes = {name.rpartition(".")[2] for name in layout.family.sizes.config_keys()}
    rope, dropped = _rope(config), set(sizes)
    if rope:
        dropped.update(("rope_parameters", *_INTO_ROPE_PARAMETERS))
    if not values.get("relative_attention") and not _reads_length(rope):
        dropped.update(_LENGTHS)
    kinds = values.get("layer_types")
    if kinds and not any("sliding" in str(kind) for kind in kinds):
        dropped.update(_WINDOW)
    padding = {"pad_token_id": values.get("pad_token_id")} if layout.family.positions_after_padding else {}
    return {**dict(_flat({key: x for key, x in values.items() if key not in dropped})), **rope, **padding}


def _rope(config: Any) -> dict[str, Any]:
    """The RoPE of each kind of layer, with defaults filled in and without what its type does not read."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, Mapping):
        return {}
    nested = {key: x for key, x in parameters.items() if isinstance(x, Mapping)}
    used = getattr(config, "layer_types", None) or nested
    found: dict[str, Any] = {}
    for kind, values in nested.items() if nested else [("", parameters)]:
        if kind in used or not nested:
            prefix = f"rope_parameters.{kind}." if kind else "rope_parameters."
            found |= {prefix + key: x for key, x in _rope_values(config, values).items()}
    return found


def _rope_values(config: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    kind = parameters.get("rope_type", "default")
    defaults = {**_ROPE_OF_ALL, **_ROPE.get(kind, parameters)}
    values = {key: x if (x := parameters.get(key)) is not None else default for key, default in defaults.items()}
    if kind == "dynamic" or ("factor" in values and values["factor"] is None):
        values["max_position_embeddings"] = config.max_position_embeddings
    return values


def _reads_length(rope: Mapping[str, Any]) -> bool:
    """Whether an unknown kind of RoPE may read how long a prompt can be."""
    return any(key.endswith("rope_type") and kind not in _ROPE for key, kind in rope.items())


def _head_stays(anchor: Any, model: Any, layout: ModelLayout) -> bool:
    """Whether the tie of embedding and head may differ: a merge writes a head of its own unless the anchor is tied."""
    matrices = [s for s in layout.outside.values() if len(s.axes) == 2 and s.axes[0] == "vocabulary"]
    return len(matrices) < 2 or not getattr(anchor, "tie_word_embeddings", False)


def _is_harmless(key: str) -> bool:
    return any(fnmatchcase(key, pattern) for patterns in HARMLESS.values() for pattern in patterns)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values that are not harmless; values of nested configs have a dotted key."""
    for key, x in values.items():
        if _is_harmless(key):
            continue
        if isinstance(x, Mapping) and x:
            yield from _flat(x, f"{prefix}{key}.")
        else:
            yield prefix + key, x


def _same(one: Any, other: Any) -> bool:
    """Whether two values say the same: a switch that is absent, null or false is off, and models of different depth
    may have one value for all of their layers."""
    if all(x is None or x is False for x in (one, other)):
        return True
    lists = isinstance(one, list) and isinstance(other, list) and len(one) != len(other) and one and other
    return bool(one == other or (lists and all(x == one[0] for x in one + other)))


def _read_names(config: Any, keys: Mapping[str, Any]) -> Iterator[str]:
    """The keys that the model's own code can read; for keys of the config's class, the code of all models."""
    own = _own_code(config)
    declared = getattr(type(config), "__dataclass_fields__", keys)
    aliases: dict[str, list[str]] = {}
    for alias, name in getattr(config, "attribute_map", {}).items():
        aliases.setdefault(name, []).append(alias)
    for key in keys:
        first, last = key.partition(".")[0], key.rpartition(".")[2]
        codes = [own, *map(_source, _SHARED)] if first in declared else [own]
        named = any(code is None or _names(name, code) for code in codes for name in (last, *aliases.get(last, ())))
        if named or first == "tie_word_embeddings":
            yield key


def _names(name: str, code: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", code) is not None


def _own_code(config: Any) -> str | None:
    """The source of the config's model; None if it is not one of transformers', or is not there."""
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    return _source(name) if name.startswith("transformers.models.") else None


@cache
def _source(module: str) -> str | None:
    try:
        return inspect.getsource(import_module(module))
    except (ImportError, OSError, TypeError):
        return None
