"""Pictures: whether they can be drawn, and that of `inspect`, what an alignment finds layer by layer."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_symalign.errors import ConfigError
from mergekit_symalign.whole_file import require_writable, written_whole

Block = Mapping[str, Any]
_FORMATS = (".png", ".svg", ".pdf")


def require_plot(path: Path) -> None:
    """
    Raises:
        ConfigError: if this file could not be drawn.
    """
    where = f"--plot {path}"
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(where, "matplotlib is not installed", "pip install 'mergekit-symalign[plots]'")
    if path.suffix not in _FORMATS:
        raise ConfigError(where, f"it must end in one of {', '.join(_FORMATS)}", "Give it another name")
    require_writable(path, "--plot", folder_is_made=False)


def plot_layers(blocks: Sequence[Block], title: str, path: Path) -> None:
    """Distances before and after, what moved, and angles, over the layers; told apart without colours.

    Args:
        blocks: of one model, as in the report.
        title: above the picture.
        path: .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    attention = [b for b in blocks if b["block"] == "attention"]
    mlp = [b for b in blocks if b["block"] != "attention"]
    figure = Figure(figsize=(7, 7.5), layout="constrained")
    figure.suptitle(title, fontsize=10, wrap=True, parse_math=False)
    distance, moved, angle = figure.subplots(3, 1, sharex=True)
    for kind, of, marker in (("attention", attention, "o"), ("MLP", mlp, "s")):
        layers = [b["layer"] for b in of]
        for when, style in (("before", {"color": "0.6", "linestyle": "--"}), ("after", {"color": "black"})):
            values = [b[f"distance_{when}"] ** 0.5 for b in of]
            distance.plot(layers, values, marker=marker, markersize=4, label=f"{kind} {when}", **style)
    distance.set_ylabel("distance to the anchor")
    distance.set_ylim(bottom=0)
    shares = (
        ("neurons", mlp, "neurons", {"color": "black", "marker": "s"}),
        ("query heads", attention, "query_heads", {"color": "0.6", "marker": "o", "linestyle": "--"}),
    )
    for label, of, name, style in shares:
        values = [100 * b[f"{name}_moved"] / b[name] for b in of]
        moved.plot([b["layer"] for b in of], values, markersize=4, label=label, **style)
    moved.set_ylabel("moved, %")
    moved.set_ylim(-4, 104)
    for label, name, dashes in (("query/key planes", "query", "-"), ("value/output", "value", "--")):
        layers = [b["layer"] for b in attention]
        for which, key, color, marker in (("largest", "max", "0.6", "^"), ("median", "median", "black", "o")):
            values = [b[f"{name}_angle_{key}"] for b in attention]
            angle.plot(layers, values, dashes, color=color, marker=marker, markersize=4, label=f"{label}, {which}")
    angle.set_ylabel("angle, degrees")
    angle.set_ylim(bottom=0)
    angle.set_xlabel("layer")
    angle.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (distance, moved, angle):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with written_whole(path) as scratch:
        figure.savefig(scratch, dpi=150)
