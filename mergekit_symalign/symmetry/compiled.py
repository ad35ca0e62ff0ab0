"""When the compiled loops of symmetry/loops.py are used: on large matrices in bfloat16 on the CPU, where numba is.

numba is an optional extra (``fast``). Without it the same numbers come from torch in several passes, and differ from
these by the rounding of their sums at most.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_symalign.symmetry import devices

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOG = logging.getLogger(__name__)

_LEAST = 1 << 22  # numbers of a matrix: to load numba takes longer than what it gains for smaller ones


def loops_for(*matrices: Tensor) -> ModuleType | None:
    """The loops, if they can be used on all of these matrices; None if torch is to do the work."""
    return _loops() if all(map(_is_fit, matrices)) else None


def loops_for_many(numbers: int, x: Tensor) -> ModuleType | None:
    """The loops for so many numbers in all, of which ``x`` holds some."""
    return _loops() if numbers >= _LEAST and _is_plain(x) else None


def bits(matrix: Tensor) -> NDArray[Any]:
    """A matrix in bfloat16 as the whole numbers that have its bits [uint16]; it shares its memory."""
    return matrix.detach().view(torch.int16).numpy().view("uint16")


def arrays(*tensors: Tensor) -> list[NDArray[Any]]:
    """Other tensors for a loop; they share their memory."""
    return [x.numpy() for x in tensors]


def _is_fit(x: Tensor) -> bool:
    return _is_plain(x) and x.ndim == 2 and x.numel() >= _LEAST


def _is_plain(x: Tensor) -> bool:
    plain = type(x) is Tensor and devices.on_cpu(x.device) and not x.requires_grad
    return plain and x.dtype is torch.bfloat16 and x.is_contiguous()


@cache
def _loops() -> ModuleType | None:
    try:
        from mergekit_symalign.symmetry import loops
    except ImportError as error:
        LOG.info("numba is not there (%s): distances and moments are taken by torch, which takes longer", error)
        return None
    except RuntimeError as error:  # numba finds no folder where it can keep what it has compiled
        LOG.warning("numba cannot be used (%s): distances and moments are taken by torch, which takes longer", error)
        return None
    return loops
