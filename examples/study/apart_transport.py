"""Part 9: two ways from the literature to move a skill's weights between models, as experiments.

Theseus (Rinaldi et al. 2026, arXiv 2602.12952): every layer's change goes through orthogonal maps between the two models'
activations, one for its inputs and one for its outputs. GradFix (Rinaldi et al. 2025, arXiv 2510.09658): a change is kept
only where the target's own gradient wants its sign.
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


def transported(vector: Mapping[str, Tensor], source: PreTrainedModel, target: PreTrainedModel, ids: Tensor) -> State:
    """A change of ``source``'s weights as one of ``target``'s, by maps of activations on the same tokens (Theseus).

    Norms get no change: between the coordinates of two models a gain has no image.

    Args:
        ids: [windows, length].
    """
    maps = {name: [_rotation(x) for x in crossed] for name, crossed in _crossed(source, target, ids).items()}
    moved: State = {}
    for name, x in vector.items():
        layer = name.rpartition(".")[0]
        module = target.get_submodule(layer)
        if isinstance(module, nn.Embedding):
            moved[name] = x @ maps[layer][1].T
        elif not isinstance(module, LAYERS):
            moved[name] = torch.zeros_like(x)
        else:
            inner, outer = maps[layer]
            change = x if x.dim() == 1 else _stored(module, _stored(module, x) @ inner.T)
            head = module is target.get_output_embeddings()  # whose outputs are the same tokens
            moved[name] = (
                change if head else outer @ change if x.dim() == 1 else _stored(module, outer @ _stored(module, change))
            )
    return moved


def _stored(module: nn.Module, matrix: Tensor) -> Tensor:
    """[out, in] <-> as the module keeps it."""
    return matrix.T if isinstance(module, Conv1D) else matrix


def _rotation(cross: Tensor) -> Tensor:
    """The orthogonal matrix [n, n] closest to ``cross``."""
    left, _, right = torch.linalg.svd(cross)
    return left @ right


@torch.inference_mode()
def _crossed(source: PreTrainedModel, target: PreTrainedModel, ids: Tensor) -> dict[str, list[Tensor]]:
    """For each layer sum(target xᵀ · source x) of its inputs and of its outputs; a large vocabulary is left out."""
    sums: dict[str, list[Tensor]] = {}
    for part in ids.split(4):
        with _seen(source) as ours, _seen(target) as theirs:
            source(part, use_cache=False)
            target(part, use_cache=False)
        for name, (x, y) in theirs.items():
            found = [a.T @ b for a, b in zip((x, y), ours[name], strict=True)]
            sums[name] = [a + b for a, b in zip(sums[name], found, strict=True)] if name in sums else found
    return sums


@contextmanager
def _seen(model: PreTrainedModel) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inputs and outputs [tokens, features] of every linear layer and embedding, by name."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    head = model.get_output_embeddings()

    def hook(name: str) -> Any:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0] if inputs[0].is_floating_point() else torch.zeros(1, 1)
            y = torch.zeros(1, 1) if module is head else output
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
