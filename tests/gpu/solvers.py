"""Every solver and every action as a function of device and dtype, which gives numbers that can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache, partial
from typing import Any

import torch
from attention import random_rows, random_tokens, seen_on, sides_of
from models import make_model
from streams import in_other_coordinates, split, stored
from torch import Tensor

from gpu.blocks import NEURONS, ROPE, Block, blocks, neurons
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.symmetry.assignment.linear import best_assignment, lazy_assignment
from mergekit_symalign.symmetry.by_activations.attention import align_attention_by
from mergekit_symalign.symmetry.by_activations.covariance import Covariance
from mergekit_symalign.symmetry.by_activations.experts import Routing, align_experts_by
from mergekit_symalign.symmetry.by_activations.neurons import align_mlp_by
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import AxisAction, Chain
from mergekit_symalign.symmetry.options import MlpShape, Sides, Symmetries
from mergekit_symalign.symmetry.residual.alternate import align_stream
from mergekit_symalign.symmetry.residual.kinds import ResidualKind, best_element
from mergekit_symalign.symmetry.solve import solve_block, solve_consensus
from mergekit_symalign.symmetry.solved import Solved

Found = Mapping[str, Any]  # tensors, numbers and strings by name
Kernel = Callable[[torch.device, torch.dtype], Found]


@cache
def solvers() -> dict[str, Kernel]:
    """By name."""
    found: dict[str, Kernel] = {block.name: partial(_block, block) for block in blocks()}
    found |= {f"stream, {kind.value}": partial(_stream_element, kind) for kind in ResidualKind}
    return found | {
        "stream in turns with blocks": _stream,
        "consensus, MLP": partial(_consensus, MlpShape(64)),
        "activations, attention": _attention_by,
        "activations, MLP": _mlp_by,
        "activations, experts": _experts_by,
        "assignment, 40": partial(_assignment, 40),
        "assignment, 600": partial(_assignment, 600),
        "assignment that asks for costs": _lazy,
    }


def placed(sides: Sides, device: torch.device, dtype: torch.dtype) -> Sides:
    """Rows on a device."""
    return {axis: [(_at(a, device, dtype), _at(b, device, dtype)) for a, b in x] for axis, x in sides.items()}


def of_element(element: BlockElement) -> dict[str, Any]:
    """The numbers of each step of each axis."""
    return {
        f"{axis} {i} {step.kind} {number}": x
        for axis, action in element.actions.items()
        for i, step in enumerate(action.steps if isinstance(action, Chain) else (action,))
        for number, x in enumerate(_numbers(step))
    }


def _numbers(step: AxisAction) -> tuple[Tensor, ...]:
    """Of an element; angles as points of the circle."""
    named = zip(fields(step), step.tensors(), strict=True)  # type: ignore[arg-type]
    return tuple(torch.stack((x.cos(), x.sin())) if of.name == "angle" else x for of, x in named)


def of_solved(solved: Solved) -> Found:
    return of_element(solved.element) | dict(solved.facts)


def _at(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(device)


def _block(block: Block, device: torch.device, dtype: torch.dtype) -> Found:
    found = of_solved(solve_block(placed(block.sides, device, dtype), block.shape, block.use))
    general = {"value", "attended"} if "general" in block.name else set()  # a descent: only its distance is the same
    return {name: x for name, x in found.items() if name.split()[0] not in general and not name.startswith("value_")}


def _stream_element(kind: ResidualKind, device: torch.device, dtype: torch.dtype) -> Found:
    g = torch.Generator().manual_seed(0)
    cross, gains = (_at(torch.randn(96, 96, generator=g, dtype=torch.float64), device, dtype) for _ in range(2))
    return of_element(best_element(kind, cross.double(), gains.double()))


def _stream(device: torch.device, dtype: torch.dtype) -> Found:
    model = make_model("llama", 0, num_hidden_layers=1)
    layout, state = resolve(model.config, model="gpu"), stored(model)
    twin = in_other_coordinates(layout, state, ResidualKind.rotation, state)
    (scopes, anchors), (_, models) = split(layout, state), split(layout, twin)
    both = [[{n: _at(x, device, dtype) for n, x in part.items()} for part in side] for side in (anchors, models)]
    found = align_stream(scopes, lambda i: (both[0][i], both[1][i]), ResidualKind.rotation, rounds=2)
    return of_element(found.stream) | {"standing": found.distances[0]}


def _consensus(shape: MlpShape, device: torch.device, dtype: torch.dtype) -> Found:
    both = placed(neurons(shape, related=True), device, dtype)
    models = [{axis: [pair[i] for pair in pairs] for axis, pairs in both.items()} for i in (0, 1)]
    return of_solved(solve_consensus(models, shape, Symmetries())[1])


def _attention_by(device: torch.device, dtype: torch.dtype) -> Found:
    anchor, model = random_rows(ROPE, 0), random_rows(ROPE, 5)
    tokens = random_tokens(200).mT
    seen = {axis: _covariance(c, device, dtype) for axis, c in seen_on(tokens, anchor, model, ROPE).items()}
    return of_element(
        align_attention_by(seen, placed(sides_of(anchor, model), device, dtype), ROPE, Symmetries()).element
    )


def _mlp_by(device: torch.device, dtype: torch.dtype) -> Found:
    sides = placed(neurons(MlpShape(64), related=True), device, dtype)
    a, b = sides["down"][0]
    return of_element(align_mlp_by(Covariance.of_rows([(a, b)]), sides, MlpShape(64), Symmetries()).element)


def _experts_by(device: torch.device, dtype: torch.dtype) -> Found:
    shape = NEURONS["experts"]
    sides = placed(neurons(shape, related=True), device, dtype)
    tokens = _at(random_like_tokens(sides["expert"][0][0].shape[1]), device, dtype)
    every = torch.ones(len(tokens), shape.experts, dtype=torch.bool, device=device)
    routing = [Routing(tokens @ router.mT, every, tokens) for router in sides["expert"][0]]
    found = align_experts_by((routing[0], routing[1]), sides, shape, Symmetries(), torch.nn.functional.silu)
    return of_element(found.element)


def random_like_tokens(hidden: int, count: int = 64) -> Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _covariance(c: Covariance, device: torch.device, dtype: torch.dtype) -> Covariance:
    """Of the same tokens, as a device gives it: sums are float64 always."""
    del dtype
    return Covariance(*(x.to(device) for x in (c.cross, c.anchor, c.model)))


def _scores(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _at(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64), device, dtype)


def _assignment(n: int, device: torch.device, dtype: torch.dtype) -> Found:
    return {"index": best_assignment(_scores(n, device, dtype))}


def _lazy(device: torch.device, dtype: torch.dtype) -> Found:
    cost = _scores(12, device, dtype)
    return {"index": lazy_assignment(cost - 0.5, lambda i, j: cost[i, j], lambda: cost - 0.1)}
