"""Changes of coordinates that tools make to a checkpoint. All but the last keep what a Llama model computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from scipy.linalg import hadamard
from torch import Tensor

from .models import State
from .settings import Settings

Change = Callable[[State, Settings], State]


def hadamard_values(state: State, settings: Settings) -> State:
    """Value and output projections turned by a Hadamard matrix per head, as rotation-based quantisers fold it in."""
    d = settings.model["head_dim"]
    matrix = torch.from_numpy(hadamard(d)).float() / d**0.5

    def turned(x: Tensor) -> Tensor:
        return (matrix @ x.unflatten(0, (-1, d))).flatten(0, 1)

    return _changed(state, {"v_proj": turned, "o_proj": lambda x: turned(x.T).T})


def sorted_neurons(state: State, settings: Settings) -> State:
    """The neurons of each MLP in the order of their output norms, as pruning and offloading tools leave them."""
    result = dict(state)
    for layer in range(settings.model["num_hidden_layers"]):
        names = [f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
        order = state[names[2]].norm(dim=0).argsort(descending=True)
        result |= {name: state[name][order] for name in names[:2]} | {names[2]: state[names[2]][:, order]}
    return result


def reordered_heads(state: State, settings: Settings) -> State:
    """KV heads in reverse order with their groups, and the query heads of each group in reverse order."""
    d, kv = settings.model["head_dim"], settings.model["num_key_value_heads"]

    def queries(x: Tensor) -> Tensor:
        return x.unflatten(0, (kv, -1, d)).flip(0, 1).flatten(0, 2)

    def keys(x: Tensor) -> Tensor:
        return x.unflatten(0, (kv, d)).flip(0).flatten(0, 1)

    return _changed(
        state, {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": lambda x: queries(x.T).T.contiguous()}
    )


def scaled_channels(state: State, settings: Settings) -> State:
    """Up projection and output of each neuron balanced, as activation-aware quantisers fold scales in."""
    result = dict(state)
    for layer in range(settings.model["num_hidden_layers"]):
        up, down = (f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("up", "down"))
        factor = (state[down].norm(dim=0) / state[up].norm(dim=1)) ** 0.5
        result |= {up: state[up] * (4 * factor).unsqueeze(1), down: state[down] / (4 * factor)}
    return result


def layout_round_trip(state: State, settings: Settings) -> State:
    """Queries and keys converted to the interleaved layout of the rotary planes and back."""
    return _from_interleaved(interleaved_layout(state, settings), settings)


def everything(state: State, settings: Settings) -> State:
    """The first three together."""
    return reordered_heads(sorted_neurons(hadamard_values(state, settings), settings), settings)


def interleaved_layout(state: State, settings: Settings) -> State:
    """Queries and keys converted to the interleaved layout and left there: for half-split code another function."""
    half = (settings.model["head_dim"] // 2,)
    return _queries_and_keys(state, lambda x: x.unflatten(1, (2, *half)).transpose(1, 2).flatten(1, 2), settings)


def _from_interleaved(state: State, settings: Settings) -> State:
    half = (settings.model["head_dim"] // 2,)
    return _queries_and_keys(state, lambda x: x.unflatten(1, (*half, 2)).transpose(1, 2).flatten(1, 2), settings)


def _queries_and_keys(state: State, reorder: Callable[[Tensor], Tensor], settings: Settings) -> State:
    """Reorder the coordinates of every head; ``reorder`` acts on [heads, d, columns]."""
    d = settings.model["head_dim"]

    def change(x: Tensor) -> Tensor:
        return reorder(x.unflatten(0, (-1, d))).flatten(0, 1)

    return _changed(state, {"q_proj": change, "k_proj": change})


def _changed(state: State, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> State:
    """The state with every tensor of these projections changed."""
    return {
        name: next((change(x) for part, change in changes.items() if part in name), x).contiguous()
        for name, x in state.items()
    }


CHANGES: dict[str, Change] = {
    "hadamard": hadamard_values,
    "sorted-neurons": sorted_neurons,
    "reordered-heads": reordered_heads,
    "all-three": everything,
    "scaled-channels": scaled_channels,
    "layout-round-trip": layout_round_trip,
    "layout-left": interleaved_layout,
}
