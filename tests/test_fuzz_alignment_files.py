"""A few hundred alignment files changed at random; ``make fuzz`` tries thousands (docs/security.md)."""

from __future__ import annotations

import pytest
import torch
from fuzz import alignment_files
from fuzz.memory import guarded

from mergekit_symalign.alignments import fit
from mergekit_symalign.sealed import text

COUNT = 240
MEMORY_KIB = 32 * 1024  # of one file: the largest changed text has 2 MB, a parsed one takes a few times that


def test_each_is_refused_by_name_or_does_no_harm() -> None:
    found = alignment_files.sweep(COUNT, seed=1)
    assert found["tried"] == COUNT
    assert found["other"] == 0
    assert min(found["refused"], found["exact"]) > COUNT // 50
    assert found["memory_kib"] <= MEMORY_KIB


@pytest.mark.parametrize("check", ["require_symmetry", "_check_sizes"])
def test_the_sweep_finds_what_a_missing_check_lets_through(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, check, lambda *_, **__: None)
    assert alignment_files.sweep(60, seed=3)["other"] > 0


def test_the_guard_measures_and_limits() -> None:
    with guarded() as peak:
        kept = torch.ones(40 << 20, dtype=torch.uint8)
    assert peak.bytes is None or peak.bytes >= len(kept)


def test_depth_is_counted_outside_strings() -> None:
    assert text._depth('{"a[[[": [{"\\"{{": "]"}]}') == 3
