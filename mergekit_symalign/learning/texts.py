"""Texts in windows: those that are learned from, in batches, and those that are held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import torch

from mergekit_symalign.activations.calibration import padded
from mergekit_symalign.activations.objectives import Objective
from mergekit_symalign.activations.samples import Pair, targets_of
from mergekit_symalign.learning.between import Batched

SHORTEST = 2  # tokens of a window that predicts something
_HELD_OUT = 0.1  # of the windows
_MOST_HELD_OUT = 32  # windows


def windows(sequences: Sequence[Sequence[int]], length: int) -> list[Sequence[int]]:
    """Long texts in pieces of ``length`` tokens; what is too short to predict anything is left out."""
    pieces = [sequence[at : at + length] for sequence in sequences for at in range(0, len(sequence), length)]
    return [piece for piece in pieces if len(piece) >= SHORTEST]


@dataclass(frozen=True)
class Data:
    """What a descent reads.

    Attributes:
        learned, held_out: inputs with their targets.
        objective: what the model predicts.
        size: inputs of a batch.
        seed: of their order.
    """

    learned: Sequence[Pair]
    held_out: Sequence[Pair]
    objective: Objective
    size: int
    seed: int

    @staticmethod
    def of(pairs: Sequence[Pair], objective: Objective, size: int, seed: int) -> Data:
        """With a tenth of the inputs held out, drawn by the seed."""
        order = list(range(len(pairs)))
        Random(f"{seed} held out").shuffle(order)
        count = max(1, min(_MOST_HELD_OUT, round(_HELD_OUT * len(pairs))))
        held_out = sorted(order[:count])
        return Data([pairs[i] for i in sorted(order[count:])], [pairs[i] for i in held_out], objective, size, seed)

    @property
    def digest(self) -> str:
        """Of all inputs and targets, and of what is held out."""
        said = [[(list(ids), None if known is None else list(known)) for ids, known in of] for of in self._both()]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def _both(self) -> tuple[Sequence[Pair], Sequence[Pair]]:
        return self.learned, self.held_out

    def batch(self, step: int, device: torch.device | str = "cpu") -> Batched:
        """What a step reads: all inputs in turn, in an order of its own each time."""
        return self._batched([self.learned[self._place(step * self.size + i)] for i in range(self.size)], device)

    def batches_held_out(self, device: torch.device | str = "cpu") -> list[Batched]:
        starts = range(0, len(self.held_out), self.size)
        return [self._batched(self.held_out[start : start + self.size], device) for start in starts]

    def _place(self, number: int) -> int:
        turn, place = divmod(number, len(self.learned))
        return _order(len(self.learned), self.seed, turn)[place]

    def _batched(self, pairs: Sequence[Pair], device: torch.device | str) -> Batched:
        batch = padded([ids for ids, _ in pairs])
        targets = targets_of(batch, [target for _, target in pairs], self.objective)
        assert targets is not None
        return Batched(type(batch)(batch.ids.to(device), batch.valid.to(device)), targets.to(device))


@lru_cache(maxsize=4)
def _order(count: int, seed: int, turn: int) -> list[int]:
    order = list(range(count))
    Random(f"{seed} turn {turn}").shuffle(order)
    return order
