"""The CPU in the place of another device: it takes the routes that are meant for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

from mergekit_symalign.symmetry import devices
from mergekit_symalign.symmetry.neurons import coarse, quantized


@contextmanager
def routes_of(device: torch.device) -> Iterator[None]:
    """Inside, the CPU does what `device` would do; where that is no CPU, nothing changes."""
    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(patch.object(devices, "on_cpu", lambda _: False))
            for module in (coarse, quantized):  # 8-bit products
                stack.enter_context(patch.object(module, "usable", lambda *_: False))
        yield


@contextmanager
def no_int8_products() -> Iterator[None]:
    """Inside, a product of 8-bit numbers is an error: they are for the CPU alone."""

    def refused(*_: object) -> None:
        raise AssertionError("an 8-bit product was taken on a device that is no CPU")

    with patch.object(torch, "_int_mm", refused):
        yield
