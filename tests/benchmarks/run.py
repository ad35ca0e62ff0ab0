"""`make bench`: what an aligned merge costs next to a plain one, through `mergekit-yaml` in fresh processes.

    python tests/benchmarks/run.py [--small] [--runs 3] [--cache FOLDER] [--only TEXT] [--out FILE]

Plain and aligned merges take turns, so that what else the machine does meets both. The tables go to standard output,
the numbers to FILE.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import tables
from measure import Cost, merge
from results import machine, save, whole
from workloads import Workload, depths, growth, shapes, workloads

MIB = 1 << 20


@dataclass(frozen=True)
class Line:
    """All runs of one workload."""

    workload: Workload
    plain: Sequence[Cost]
    aligned: Sequence[Cost]

    @property
    def found(self) -> dict[str, Any]:
        return whole(self.workload.name, self.plain, self.aligned)


@click.command(help=__doc__)
@click.option("--small", is_flag=True, help="Tiny models, one run: checks that the benchmark runs, not how fast.")
@click.option("--runs", default=3, show_default=True, help="Runs of each merge; medians are shown.")
@click.option("--cache", type=Path, default=Path(".cache/benchmarks"), help="Where the checkpoints are kept.")
@click.option("--out", type=Path, default=Path(".cache/benchmarks/results.json"), help="The file of results.")
@click.option("--only", default="", help="Only workloads whose name begins with this.")
@click.option("--depths/--no-depths", "with_depths", default=True, help="Memory against the number of layers.")
@click.option("--growth/--no-growth", "with_growth", default=True, help="Cost against layers, width, models, threads.")
@click.option("--layer/--no-layer", "with_layer", default=True, help="One layer alone, of 1B, 8B and 70B shape.")
def main(
    small: bool,
    runs: int,
    cache: Path,
    out: Path,
    only: str,
    with_depths: bool,
    with_growth: bool,
    with_layer: bool,
) -> None:
    cache = cache.resolve()
    shape, layers = shapes(small)
    runs = 1 if small else runs
    click.echo(f"{machine()}\n{shape}; medians of {runs}\n")
    chosen = [w for w in workloads(shape) if w.name.startswith(only)]

    def shown(kind: str, line: dict[str, Any]) -> None:
        """Each line is saved as soon as it is there."""
        save(out, {"machine": machine(), kind: [line]})
        click.echo(tables.cells(kind, line))

    click.echo(tables.HEADS["whole"])
    for workload in chosen[:4:3] if small else chosen:
        shown("whole", _measured(workload, cache, runs).found)
    if with_depths:
        click.echo(f"\n{tables.HEADS['depth']}")
        for workload in depths(shape, layers):
            shown("depth", _depth(workload, cache, runs))
    if with_growth:
        click.echo(f"\n{tables.HEADS['growth']}")
        for workload in growth(shape)[-1 if small else 0 :]:
            shown("growth", _growth(workload, cache, runs))
    if with_layer:
        here = Path(__file__).parent
        subprocess.run([sys.executable, here / "layer.py", *(["--small"] * small)], check=True)
        subprocess.run([sys.executable, here / "shapes.py", "--out", out, *(["--small"] * small)], check=True)


def _measured(workload: Workload, cache: Path, runs: int) -> Line:
    plain, aligned = workload.configs(cache)
    out, options = cache / "out", workload.options
    pairs = [(merge(plain, out, *options), merge(aligned, out, *options)) for _ in range(runs)]
    return Line(workload, *map(list, zip(*pairs, strict=True)))


def _growth(workload: Workload, cache: Path, runs: int) -> dict[str, Any]:
    """What alignment adds to a merge."""
    line = _measured(workload, cache, runs)
    wall, cpu = (
        median(getattr(a, field) - getattr(p, field) for p, a in zip(line.plain, line.aligned, strict=True))
        for field in ("wall", "cpu")
    )
    solves = workload.shape.layers * len(workload.models)
    plain = median(cost.wall for cost in line.plain)
    return {"name": workload.name, "plain_wall": plain, "wall": wall, "cpu": cpu, "cpu_of_a_layer": cpu / solves}


def _depth(workload: Workload, cache: Path, runs: int) -> dict[str, Any]:
    """Without the pages of the mapped input files, which the system takes back when it needs them, and with them."""
    line = _measured(replace(workload, options=("--out-shard-size", "500M")), cache, runs)

    def peak(side: Sequence[Cost], field: str) -> float:
        return median(getattr(cost, field) for cost in side) / MIB

    sides = {"plain": line.plain, "aligned": line.aligned}
    own = {f"{name}_own": peak(side, "peak_own") for name, side in sides.items()}
    return {"name": workload.name, **own, **{f"{name}_rss": peak(side, "peak_rss") for name, side in sides.items()}}


if __name__ == "__main__":
    main()
