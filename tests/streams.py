"""State dicts as the scopes of a residual stream, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_symalign.families.resolve import ModelLayout
from mergekit_symalign.families.stream import layer_scope, outside_scope, untied
from mergekit_symalign.symmetry.residual.scope import Scope

State = dict[str, Tensor]


def stored(model: torch.nn.Module) -> State:
    """A state dict without the tensors that are tied to another one."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: x for name, x in model.state_dict().items() if name not in tied}


def split(layout: ModelLayout, state: State, *, untie: bool = False) -> tuple[list[Scope], list[State]]:
    """Outside first, then each layer by the names inside it."""
    claims = {name: layout.claim(name) for name in state}
    outside = {name: state[name] for name, claim in claims.items() if claim is not None and claim.layer is None}
    parts = [untied(layout, outside) if untie else outside]
    scopes = [outside_scope(layout, parts[0])]
    for layer in range(layout.layers):
        parts.append({c.part: state[name] for name, c in claims.items() if c is not None and c.layer == layer})
        scopes.append(layer_scope(layout, layer, state))
    return scopes, parts


def joined(layout: ModelLayout, parts: list[State]) -> State:
    """The inverse of `split`."""
    inside = {layout.name(i, part): x for i, layer in enumerate(parts[1:]) for part, x in layer.items()}
    return parts[0] | inside
