"""The descent: batches, steps, the held-out loss at the midpoint, and when to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import cos, inf, pi
from random import Random

import torch
from torch import Tensor

from mergekit_symalign.learning.adam import Moments, adam_step
from mergekit_symalign.learning.between import Batched, Between

MIDPOINT = 0.5
NARROWEST, WIDEST = 0.25, 0.75  # shares of the model at which steps are made
_WARMUP = 10  # steps
_LAST_RATE = 0.1  # of the rate, at the last step
_BETTER = 1e-4  # of the loss: less is no improvement


@dataclass(frozen=True)
class Plan:
    """How to descend.

    Attributes:
        steps: at most.
        rate: of learning, at its highest.
        seed: of everything that is drawn.
        every: steps from one look at the held-out loss to the next.
        patience: so many looks without improvement end the descent.
    """

    steps: int = 300
    rate: float = 3e-3
    seed: int = 0
    every: int = 10
    patience: int = 10

    def rate_at(self, step: int) -> float:
        """It rises for some steps, then falls as a cosine does."""
        whole = (1 + cos(pi * step / max(1, self.steps))) / 2
        return self.rate * min(1.0, (step + 1) / _WARMUP) * (_LAST_RATE + (1 - _LAST_RATE) * whole)

    def share_at(self, step: int) -> float:
        return Random(f"{self.seed} share {step}").uniform(NARROWEST, WIDEST)


@dataclass(frozen=True)
class State:
    """Where a descent is.

    Attributes:
        step: how many steps were made.
        numbers: of all leaves.
        moments: of the optimiser.
        best: the numbers with the least held-out loss.
        before: held-out loss at the midpoint, at the start.
        least: of ``best``.
        since: looks since then.
    """

    step: int
    numbers: Mapping[str, Tensor]
    moments: Moments
    best: Mapping[str, Tensor]
    before: float = inf
    least: float = inf
    since: int = 0


Batches = Callable[[int], Batched]  # number of a step -> what it reads


def start(between: Between, held_out: Sequence[Batched], device: torch.device | str = "cpu") -> State:
    """Where a descent begins."""
    numbers = {name: leaf.start.float().to(device) for name, leaf in between.leaves().items()}
    before = held_out_loss(between, numbers, held_out)
    return State(0, numbers, Moments.zero(numbers), numbers, before, before)


def descend(
    between: Between,
    batches: Batches,
    held_out: Sequence[Batched],
    plan: Plan,
    state: State,
    *,
    tell: Callable[[State], object] = lambda _: None,
) -> State:
    """Steps until there is nothing to gain.

    Args:
        between: the two models.
        batches: what the steps read.
        held_out: on what the loss at the midpoint is measured.
        plan: how to descend.
        state: where to begin, or to go on.
        tell: called after every step.

    Returns:
        The last state; ``best`` in it is the result.
    """
    while state.step < plan.steps and state.since < plan.patience:
        state = _stepped(between, batches, plan, state)
        if state.step % plan.every == 0 or state.step == plan.steps:
            state = _looked(between, held_out, state)
        tell(state)
    return state


@torch.no_grad()
def held_out_loss(
    between: Between, numbers: Mapping[str, Tensor], held_out: Sequence[Batched], t: float = MIDPOINT
) -> float:
    """Mean over all targets."""
    total = sum(float(between.loss(numbers, data, t)) for data in held_out)
    return total / sum(data.counted for data in held_out)


def _stepped(between: Between, batches: Batches, plan: Plan, state: State) -> State:
    _, gradients = between.gradients(state.numbers, batches(state.step), plan.share_at(state.step))
    rate = plan.rate_at(state.step)
    numbers, moments = adam_step(between.leaves(), state.numbers, gradients, state.moments, rate=rate, step=state.step)
    return replace(state, step=state.step + 1, numbers=numbers, moments=moments)


def _looked(between: Between, held_out: Sequence[Batched], state: State) -> State:
    loss = held_out_loss(between, state.numbers, held_out)
    if loss < state.least:
        gained = loss < state.least * (1 - _BETTER)
        return replace(state, best=state.numbers, least=loss, since=0 if gained else state.since + 1)
    return replace(state, since=state.since + 1)
