"""Run one command in this process, and say its peak memory: ``python -m study.skills.peak mergekit-yaml CONFIG OUT``.

The last line of what it writes is the peak of its resident memory in bytes (Linux), mapped files included.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import entry_points
from pathlib import Path


def peak() -> int:
    """The most resident memory that this process had since it was started, in bytes."""
    status = Path("/proc/self/status").read_text("utf-8")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


def main() -> None:
    name, *arguments = sys.argv[1:]
    (command,) = entry_points(group="console_scripts", name=name)
    command.load()(arguments, standalone_mode=False)
    print(peak())


if __name__ == "__main__":
    main()
