"""Running one merge in a fresh process, and what it cost."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_POLL = 0.02  # seconds between two looks at the memory


@dataclass(frozen=True)
class Cost:
    """What one merge took.

    Attributes:
        wall: seconds.
        cpu: seconds, user and system.
        peak_rss: bytes, largest resident set (pages of the mapped input files count).
        peak_own: bytes, largest resident anonymous memory (what the process itself allocated).
        routes: how many neurons and KV heads were settled by each route, over all blocks.
    """

    wall: float
    cpu: float
    peak_rss: float
    peak_own: float
    routes: Counter[str]


def merge(config: dict[str, Any], out: Path, *options: str) -> Cost:
    """Run ``mergekit-yaml`` in a fresh process; the output is removed afterwards.

    Raises:
        RuntimeError: if the merge fails, with the end of what it wrote.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".yml")
    file.write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    command = [BIN / "mergekit-yaml", file, out, "--no-copy-tokenizer", "--quiet", "-v", *options]
    log = out.with_suffix(".log")
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with log.open("w", encoding="utf-8") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=ENVIRONMENT)
        peak_rss, peak_own = watch(process)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    text = log.read_text("utf-8")
    if process.returncode:
        raise RuntimeError(f"mergekit-yaml failed on {file}:\n{text[-2000:]}")
    shutil.rmtree(out)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall, cpu, peak_rss, peak_own, _routes(text))


def watch(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Wait for the end; peaks of all resident and of anonymous memory, in bytes."""
    status, peaks = Path(f"/proc/{process.pid}/status"), [0.0, 0.0]
    while process.poll() is None:
        try:
            now = dict(re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB", status.read_text("utf-8"), re.MULTILINE))
        except OSError:
            now = {}
        for i, field in enumerate(("VmHWM", "RssAnon")):
            peaks[i] = max(peaks[i], 1024.0 * int(now.get(field, 0)))
        time.sleep(_POLL)
    return peaks[0], peaks[1]


def _routes(log: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for facts in map(json.loads, re.findall(r"solved .*?: (\{.*\})", log)):
        total.update(
            {name: count for name, count in facts.items() if name.startswith("neurons_") and name != "neurons_moved"}
        )
        if "heads_route" in facts:
            total[f"heads_{facts['heads_route']}"] += 1
    return total
