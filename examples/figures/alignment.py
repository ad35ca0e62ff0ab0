"""Draws docs/figures/alignment.png: two small networks, and what averaging does to them before and after alignment.

Both compute the same. The curves are computed from the networks drawn: ``python examples/figures/alignment.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

OUT = Path(__file__).parents[2] / "docs" / "figures" / "alignment.png"
SHAPES = ("^", "o", "s")
SIZES = {"^": 21.0, "o": 19.0, "s": 17.0}
SHUFFLED = (2, 0, 1)
INK, GREY, PALE = "#1a1a1a", "#7a7a7a", "#dddddd"
PLACES = (-1.0, 0.0, 1.0)
BOTTOMS = (0.66, 0.38, 0.10)


@dataclass(frozen=True)
class Network:
    """Three ReLU neurons: the input weight, bias and output weight of each, and the shape that marks it."""

    weight: np.ndarray
    bias: np.ndarray
    out: np.ndarray
    marks: tuple[str, ...]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return np.maximum(self.weight[:, None] * x + self.bias[:, None], 0.0).T @ self.out

    def reordered(self, order: tuple[int, ...]) -> Network:
        """The same function with its neurons in another order."""
        rows = list(order)
        return Network(self.weight[rows], self.bias[rows], self.out[rows], tuple(self.marks[i] for i in rows))


def average(a: Network, b: Network) -> Network:
    """Number by number, as a merge does it; a neuron made of two different ones carries both marks."""
    marks = tuple(one if one == other else one + other for one, other in zip(a.marks, b.marks, strict=True))
    return Network((a.weight + b.weight) / 2, (a.bias + b.bias) / 2, (a.out + b.out) / 2, marks)


def draw_network(axes: Axes, network: Network) -> None:
    """Input above, neurons in a row, output below; the lines' widths are the weights."""
    for place, weight, out, marks in zip(PLACES, network.weight, network.out, network.marks, strict=True):
        for end, size in ((1.0, weight), (-1.0, out)):
            axes.plot([0, place], [end, 0], color=GREY, linewidth=0.8 + abs(size), zorder=1)
        alone = len(marks) == 1
        style = {"color": "white" if alone else PALE, "alpha": 1.0 if alone else 0.75, "zorder": 3}
        for mark, shift in zip(marks, (0.0,) if alone else (-0.13, 0.13), strict=True):
            size = SIZES[mark]
            axes.plot(place + shift, 0, mark, markersize=size, markeredgecolor=INK, markeredgewidth=1.8, **style)
    axes.plot([0, 0], [1, -1], "o", markersize=6, color=INK, zorder=2)
    axes.set(xlim=(-1.5, 1.5), ylim=(-1.2, 1.2))
    axes.axis("off")


def draw_curve(axes: Axes, network: Network, wanted: Network) -> None:
    """What the network computes, over what it should compute."""
    x = np.linspace(-2, 2, 200)
    axes.plot(x, wanted(x), color=PALE, linewidth=6, solid_capstyle="round")
    axes.plot(x, network(x), color=INK, linewidth=1.8)
    axes.set(xticks=[], yticks=[], xlim=(-2.1, 2.1), ylim=(-1.6, 2.4))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw(figure: Figure, left: float, titles: tuple[str, str], rows: tuple[Network, Network], verdict: str) -> None:
    """One half of the picture: two networks, their average, and what each computes."""
    a, b = rows
    figure.text(left + 0.13, 0.955, titles[0], ha="center", fontsize=14, weight="bold")
    figure.text(left + 0.13, 0.915, titles[1], ha="center", fontsize=11.5)
    figure.text(left + 0.33, 0.915, "computes", ha="center", fontsize=11.5)
    for bottom, network in zip(BOTTOMS, (a, b, average(a, b)), strict=True):
        draw_network(figure.add_axes((left, bottom, 0.26, 0.23)), network)
        draw_curve(figure.add_axes((left + 0.27, bottom + 0.035, 0.12, 0.16)), network, a)
    figure.text(left + 0.20, 0.022, verdict, ha="center", fontsize=13, weight="bold")


def main() -> None:
    a = Network(np.array([1.5, -1.5, 2.0]), np.array([0.8, 0.5, -1.6]), np.array([0.8, 0.6, -1.8]), SHAPES)
    b = a.reordered(SHUFFLED)
    back = b.reordered(tuple(int(i) for i in np.argsort(SHUFFLED)))
    figure = plt.figure(figsize=(9, 4.7))
    for bottom, label in zip(BOTTOMS, ("network A", "network B", "average"), strict=True):
        figure.text(0.072, bottom + 0.115, label, ha="center", va="center", fontsize=13)
    figure.add_artist(Line2D((0.02, 0.98), (0.353, 0.353), color=GREY, linewidth=1, linestyle=(0, (4, 4))))
    draw(figure, 0.14, ("Before", "B's neurons in another order"), (a, b), "✗ mixes unrelated neurons")
    draw(figure, 0.585, ("After alignment", "each beside its partner"), (a, back), "✓ computes the same")
    figure.savefig(OUT, dpi=160, facecolor="white")


if __name__ == "__main__":
    main()
