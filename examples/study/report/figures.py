"""The figures of docs/evidence.md: means over seeds, bars are standard errors."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from ..estimates import Estimate
from ..findings import OWN, SKILL, SKILL_LOSS, Findings
from ..lineage import FINE_TUNED
from .drift import exact_variants, measured
from .foreign import aligned_variant
from .markdown import DRIFT_TITLES
from .transfer import tried

COLOURS = {"plain": "0.55", "weights": "tab:blue", "activations": "tab:orange", "full": "tab:red"}
LABELS = {"plain": "no alignment", "full": "rotation: full"}
SHORT = {"hadamard": "Hadamard\nin V/O", "sorted-neurons": "neurons\nsorted", "reordered-heads": "heads\nreordered"}
SHORT |= {"all-three": "all\nthree", "scaled-channels": "channels\nrescaled", "layout-round-trip": "layout\nand back"}
SHORT |= {"layout-left": "layout\nleft"}


def draw(findings: Findings, folder: Path) -> None:
    """Write all figures as PNG. Each carries the checksum of the results that it shows."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"Software": None, "Description": checksum(findings)}
    for name, figure in (
        ("transfer", _transfer(findings)),
        ("drift", _drift(findings)),
        ("foreign", _foreign(findings)),
    ):
        figure.savefig(folder / f"{name}.png", dpi=110, metadata=metadata)
        plt.close(figure)


def checksum(findings: Findings) -> str:
    """Of all rows, whatever their order."""
    rows = sorted(json.dumps(row, sort_keys=True) for row in findings.rows.values())
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _bars(axes: Axes, groups: list[str], series: dict[str, list[Estimate]]) -> None:
    """Grouped bars: one group for each name, one bar in it for each series."""
    width = 0.8 / len(series)
    for i, (name, estimates) in enumerate(series.items()):
        at = [x + (i - (len(series) - 1) / 2) * width for x in range(len(groups))]
        heights, errors = [e.mean for e in estimates], [e.error if e.n > 1 else 0 for e in estimates]
        axes.bar(at, heights, width, yerr=errors, capsize=2, label=LABELS.get(name, name), color=COLOURS.get(name))
    axes.set_xticks(range(len(groups)), groups)
    axes.spines[["top", "right"]].set_visible(False)
    axes.axhline(0, color="black", linewidth=0.6)


def _transfer(findings: Findings) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    variants = ["plain", *tried(findings)]
    metrics = {"skill": SKILL, "own tasks": OWN}
    series = {what: [findings.estimate("merge", FINE_TUNED, v, m) for v in variants] for what, m in metrics.items()}
    names = ["no\nalignment", *(v.replace("full", "rotation:\nfull") for v in variants[1:])]
    _bars(axes, names, series)
    axes.set_ylabel("exact match, %")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def _drift(findings: Findings) -> plt.Figure:
    figure, (left, middle, right) = plt.subplots(3, 1, figsize=(8, 8.5), layout="constrained", sharex=True)
    arms = measured(findings)
    names = [re.sub(r"(another|branch|,) ", r"\1\n", DRIFT_TITLES[arm]) for arm in arms]
    exact = exact_variants(findings)
    _bars(left, names, {v: [findings.symmetric_share("merge", arm, v) for arm in arms] for v in ("weights", "full")})
    left.set_ylabel("removed of the distance, %")
    variants = ["plain", *exact, "full"]
    barriers = {v: [Estimate.of(list(findings.barrier(arm, v).values())) for arm in arms] for v in variants}
    _bars(middle, names, barriers)
    middle.set_ylabel("loss barrier, nats")
    _bars(right, names, {v: [findings.estimate("merge", arm, v, SKILL_LOSS) for arm in arms] for v in variants})
    right.set_ylabel("skill after transfer, nats/character")
    figure.legend(*middle.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def _foreign(findings: Findings) -> plt.Figure:
    figure, panels = plt.subplots(2, 1, figsize=(8, 5.5), layout="constrained", sharex=True)
    arms = findings.arms("foreign")
    metrics = {"skill, nats/character": SKILL_LOSS, "own tasks, %": OWN}
    for axes, (title, metric) in zip(panels, metrics.items(), strict=True):
        series = {
            "plain": [findings.estimate("foreign", arm, "plain", metric) for arm in arms],
            "aligned": [findings.estimate("foreign", arm, aligned_variant(arm), metric) for arm in arms],
        }
        _bars(axes, [SHORT[arm] for arm in arms], series)
        axes.set_ylabel(title)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=9
    )
    return figure
