"""What the demo says while it works: on a terminal a bar, elsewhere a line for each step."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm

from mergekit_symalign.console import say


class Tick(Protocol):
    """Called after each batch with how many items it had."""

    def __call__(self, n: int) -> object: ...


def silent(n: int) -> None:
    """Nobody watches."""


@contextmanager
def measuring(models: Sequence[str], items: int, *, bar: bool) -> Iterator[Measuring]:
    """Watch ``models`` being measured on so many items each.

    Args:
        models: their names, in order.
        items: problems and texts of each.
        bar: whether to draw a bar; otherwise each model gets a line.
    """
    shown = tqdm(total=len(models) * items, disable=not bar, leave=False, ncols=79, file=sys.stderr)
    with shown:
        yield Measuring(models, shown)


class Measuring:
    """The models that are measured one after another, and the bar, which may be switched off."""

    def __init__(self, models: Sequence[str], bar: tqdm) -> None:
        self._models, self._bar = models, bar

    def begin(self, model: str) -> Tick:
        """Name the next model. Returns what counts its items."""
        if self._bar.disable:
            say(f"measuring {model} ({self._models.index(model) + 1} of {len(self._models)})")
        self._bar.set_description(f"measuring {model}")
        return self._bar.update
