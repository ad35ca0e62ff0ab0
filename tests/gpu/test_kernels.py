"""Every solver and every element on a GPU finds what the CPU finds (on the CPU alone: tests/test_gpu_check.py)."""

from __future__ import annotations

import pytest
import torch

from gpu.actions import actions
from gpu.agreement import DTYPES, deviation
from gpu.solvers import solvers

KERNELS = {**solvers(), **actions()} if torch.cuda.is_available() else {}

pytestmark = pytest.mark.skipif(not KERNELS, reason="there is no CUDA device here")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNELS or ["no CUDA device"])
def test_a_gpu_finds_what_the_cpu_finds(name: str, dtype: torch.dtype) -> None:
    deviation(KERNELS[name], torch.device("cuda"), dtype)
