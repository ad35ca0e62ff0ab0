"""Transfers, whole merges, activations and learning on a GPU."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from gpu import correctness, language
from gpu.check import Work
from gpu.results import Row, Setting

PARTS: dict[str, Work] = {
    "transfers": correctness.check_transfers,
    "merges": correctness.check_merges,
    "activations": language.check_activations,
    "learn": language.check_learn,
}

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


@pytest.mark.parametrize("part", PARTS)
def test_a_gpu_does_what_the_cpu_does(part: str, tmp_path: Path) -> None:
    rows: list[Row] = []
    PARTS[part](Setting(torch.device("cuda"), True, tmp_path, time.monotonic() + 600), rows)
    assert rows
