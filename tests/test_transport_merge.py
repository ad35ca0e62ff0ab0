"""Optimal transport fusion inside MergeKit: shuffled twins, identical models, several models, refusals."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load, merge_config, merged
from models import FAMILIES, make_model, perturbed, save, word_tokenizer
from transport_twins import shuffled

from mergekit_symalign.errors import ArchitectureError, ConfigError, ParameterError

MOE = ("mixtral", "qwen3-moe", "olmoe")
MERGEABLE = [family for family in FAMILIES if family not in MOE]


def _pair(tmp_path: Path, family: str, **overrides: Any) -> tuple[Path, Path]:
    anchor = make_model(family, 0, **overrides)
    return save(anchor, tmp_path / "anchor"), save(shuffled(anchor, 1), tmp_path / "twin")


@pytest.mark.parametrize("family", MERGEABLE)
def test_shuffled_twin_fuses_to_the_anchor(family: str, tmp_path: Path) -> None:
    anchor, twin = _pair(tmp_path, family)
    out = merged(merge_config("ot_fusion", anchor, [anchor, twin]), tmp_path / "out")
    for name, x in load(anchor).items():
        torch.testing.assert_close(out[name], x, rtol=0, atol=0, msg=name)
