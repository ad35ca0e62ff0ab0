"""A merge in a process of its own: its seconds and peak memory are its own, and what breaks it breaks nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_NO_HANG = getattr(os, "WNOHANG", 0)  # Windows has none
_POLL = 0.02  # seconds between two looks at the memory


@dataclass(frozen=True)
class Cost:
    """What a process took.

    Attributes:
        exit_code: 0 where all went well, negative where a signal ended it.
        seconds: wall time.
        peak_mib: largest resident memory in MiB, None where the operating system does not say it (Windows).
    """

    exit_code: int
    seconds: float
    peak_mib: float | None


def command(name: str) -> list[str]:
    """An installed command of this environment."""
    return [shutil.which(name, path=sysconfig.get_path("scripts")) or name]


def run_alone(call: Sequence[str], log: Path) -> Cost:
    """Run a command to its end, or end it if this process is stopped. What it says goes to a file."""
    start = time.perf_counter()
    with log.open("wb") as said, subprocess.Popen(call, stdout=said, stderr=subprocess.STDOUT) as process:
        try:
            peak = _peak_mib(process)
        except BaseException:
            process.kill()
            raise
    return Cost(process.returncode, time.perf_counter() - start, peak)


def last_words(log: Path) -> str:
    """The last line that a process said: its error, as our and MergeKit's commands end."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("Error: ") if lines else "it said nothing"


def _peak_mib(process: subprocess.Popen[bytes]) -> float | None:
    """Wait for a process; its peak resident memory in MiB, where the operating system says it.

    What `wait4` tells holds the peak of this process too, from which the other was forked. Linux shows the process' own
    while it runs, so it is asked again and again.
    """
    if not hasattr(os, "wait4"):
        process.wait()
        return None
    own = 0.0
    while True:
        ended, status, usage = os.wait4(process.pid, _NO_HANG)
        if ended:
            break
        own = max(own, _shown_mib(process.pid))
        time.sleep(_POLL)
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB on Linux
    return own or usage.ru_maxrss / unit


def _shown_mib(process: int) -> float:
    """The largest resident memory so far, in MiB; 0 where the operating system does not show it."""
    try:
        status = Path(f"/proc/{process}/status").read_text("utf-8")
    except OSError:
        return 0.0
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) / 2**10 if found else 0.0
