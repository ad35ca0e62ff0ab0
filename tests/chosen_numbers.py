"""Tests that choose what products of neurons are taken in, whatever is fastest where they run."""

from __future__ import annotations

import pytest

from mergekit_symalign.symmetry.neurons import certificate, costs
from mergekit_symalign.symmetry.neurons.products import Numbers, Ways


def choose(monkeypatch: pytest.MonkeyPatch, numbers: Numbers) -> list[str]:
    """From here on products are taken in these numbers where they are possible, else in float32.

    Returns:
        The purposes of the products that were asked for, as they come.
    """
    asked = []

    def fastest(purpose: str, coordinates: int, ways: Ways) -> Numbers:
        asked.append(purpose)
        return numbers if numbers in ways else Numbers.float32

    for module in (certificate, costs):
        monkeypatch.setattr(module, "fastest", fastest)
    return asked
