"""`make gpu-check` to its end on the CPU, which takes the routes that are meant for a GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import check, correctness, write_page
from gpu.agreement import deviation
from gpu.results import CannotRunError, Row, Setting, as_json, run_stage, table
from gpu.stand_in import no_int8_products, routes_of
from gpu.transfers import transfers

CPU = torch.device("cpu")


def _setting(scratch: Path, seconds: float = 600, *, small: bool = True) -> Setting:
    return Setting(CPU, small, scratch, time.monotonic() + seconds)


def test_all_parts_pass_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Solvers, elements, transfers, a merge, activations and learning by a GPU's routes; timings of tiny shapes."""
    out = tmp_path / "results.json"
    arguments = ["--device", "cpu", "--small", "--out", str(out), "--scratch", str(tmp_path)]
    assert check.main(arguments) == 0, capsys.readouterr().out
    found = json.loads(out.read_text("utf-8"))
    assert {stage["name"]: stage["status"] for stage in found["stages"]} == {
        name: "skipped" if "8B" in name else "passed" for name in check.parts()
    }
    assert all(stage["rows"] for stage in found["stages"] if stage["status"] == "passed")
    assert found["small"] is True
    assert list(tmp_path.iterdir()) == [out]  # nothing is left in the scratch folder
    assert "| torch.float64 |" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([]) == 2
    assert "--device cpu" in capsys.readouterr().out


def test_a_part_that_fails_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: Setting, rows: list[Row]) -> None:
        rows.append({"seen": 1})
        raise ValueError("it broke")

    def passes(_: Setting, rows: list[Row]) -> None:
        rows.append({"seen": 2})

    monkeypatch.setattr(check, "parts", lambda: {"one": (fails, 0), "two": (passes, 0)})
    out = tmp_path / "results.json"
    assert check.main(["--device", "cpu", "--small", "--out", str(out), "--scratch", str(tmp_path)]) == 1
    one, two = json.loads(out.read_text("utf-8"))["stages"]
    assert (one["status"], one["note"], one["rows"]) == ("failed", "it broke", [{"seen": 1}])
    assert two["status"] == "passed"
    assert "failed: one" in capsys.readouterr().out


def test_parts_for_which_no_time_is_left_are_skipped(tmp_path: Path) -> None:
    def cannot(*_: object) -> None:
        raise CannotRunError("no room")

    setting = _setting(tmp_path, 5, small=False)
    late = run_stage("late", cannot, setting, 60)
    assert (late.status, "it needs 60 s" in late.note) == ("skipped", True)
    assert (run_stage("soon", cannot, setting, 1).status, run_stage("soon", cannot, setting, 1).note) == (
        "skipped",
        "no room",
    )


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"index": torch.tensor([1, 0])}, "2 of 2 differ"),
        ({"index": torch.tensor([0, 1]), "more": 1}, "more"),
    ],
)
def test_differences_are_found(other: Mapping[str, Any], reason: str) -> None:
    answers = iter(({"index": torch.tensor([0, 1])}, other))
    with pytest.raises(AssertionError, match=reason):
        deviation(lambda *_: next(answers), CPU, torch.float64)


@pytest.mark.parametrize(("one", "other"), [(torch.zeros(2), torch.ones(2)), (1.0, 2.0), ("bounds", "pairs")])
def test_numbers_and_routes_that_differ_are_found(one: Any, other: Any) -> None:
    answers = iter(({"x": one}, {"x": other}))
    with pytest.raises(AssertionError, match="x: "):
        deviation(lambda *_: next(answers), CPU, torch.float64)


def test_transfers_are_counted_by_calls() -> None:
    def work(there: Any) -> None:
        x = there(torch.arange(6.0))
        host = x.cpu()
        bool((host > 1).all())  # costs nothing there
        bool((x > 1).all())
        x[x > 2]
        host.to(torch.device("cpu")).tolist()

    found = transfers(work, CPU)
    assert (found.numbers, found.tensors, found.bytes) == (2, 2, 48)
    assert found.steps >= 4


def test_a_wait_for_each_head_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = correctness.block_transfers

    def more(device: torch.device, name: str, twice: bool) -> Any:
        found = counted(device, name, twice)
        found.numbers += 9 * twice
        return found

    monkeypatch.setattr(correctness, "block_transfers", more)
    with pytest.raises(AssertionError, match="twice the size waits"):
        correctness.check_transfers(_setting(tmp_path), [])


def test_the_cpu_stands_in_for_another_device() -> None:
    from mergekit_symalign.symmetry import devices

    with routes_of(CPU), no_int8_products():
        assert not devices.on_cpu(CPU)
        with pytest.raises(AssertionError, match="8-bit"):
            torch._int_mm(torch.ones(1), torch.ones(1))
    assert devices.on_cpu(CPU)


def test_tables_have_all_columns() -> None:
    assert table([{"a": 1.23456, "b": None}, {"c": 1e-9, "b": "x"}]).splitlines() == [
        "| a | b | c |",
        "| --- | --- | --- |",
        "| 1.23 |  |  |",
        "|  | x | 1.0e-09 |",
    ]


def test_the_page_has_what_the_files_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_page.PAGE.read_text("utf-8")
    assert write_page.page(text, write_page.section()) == text, "make gpu-page"
    monkeypatch.setattr(write_page, "RESULTS", tmp_path)
    assert write_page.section() == write_page.NOTHING
    stage = run_stage("kernels", lambda _, rows: rows.append({"deviation": 0.5}), _setting(tmp_path), 0)
    (tmp_path / "card.json").write_text(as_json([stage], {"device": "a card", "torch": "2"}, small=False), "utf-8")
    written = write_page.section()
    for expected in ("### a card", "`tests/gpu/results/card.json`", "**kernels**: passed", "| 0.5 |"):
        assert expected in written
