"""What a run of the checks found: stages with their rows, as JSON and as Markdown."""

from __future__ import annotations

import json
import platform
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """What a run is given.

    Attributes:
        device: where the kernels work.
        small: tiny shapes: shows that the checks run, not how fast.
        scratch: folder for checkpoints, in memory if there is enough.
        until: `time.monotonic` at which the run has to be over.
    """

    device: torch.device
    small: bool
    scratch: Path
    until: float

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()


@dataclass
class Stage:
    """One part of a run.

    Attributes:
        name: of the part.
        status: passed, failed or skipped.
        seconds: how long it took.
        rows: of its table.
        note: why it failed or was skipped.
    """

    name: str
    status: str = "passed"
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    note: str = ""


class CannotRunError(Exception):
    """A stage that cannot run here."""


def run_stage(name: str, work: Callable[[Setting, list[Row]], None], setting: Setting, needs: float) -> Stage:
    """Run one part; a failure is noted, and the rows before it are kept.

    Args:
        name: of the part.
        work: appends its rows to the list that it is given.
        setting: of the run.
        needs: seconds that have to be left.
    """
    stage, start = Stage(name), time.perf_counter()
    if setting.left < needs and not setting.small:
        return Stage(name, "skipped", note=f"{setting.left:.0f} s are left, it needs {needs:.0f} s")
    try:
        work(setting, stage.rows)
    except CannotRunError as reason:
        stage.status, stage.note = "skipped", str(reason)
    except Exception as error:
        stage.status, stage.note = "failed", str(error) or type(error).__name__
        traceback.print_exc()
    stage.seconds = round(time.perf_counter() - start, 2)
    return stage


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    if device.type != "cuda":
        return {"device": f"CPU ({platform.machine()})", "torch": torch.__version__}
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    name = torch.cuda.get_device_name(device)
    return {"device": name, "memory_GiB": round(memory, 1), "torch": torch.__version__, "cuda": torch.version.cuda}


def as_json(stages: Sequence[Stage], where: Mapping[str, Any], *, small: bool) -> str:
    found = {"machine": dict(where), "small": small, "stages": [asdict(stage) for stage in stages]}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def table(rows: Sequence[Row]) -> str:
    """Rows in Markdown; columns in the order in which they first stand."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(x: Any) -> str:
    if isinstance(x, float):
        return f"{x:.1e}" if 0 < abs(x) < 1e-3 else f"{x:.3g}" if abs(x) < 100 else f"{x:.0f}"
    return "" if x is None else str(x)
