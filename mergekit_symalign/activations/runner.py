"""Running a transformers model one layer at a time, with weights that are handed in and let go again.

The model is built without weights. It runs once on the prompts with its layers replaced by recorders. They give the
first hidden states, and the arguments that the model hands to each layer: masks, rotary tables, windows. Then the
model's own layer modules are called with these, one after another, each with its own weights. What follows the last
layer (norms, heads, soft caps) runs in the same way: the model once more, with layers that hand on the hidden states.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from mergekit_symalign.errors import ArchitectureError
from mergekit_symalign.families.resolve import ModelLayout
from mergekit_symalign.families.schema import MlpKind, TensorSpec
from mergekit_symalign.families.stream import is_gain
from mergekit_symalign.symmetry.by_activations.experts import Routing
from mergekit_symalign.symmetry.element import Fused, fused_parts
from mergekit_symalign.symmetry.residual.kinds import STREAM

OUTPUTS = frozenset(("query", "key", "value"))  # axes seen where a tensor writes them
INPUTS = frozenset(("attended", "down", "shared.down", "dense.down"))  # axes seen where a tensor reads them
EXPERTS = "expert"  # the axis that a router writes
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Batch:
    """Some prompts as tokens, padded on the right.

    Attributes:
        ids: int64 [prompts, tokens].
        valid: bool [prompts, tokens]; false on padding.
    """

    ids: Tensor
    valid: Tensor

    def inputs(self) -> dict[str, Any]:
        """As the model wants them."""
        return {"input_ids": self.ids, "attention_mask": self.valid.long(), "use_cache": False}


@dataclass(frozen=True)
class Recorded:
    """What a model hands to its layers for one batch, as plain tensors and structure.

    Attributes:
        hidden: [prompts, tokens, hidden size], what enters the first layer.
        tensors: every tensor among the arguments, once.
        calls: positional arguments (after the hidden states) and keyword arguments of each layer; a tensor stands as
            its `_Slot` among ``tensors``.
    """

    hidden: Tensor
    tensors: tuple[Tensor, ...]
    calls: tuple[Any, ...]

    def arguments(self, layer: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = _filled(self.calls[layer], self.tensors)
        return args, kwargs


@dataclass
class Activations:
    """What a layer computes for one batch.

    Attributes:
        tokens: by axis [prompts, tokens, axis].
        positions: by axis [positions, axis], where the layer projects relative positions like tokens (DeBERTa).
        routing: what its experts are given, for prompts × tokens.
        normed: by name of their gains, what the norms on the residual stream read [prompts, tokens, hidden size].
    """

    tokens: dict[str, Tensor] = field(default_factory=dict)
    positions: dict[str, Tensor] = field(default_factory=dict)
    routing: Routing | None = None
    normed: dict[str, Tensor] = field(default_factory=dict)


def require_runs(layout: ModelLayout, model: str) -> None:
    """
    Raises:
        ArchitectureError: if the layers of a model cannot be run one after another on prompts or images.
    """
    if not layout.family.runs:
        raise ArchitectureError(
            f"model {model}",
            f"{layout.family.title} has several stacks of layers with inputs of their own, which cannot be run one "
            "layer after another on prompts",
            "Use objective: weights, and a method that needs no data",
        )


class LayerRunner:
    """One model without weights.

    Args:
        config: its transformers config.
        layout: its tensors and their axes.
        attention: how transformers computes it; ``eager`` where the model does not know another one.
    """

    def __init__(self, config: Any, layout: ModelLayout, attention: str = "eager") -> None:
        self.layout = layout
        config = copy.deepcopy(config)
        model_type = getattr(transformers, config.architectures[0], transformers.AutoModelForCausalLM)
        build = getattr(model_type, "_from_config", None) or model_type.from_config
        known = attention == "eager" or getattr(model_type, f"_supports_{attention}", False)
        with init_empty_weights(include_buffers=False):
            model = build(config, attn_implementation=attention if known else "eager", experts_implementation="eager")
        model.tie_weights()  # building it without weights takes them apart
        self.model = model.eval().requires_grad_(False)
        path = layout.name(0, "").rstrip(".").rpartition(".")[0]
        self.layers: nn.ModuleList = self.model.get_submodule(path)
        self._in_tuples = layout.family.layers_return_tuples

    @torch.inference_mode()
    def record(self, batch: Batch, weights: Mapping[str, Tensor]) -> Recorded:
        """`embed`, without gradients."""
        return self.embed(batch, weights)

    def embed(self, batch: Batch, weights: Mapping[str, Tensor]) -> Recorded:
        """Run everything in front of the layers, and note what each layer would be called with.

        Args:
            batch: the prompts.
            weights: the tensors outside the layers that the embedding needs, by name.
        """
        self.move_buffers(batch.valid.device)
        calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def recorder(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append((hidden, args, kwargs))
            if len(calls) == len(self.layers):
                raise _LastLayerReachedError
            return self._returned(hidden)

        with _replaced(self.layers, recorder), suppress(_LastLayerReachedError):
            functional_call(self.model, dict(weights), (), self.inputs(batch), tie_weights=False)
        slots = _Slots()
        structure = tuple(slots.emptied((args, kwargs)) for _, args, kwargs in calls)
        return Recorded(calls[0][0], tuple(map(_within_float32, slots.tensors)), structure)

    @torch.inference_mode()
    def run(
        self, layer: int, weights: Mapping[str, Tensor], hidden: Tensor, recorded: Recorded, seen: frozenset[str]
    ) -> tuple[Tensor, Activations]:
        """One layer on one batch.

        Args:
            layer: its index.
            weights: its tensors by their name inside the layer.
            hidden: [prompts, tokens, hidden size].
            recorded: the arguments of the batch.
            seen: the axes whose activations are wanted.

        Returns:
            The hidden states after the layer, and the activations of each axis.
        """
        with _watched(self.layers[layer], self.layout, seen) as activations:
            out = self.call(layer, weights, hidden, recorded)
        flat = {axis: x.unflatten(0, hidden.shape[:2]) for axis, x in activations.tokens.items() if x.ndim == 2}
        activations.tokens.update(flat)  # some mixtures put the tokens of all prompts in one row
        return out, activations

    def call(self, layer: int, weights: Mapping[str, Tensor], hidden: Tensor, recorded: Recorded) -> Tensor:
        """The hidden states after one layer. Takes what `run` takes."""
        self.move_buffers(hidden.device)
        args, kwargs = recorded.arguments(layer)
        out = functional_call(self.layers[layer], dict(weights), (hidden, *args), kwargs)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

    @torch.inference_mode()
    def finish(self, batch: Batch, weights: Mapping[str, Tensor], hidden: Tensor) -> Any:
        """`head`, without gradients."""
        return self.head(batch, weights, hidden)

    def head(self, batch: Batch, weights: Mapping[str, Tensor], hidden: Tensor) -> Any:
        """Run everything after the layers.

        Args:
            batch: the prompts.
            weights: all tensors outside the layers, by name.
            hidden: [prompts, tokens, hidden size], what leaves the last layer.

        Returns:
            The model's output.
        """
        self.move_buffers(hidden.device)
        with _replaced(self.layers, lambda *_, **__: self._returned(hidden)):
            return functional_call(self.model, dict(weights), (), self.inputs(batch))

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """A batch as this model wants it: where answers are chosen from, each prompt is the only one."""
        found = batch.inputs()
        if not type(self.model).__name__.endswith("ForMultipleChoice"):
            return found
        return {name: x.unsqueeze(1) if isinstance(x, Tensor) else x for name, x in found.items()}

    def gate_activation(self) -> Any:
        """The nonlinearity of the experts; None where they do more than multiply up by it (`gated`)."""
        return next((module.act_fn for module in self.layers.modules() if hasattr(module, "act_fn")), None)

    def gated(self) -> Any:
        """What the experts make of gate and up, a function of both; None if it is ``act(gate) · up``."""
        if self.layout.family.mlp is not MlpKind.clamped:
            return None
        whole: Any = next(m._apply_gate for m in self.layers.modules() if hasattr(m, "_apply_gate"))
        return lambda gate, up: whole(torch.stack((gate, up), dim=-1).flatten(-2))

    def _returned(self, hidden: Tensor) -> Any:
        return (hidden, None) if self._in_tuples else hidden

    def move_buffers(self, device: torch.device) -> None:
        """Rotary tables and the like to where the weights are."""
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer is not None and buffer.device != device:
                    setattr(module, name, buffer.to(device))


class _LastLayerReachedError(Exception):
    """Nothing after the layers is wanted: its weights are not there."""


@contextmanager
def _replaced(layers: nn.ModuleList, forward: Any) -> Iterator[None]:
    """Inside, every layer is this function."""
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _watched(layer: nn.Module, layout: ModelLayout, seen: frozenset[str]) -> Iterator[Activations]:
    """Inside, the activations of some axes are noted wherever the layer's tensors write or read them."""
    found = Activations()
    handles = []
    modules = dict(layer.named_modules())
    for part, spec in layout.inside.items() if seen else ():
        name, _, kind = part.rpartition(".")
        if STREAM in seen and is_gain(part, spec) and name in modules:
            handles.append(modules[name].register_forward_pre_hook(_note_normed(part, found)))
        axes = layout.axes(spec)
        if EXPERTS in seen and EXPERTS in spec.axes and axes.joined is not None and name in modules:
            handles.append(modules[name].register_forward_pre_hook(_note_chosen(found)))
        if kind != "weight" or len(axes.names) != 2 or axes.joined is not None or name not in modules:
            continue
        first, second = (_of_block(axis, spec) for axis in axes.names)
        module = modules[name]
        written, read = (second, first) if isinstance(module, Conv1D) else (first, second)
        if seen & OUTPUTS & _names(written):
            handles.append(module.register_forward_hook(_note_output(written, found)))
        if seen & INPUTS & _names(read):
            handles.append(module.register_forward_pre_hook(_note_input(read, found)))
        if EXPERTS in seen and written == EXPERTS:
            handles.append(module.register_forward_hook(_note_routing(layer, found)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _of_block(axis: str | Fused, spec: TensorSpec) -> str | Fused:
    """An axis as family files name it: the MLPs of one layer have neurons of their own."""
    return spec.block.prefix + axis if isinstance(axis, str) and spec.block is not None else axis


def _names(axis: str | Fused) -> set[str]:
    return {axis} if isinstance(axis, str) else {name for name, _ in axis.parts}


def _note_output(axis: str | Fused, found: Activations) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        for name, x in _parts(output, axis).items():
            if name in found.tokens:  # tokens come first (transformers, DisentangledSelfAttention)
                found.positions[name] = x.flatten(0, 1)
            else:
                found.tokens[name] = x

    return hook


def _note_input(axis: str | Fused, found: Activations) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.tokens.update(_parts(args[0], axis))

    return hook


def _note_normed(gain: str, found: Activations) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.normed[gain] = args[0]

    return hook


def _note_routing(layer: nn.Module, found: Activations) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        entered = args[0].flatten(0, -2)
        weight: Any = module.weight
        bias: Any = getattr(module, "bias", None)
        logits = nn.functional.linear(entered, weight, bias)  # what else a router returns differs between versions
        chosen = logits.topk(_experts_per_token(layer), -1).indices  # unless the experts are told others
        found.routing = Routing(logits, _reached(logits, chosen), entered)

    return hook


def _note_chosen(found: Activations) -> Any:
    """Experts are told which tokens are theirs; some compute with all tokens."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        chosen = next((x for x in args if isinstance(x, Tensor) and x.dtype in (torch.int64, torch.int32)), None)
        if chosen is not None and found.routing is not None:
            logits = found.routing.logits
            found.routing = replace(found.routing, reached=_reached(logits, chosen.flatten(0, -2).long()))

    return hook


def _reached(logits: Tensor, chosen: Tensor) -> Tensor:
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)


def _experts_per_token(layer: nn.Module) -> int:
    return int(next(module.top_k for module in layer.modules() if hasattr(module, "top_k")))  # type: ignore[arg-type]


def _parts(x: Tensor, axis: str | Fused) -> dict[str, Tensor]:
    return {axis: x} if isinstance(axis, str) else fused_parts(x, x.ndim - 1, axis)


@dataclass(frozen=True)
class _Slot:
    index: int


class _Slots:
    """Takes the tensors out of nested arguments, each tensor once."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._known: dict[int, _Slot] = {}

    def emptied(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._known:
                self._known[id(value)] = _Slot(len(self.tensors))
                self.tensors.append(value)
            return self._known[id(value)]
        return _mapped(self.emptied, value)


def _within_float32(x: Tensor) -> Tensor:
    """The same numbers where float32 can hold them: transformers takes softmaxes in float32, and where a mask hides
    all keys from a token (padding), the smallest number of float64 would make them NaN."""
    return x.clamp(-_LARGEST, _LARGEST) if x.dtype is torch.float64 else x


def _filled(value: Any, tensors: Sequence[Tensor]) -> Any:
    return tensors[value.index] if isinstance(value, _Slot) else _mapped(lambda v: _filled(v, tensors), value)


def _mapped(function: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return {k: function(v) for k, v in value.items()}
    return type(value)(map(function, value)) if isinstance(value, (tuple, list)) else value
