"""Part 9: two ways from the literature to move a skill's weights between models, as experiments.

Theseus (Rinaldi et al. 2026, arXiv 2602.12952): every layer's change goes through orthogonal maps between the two
models' activations, one for its inputs and one for its outputs. GradFix (Rinaldi et al. 2025, arXiv 2510.09658): a
change is kept only where the target's own gradient wants its sign.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .models import State

LAYERS = (nn.Linear, Conv1D)
AT_ONCE = 4  # windows in one forward pass
DOWN = {"c_fc": "c_proj", "gate_proj": "down_proj", "up_proj": "down_proj"}  # in an MLP: what reads the outputs
THIRDS = "c_attn"  # queries, keys and values in one matrix
TOKENS = torch.ones(1, 1)  # stands for ids and logits
Maps = tuple[Tensor, Tensor]  # of inputs and of outputs, both orthogonal


def transported(vector: Mapping[str, Tensor], source: PreTrainedModel, target: PreTrainedModel, ids: Tensor) -> State:
    """A change of ``source``'s weights as one of ``target``'s, by maps of activations on the same tokens (Theseus).

    Norms get no change: between the coordinates of two models a gain has no image.

    Args:
        ids: [windows, length].
    """
    maps = _maps(_crossed(source, target, ids))
    return {name: _moved(name.rpartition(".")[0], x, target, maps) for name, x in vector.items()}


def _maps(crossed: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Maps]:
    """Of every layer; outputs of an MLP's first layers are matched as neurons, that is behind the activation."""
    inner = {name: _rotation(x) for name, (x, _) in crossed.items()}
    found = {}
    for name, (_, y) in crossed.items():
        block, _, last = name.rpartition(".")
        neurons = f"{block}.{DOWN.get(last)}"
        found[name] = (inner[name], inner[neurons] if neurons in inner else _outputs(last, y))
    return found


def _outputs(last: str, cross: Tensor) -> Tensor:
    if last != THIRDS:
        return _rotation(cross)
    n = len(cross) // 3
    return torch.block_diag(*(_rotation(cross[i : i + n, i : i + n]) for i in (0, n, 2 * n)))


def _rotation(cross: Tensor) -> Tensor:
    """The orthogonal matrix [n, n] closest to ``cross``."""
    left, _, right = torch.linalg.svd(cross)
    return left @ right


def _moved(layer: str, change: Tensor, target: PreTrainedModel, maps: Mapping[str, Maps]) -> Tensor:
    """The change of one tensor of this layer."""
    module = target.get_submodule(layer)
    if layer not in maps:
        return torch.zeros_like(change)
    inner, outer = maps[layer]
    if isinstance(module, nn.Embedding):
        return change @ outer.T
    if module is target.get_output_embeddings():  # whose outputs are the same tokens
        return change @ inner.T
    if change.dim() == 1:
        return outer @ change
    return inner @ change @ outer.T if isinstance(module, Conv1D) else outer @ change @ inner.T


@torch.inference_mode()
def _crossed(source: PreTrainedModel, target: PreTrainedModel, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """For each layer sum(target xᵀ · source x) of its inputs and of its outputs; 1 × 1 for tokens."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for part in ids.split(AT_ONCE):
        with _seen(source) as ours, _seen(target) as theirs:
            source(part, use_cache=False)
            target(part, use_cache=False)
        for name, (x, y) in theirs.items():
            inner, outer = x.T @ ours[name][0], y.T @ ours[name][1]
            before = sums.get(name, (torch.zeros_like(inner), torch.zeros_like(outer)))
            sums[name] = (before[0] + inner, before[1] + outer)
    return sums


@contextmanager
def _seen(model: PreTrainedModel) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inputs and outputs [tokens, features] of every linear layer and embedding, by name."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    head = model.get_output_embeddings()

    def hook(name: str) -> Any:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0] if inputs[0].is_floating_point() else TOKENS
            y = TOKENS if module is head else output
            seen[name] = (x.flatten(0, -2), y.flatten(0, -2))

        return keep

    named = [(name, m) for name, m in model.named_modules() if isinstance(m, (*LAYERS, nn.Embedding))]
    handles = [module.register_forward_hook(hook(name)) for name, module in named]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def masked(vector: Mapping[str, Tensor], target: PreTrainedModel, ids: Tensor) -> State:
    """The change where it goes against the gradient of the target's loss on a few windows of the skill (GradFix)."""
    target.zero_grad()
    logits = target(ids, use_cache=False).logits[:, :-1]
    cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: x.grad for name, x in target.named_parameters()}
    kept = {name: x * (x * gradients[name] < 0) for name, x in vector.items()}
    target.zero_grad()
    return kept
