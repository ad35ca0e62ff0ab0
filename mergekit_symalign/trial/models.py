"""Small random models of any transformers class, with weights sharp enough that a wrong transform shows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from copy import deepcopy
from importlib import import_module
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from mergekit_symalign.errors import ConfigError
from mergekit_symalign.families.known import families
from mergekit_symalign.families.schema import Family

_SIZES = {"layers": 2, "hidden": 48, "query_heads": 6, "kv_heads": 2, "head_dim": 8, "neurons": 80, "experts": 4}
_SIZES |= {"dense": 64, "groups": 2}
_SIZES |= {"nope": 8, "rope": 4, "value": 12, "kv_latent": 16, "q_latent": 20}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
_TEXT = {"vocab_size": 97, "max_position_embeddings": 128, "num_experts_per_tok": 2, "num_labels": 2} | _TOKENS
_TEXT |= {"topk_group": 1}
_VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
_PICTURES = {"image_size": 28, "patch_size": 14, "num_patches": 4}
_VISION |= _PICTURES | {"depth": 4, "num_heads": 4, "num_position_embeddings": 16}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}  # of the 4 planes of a head
_INTO_TEXT = ("out_hidden_size", "projection_dim")  # widths of what a tower writes to the residual stream
_DECODE_THEIR_INPUT = ("ForSequenceClassification", "ForQuestionAnswering")


class EverythingInFloat64(TorchFunctionMode):
    """transformers computes norms and rotary tables in float32 whatever the model's dtype: here in float64."""

    def __enter__(self) -> TorchFunctionMode:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self._default)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


def small_model(name: str, family: Family, settings: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """A model of two layers and a few dozen coordinates, not yet random.

    Args:
        name: of a transformers class.
        family: that describes it; its ``sizes`` say which config keys to set.
        settings: of the config, over what is chosen here; a mapping goes into a config inside it.

    Raises:
        ConfigError: if transformers has no such class, or cannot build it so small.
    """
    model_type = class_of(name)
    own = _small_config(model_type, family)
    for key, value in (settings or {}).items():
        own[key] = own.get(key, {}) | value if isinstance(value, Mapping) else value
    try:
        config = model_type.config_class(**own, architectures=[name])
        model: PreTrainedModel = model_type._from_config(config, experts_implementation="eager")
    except Exception as error:  # whatever the sizes lead it to
        raise ConfigError(
            f"class {name}", f"transformers cannot build a small one ({error})", "Say what it needs with --set"
        ) from error
    return model.double().eval()


def class_of(name: str) -> Any:
    """A transformers class.

    Raises:
        ConfigError: if transformers has none of this name.
    """
    found = getattr(transformers, name, None)
    if found is None:
        raise ConfigError(
            f"class {name}", "the installed transformers has none of this name", "Choose one with --class"
        )
    return found


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Sharp weights, norms away from 1, and biases away from 0, in place."""
    generator = torch.Generator().manual_seed(seed)
    kept, buffers = model.state_dict().keys(), model.named_buffers()
    biases = ((name, x) for name, x in buffers if name in kept and name.endswith("bias") and x.is_floating_point())
    fixed = set(getattr(model, "_keys_to_ignore_on_save", None) or ())  # sinusoids that checkpoints do not have
    for name, x in (*model.named_parameters(), *biases):
        if name in fixed:
            continue
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if x.ndim >= 2 and "norm" not in name:
            x.copy_(noise * 1.5 / x.shape[-1] ** 0.5)
        else:
            x.copy_(0.5 * noise if name.endswith("bias") else 1 + 0.3 * noise)
    return model


@torch.no_grad()
def outputs(model: PreTrainedModel, seed: int = 0, **more: Tensor) -> Tensor:
    """What a model in float64 computes of random tokens (images or sounds, where it knows no tokens).

    Args:
        model: in float64.
        seed: of the inputs.
        more: inputs beside the tokens; ``input_ids`` among them replaces those.
    """
    inputs = _inputs(model, torch.Generator().manual_seed(seed))
    with EverythingInFloat64():
        found: Tensor = model(**inputs | more)[0]
    return found


def _inputs(model: PreTrainedModel, generator: torch.Generator) -> dict[str, Tensor]:
    config = model.config.get_text_config()
    if model.main_input_name == "pixel_values":
        return _pictures(getattr(model.config, "vision_config", model.config), generator)
    if model.main_input_name == "input_features":
        size = (3, config.num_mel_bins, 2 * config.max_source_positions)
        sounds = {"input_features": torch.randn(size, generator=generator, dtype=torch.float64)}
        return sounds | (_decoded(config, generator) if hasattr(model, "get_decoder") else {})
    shape = (3, 2, 24) if type(model).__name__.endswith("MultipleChoice") else (3, 24)
    ids = torch.randint(3, min(config.vocab_size, 80), shape, generator=generator)
    if not config.is_encoder_decoder:
        both = hasattr(model, "logit_scale") and hasattr(model.config, "vision_config")  # compares texts with pictures
        return {"input_ids": ids} | (_pictures(model.config.vision_config, generator) if both else {})
    ids[:, -1] = config.eos_token_id  # classifiers look for it
    decodes = "Encoder" not in type(model).__name__ and not type(model).__name__.endswith(_DECODE_THEIR_INPUT)
    return {"input_ids": ids} | (_decoded(config, generator) if decodes else {})


def _decoded(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Tokens for a decoder."""
    ids = torch.randint(3, min(config.vocab_size, 80), (3, 20), generator=generator)
    ids[:, -1] = config.eos_token_id
    return {"decoder_input_ids": ids}


def _pictures(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Square ones; as patches, and how many there are of them, where a model takes pictures of any shape."""
    if not hasattr(config, "image_size"):
        patches = (3, config.num_patches, config.num_channels * config.patch_size**2)
        side = int(config.num_patches**0.5)
        return {
            "pixel_values": torch.randn(patches, generator=generator, dtype=torch.float64),
            "pixel_attention_mask": torch.ones(patches[:2], dtype=torch.int64),
            "spatial_shapes": torch.full((3, 2), side),
        }
    size = (3, config.num_channels, config.image_size, config.image_size)
    return {"pixel_values": torch.randn(size, generator=generator, dtype=torch.float64)}


def with_weights(model: PreTrainedModel, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model of the same config with other weights."""
    copy = type(model)(deepcopy(model.config)).double().eval()
    copy.load_state_dict(state, strict=False)
    copy.tie_weights()
    return copy


def relative_deviation(a: Tensor, b: Tensor) -> float:
    """Largest difference, in standard deviations of ``a``."""
    return float((a.double() - b.double()).abs().max() / a.double().std())


def _small_config(model_type: Any, family: Family) -> dict[str, Any]:
    sizes = {key: where for key, where in family.sizes.named().items() if key in _SIZES}
    alike = {"kv_heads": _SIZES["query_heads"]} if family.sizes.kv_latent else {}
    text: dict[str, Any] = {where: (_SIZES | alike)[key] for key, where in sizes.items()} | _TEXT
    whole = model_type.config_class()
    text |= _kinds_of_layers(getattr(whole, family.config) if family.config else whole, family)
    if not family.config:
        return text | _small_pictures(whole) | _sizes_of_towers(family)
    if _has_sections(model_type, getattr(whole, family.config)):
        text["rope_parameters"] = deepcopy(_MROPE)  # configs write into it
    vision = getattr(whole, "vision_config", None)
    known = getattr(vision, "__dataclass_fields__", None) or vars(vision or object)
    own: dict[str, Any] = {family.config: {"model_type": getattr(whole, family.config).model_type} | text}
    written = dict.fromkeys(_INTO_TEXT, _SIZES["hidden"])
    small = {key: value for key, value in (_VISION | written).items() if key in known}
    around = {key: value for key, value in written.items() if hasattr(whole, key)}
    pictures = {key: x for key, x in _PICTURES.items() if key in known} if family.config == "vision_config" else small
    kind = {"model_type": getattr(vision, "model_type", None)}
    return own | around | {"vision_config": kind | own.get("vision_config", {}) | pictures}


def _has_sections(model_type: Any, text_config: Any) -> bool:
    """Whether RoPE turns parts of a head by different positions; the text model's code may be another model's."""
    modules = (model_type.__module__, type(text_config).__module__.replace(".configuration_", ".modeling_"))
    return any("mrope_section" in inspect.getsource(import_module(name)) for name in modules)


def _kinds_of_layers(config: Any, family: Family) -> dict[str, Any]:
    """One layer of each kind, where layers are of two kinds with other tensors."""
    chosen = family.layer_kinds and "layer_types" in getattr(type(config), "__dataclass_fields__", ())
    kinds = list(dict.fromkeys(config.layer_types or ())) if chosen else []
    return {"layer_types": kinds} if len(kinds) == _SIZES["layers"] else {}


def _small_pictures(config: Any) -> dict[str, Any]:
    """Of a model that looks at pictures alone."""
    return {key: value for key, value in _PICTURES.items() if key in vars(config)}


def _sizes_of_towers(family: Family) -> dict[str, Any]:
    """Of the other stacks of layers that the same config describes."""
    others = [families()[tower.family].sizes for tower in family.towers.values() if tower.family and not tower.config]
    return {where: _SIZES[key] for sizes in others for key, where in sizes.named().items() if key in _SIZES}
