"""`make bench`: what an aligned merge costs next to a plain one, through `mergekit-yaml` in fresh processes.

    python tests/benchmarks/run.py [--small] [--runs 3] [--cache FOLDER] [--only TEXT]

Plain and aligned merges take turns, so that what else the machine does meets both. The tables go to standard output.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import click
import torch
from measure import Cost, merge
from workloads import Workload, depths, growth, shapes, workloads

GIB, MIB = 1 << 30, 1 << 20


@dataclass(frozen=True)
class Line:
    """All runs of one workload; ratios are of runs that followed each other."""

    workload: Workload
    plain: Sequence[Cost]
    aligned: Sequence[Cost]

    def ratio(self, field: str) -> float:
        return median(getattr(a, field) / getattr(p, field) for p, a in zip(self.plain, self.aligned, strict=True))

    def cells(self) -> list[str]:
        def both(field: str, unit: float, digits: int) -> str:
            p, a = (median(getattr(cost, field) for cost in side) / unit for side in (self.plain, self.aligned))
            return f"{p:.{digits}f} → {a:.{digits}f}"

        return [
            self.workload.name,
            both("wall", 1, 1),
            f"{self.ratio('wall'):.2f}",
            both("cpu", 1, 1),
            f"{self.ratio('cpu'):.2f}",
            both("peak_rss", GIB, 2),
            f"{self.ratio('peak_rss'):.2f}",
            routes(self.aligned[0].routes),
        ]


GROWTH = ["", "plain, wall s", "added, wall s", "added, CPU s", "added, CPU s per layer and model"]
DEPTH = ["", "plain, anonymous MiB", "aligned", "more than plain", "plain, RSS MiB", "aligned"]
HEAD = ["workload", "wall, s", "ratio", "CPU, s", "ratio", "peak RSS, GiB", "ratio", "settled by"]


@click.command(help=__doc__)
@click.option("--small", is_flag=True, help="Tiny models, one run: checks that the benchmark runs, not how fast.")
@click.option("--runs", default=3, show_default=True, help="Runs of each merge; medians are shown.")
@click.option("--cache", type=Path, default=Path(".cache/benchmarks"), help="Where the checkpoints are kept.")
@click.option("--only", default="", help="Only workloads whose name contains this.")
@click.option("--depths/--no-depths", "with_depths", default=True, help="Memory against the number of layers.")
@click.option("--growth/--no-growth", "with_growth", default=True, help="Cost against layers, width, models, threads.")
@click.option("--layer/--no-layer", "with_layer", default=True, help="One layer alone, of 1B, 8B and 70B shape.")
def main(
    small: bool, runs: int, cache: Path, only: str, with_depths: bool, with_growth: bool, with_layer: bool
) -> None:
    cache = cache.resolve()
    shape, layers = shapes(small)
    runs = 1 if small else runs
    click.echo(f"{machine()}; {shape}; medians of {runs}\n")
    chosen = [w for w in workloads(shape) if only in w.name]
    _table(HEAD, (_measured(w, cache, runs).cells() for w in (chosen[:4:3] if small else chosen)))
    if with_depths:
        click.echo(f"\nPeak memory against depth (output in shards of 500 MB), medians of {runs}\n")
        _table(DEPTH, (_depth(w, cache, runs) for w in depths(shape, layers)))
    if with_growth:
        click.echo(f"\nWhat alignment adds to a merge of siblings (base and models), medians of {runs}\n")
        _table(GROWTH, (_growth(w, cache, runs) for w in growth(shape)[-1 if small else 0 :]))
    if with_layer:
        for name in ("layer.py", "shapes.py"):
            here = Path(__file__).with_name(name)
            subprocess.run([sys.executable, here, *(["--small"] * small)], check=True)


def machine() -> str:
    """Processor, cores and torch."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} cores, torch {torch.__version__}"


def routes(total: Counter[str]) -> str:
    """Shares of the neurons by route, and blocks by the route of their heads."""
    neurons = sum(count for name, count in total.items() if name.startswith("neurons_"))
    parts = []
    for name, count in sorted(total.items(), reverse=True):
        if name.startswith("neurons_"):
            parts.append(f"{name.removeprefix('neurons_')} {count / neurons:.1%}")
        else:
            parts.append(f"{name.replace('_', ' ')} {count}")
    return ", ".join(parts)


def _measured(workload: Workload, cache: Path, runs: int) -> Line:
    plain, aligned = workload.configs(cache)
    out, options = cache / "out", workload.options
    pairs = [(merge(plain, out, *options), merge(aligned, out, *options)) for _ in range(runs)]
    return Line(workload, *map(list, zip(*pairs, strict=True)))


def _growth(workload: Workload, cache: Path, runs: int) -> list[str]:
    line = _measured(workload, cache, runs)
    wall, cpu = (
        median(getattr(a, field) - getattr(p, field) for p, a in zip(line.plain, line.aligned, strict=True))
        for field in ("wall", "cpu")
    )
    solves = workload.shape.layers * len(workload.models)
    plain = median(cost.wall for cost in line.plain)
    return [workload.name, f"{plain:.1f}", f"{wall:.1f}", f"{cpu:.1f}", f"{cpu / solves:.2f}"]


def _depth(workload: Workload, cache: Path, runs: int) -> list[str]:
    """Without the pages of the mapped input files, which the system takes back when it needs them, and with them."""
    line = _measured(replace(workload, options=("--out-shard-size", "500M")), cache, runs)

    def peak(side: Sequence[Cost], field: str) -> float:
        return median(getattr(cost, field) for cost in side) / MIB

    plain, aligned = peak(line.plain, "peak_own"), peak(line.aligned, "peak_own")
    resident = [peak(side, "peak_rss") for side in (line.plain, line.aligned)]
    return [workload.name, *(f"{x:.0f}" for x in (plain, aligned, aligned - plain, *resident))]


def _table(head: Sequence[str], rows: object) -> None:
    click.echo(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:  # type: ignore[attr-defined]
        click.echo(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
