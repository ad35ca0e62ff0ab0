"""``mergekit-symalign inspect``: is there anything to align?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from mergekit.options import MergeOptions, add_merge_options

from mergekit_symalign.card import (
    NO_LOSS,
    general_values,
    stream_distance,
    stream_moved,
    symmetry_share,
    verdict,
)
from mergekit_symalign.commands.alignment import alignment_config, alignment_options, planned_task, run_tasks
from mergekit_symalign.commands.common import require_alignable
from mergekit_symalign.commands.names import in_a_table, short_names
from mergekit_symalign.commands.next_step import next_step
from mergekit_symalign.commands.outcome import Command
from mergekit_symalign.commands.plots import plot_layers, require_plot
from mergekit_symalign.families.towers import in_order
from mergekit_symalign.graph.merge_report import WriteReport, by_model, with_streams
from mergekit_symalign.whole_file import require_writable, written_whole

Block = Mapping[str, Any]


class _Layers(click.ParamType):
    """``0-7`` or ``3``."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> range:
        first, _, last = str(value).partition("-")
        if not first.isdigit() or not (last or first).isdigit() or int(last or first) < int(first):
            self.fail(f"{value!r} is neither a layer nor a range of layers such as 0-7", param, ctx)
        return range(int(first), int(last or first) + 1)


@click.command(cls=Command)
@click.argument("anchor")
@click.argument("model")
@click.option("--layers", type=_Layers(), help="Look at these layers only, for example 0-7.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the numbers to this file."
)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw a picture (.png, .svg or .pdf).")
@alignment_options
@add_merge_options
def inspect(
    anchor: str,
    model: str,
    layers: range | None,
    json_file: Path | None,
    plot: Path | None,
    merge_options: MergeOptions,
    **parameters: Any,
) -> None:
    """Say how far MODEL's coordinates are from ANCHOR's, layer by layer. Merges and writes nothing.

    \b
    Example: mergekit-symalign inspect HuggingFaceTB/SmolLM2-135M ./tuned --plot tuned.png
    """
    if plot is not None:
        require_plot(plot)
    if json_file is not None:
        require_writable(json_file, "--json", folder_is_made=False)
    merge_options.apply_global_options()
    report = measured(anchor, model, merge_options, parameters, layers)
    for name, entry in report["models"].items():
        click.echo(f"{in_a_table(name)}\nagainst {in_a_table(anchor)}\n")
        if differences := report["config_differences"].get(name):
            click.echo("\n".join([*configs(differences), ""]))
        click.echo("\n".join([*table(entry["blocks"]), "", *summary(entry["totals"]), *stream(entry.get("residual"))]))
        if plot is not None:
            own = [block for block in entry["blocks"] if "tower" not in block]
            plot_layers(own, " against ".join(short_names((name, anchor))), plot)
        differ = bool(report["config_differences"].get(name))
        click.echo(
            "\n".join(
                next_step(
                    anchor,
                    model,
                    entry.get("residual", entry["totals"]),
                    merge_options,
                    parameters,
                    configs_differ=differ,
                )
            )
        )
    if json_file is not None:
        with written_whole(json_file) as scratch:
            scratch.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def measured(
    anchor: str, model: str, options: MergeOptions, parameters: Mapping[str, Any], layers: range | None
) -> dict[str, Any]:
    """The report of the merge that would bring the model to the anchor, without the merge.

    Raises:
        click.UsageError: if there are no such layers.
    """
    require_alignable(anchor, model, options)
    task = planned_task(alignment_config(anchor, model, parameters), options, WriteReport)
    chosen = [block for block in task.blocks if layers is None or block[1] in layers]
    if not chosen:
        there = sorted({layer for _, layer, *_ in task.blocks if isinstance(layer, int)})
        raise click.UsageError(f"--layers: no such layer; the models have layers 0 to {there[-1]}")
    facts_of = {facts: (name, layer, kind) for name, layer, kind, facts in chosen}
    streams = {facts: name for name, facts in task.streams}
    shares = {facts: facts.share for facts in streams}
    computed = dict(run_tasks([*facts_of, *streams, *shares.values()], options, "Inspecting"))
    found = [(*place, computed[facts]) for facts, place in facts_of.items()]
    found.sort(key=lambda block: (block[0], in_order(block[1]), block[2].value))
    moved = {name: computed[facts] | computed[shares[facts]] for facts, name in streams.items()}
    return json.loads(task.head) | {"models": with_streams(by_model(found), moved)}


def configs(differences: Mapping[str, Sequence[Any]]) -> list[str]:
    """Where the two configs differ about the same weights, and what follows, at most 80 columns where it fits."""
    return [
        "The two compute different functions of the same weights. Their configs differ:",
        *(f"  {key} is {a!r} in the anchor and {b!r} in the model" for key, (a, b) in differences.items()),
        "A merge of both runs with the anchor's values. rotation_match of this model",
        "alone keeps the model's own.",
    ]


def table(blocks: Sequence[Block]) -> list[str]:
    """One line for each block, at most 80 columns."""
    lines = ["layer block       before    after  moved      q/k angle   v/o angle   scales"]
    tower = ""
    for b in blocks:
        if (own := b.get("tower", "")) != tower:
            tower = own
            lines.append(f"{tower}:")
        before, after = (f"{b[name] ** 0.5:9.4g}" for name in ("distance_before", "distance_after"))
        line = f"{b['layer']:5} {b['block']:9}{before}{after}  {_moved(b):10}"
        if b["block"] == "attention":
            line += f" {_angles(b, 'query'):11} {_angles(b, 'value'):11}"
        else:
            line += 24 * " "
        lines.append((line + f" {_scales(b)}").rstrip())
    return lines


def summary(totals: Block) -> list[str]:
    """Totals, by which route assignments were proven, and one sentence."""
    share = symmetry_share(totals)
    lines = [
        f"distance {totals['distance_before'] ** 0.5:.6g} before, {totals['distance_after'] ** 0.5:.6g} after"
        + ("" if share is None else f" ({100 * share:.4g} % of it is symmetry)"),
        ", ".join(
            f"{totals[f'{name}_moved']} of {totals[name]} {label}"
            for name, label in (
                ("neurons", "neurons"), ("experts", "experts"), ("kv_heads", "KV heads"), ("query_heads", "query heads")
            )
            if totals.get(name)
        )
        + " moved",
        *_routes(totals),
        *(line for line in (general_values(totals),) if line is not None),
    ]  # fmt: skip
    return [*lines, "", verdict(totals)]


def stream(facts: Block | None) -> list[str]:
    """What was done to the residual stream, if anything, and how much of the distance that alone takes away."""
    if facts is None:
        return []
    lines = ["", f"residual stream: {stream_moved(facts)}", *_spectrum(facts), stream_distance(facts), *_shares(facts)]
    return [*(line for line in lines if line is not None), NO_LOSS]


def _spectrum(facts: Block) -> list[str]:
    """Quantiles of the angles of a rotation's planes."""
    shown = {"10 %": "p10", "25 %": "p25", "50 %": "median", "75 %": "p75", "90 %": "p90", "100 %": "max"}
    angles = {share: facts.get(f"stream_angle_{name}") for share, name in shown.items()}
    if any(angle is None for angle in angles.values()):
        return []
    return [
        "  share of the planes " + "".join(f"{share:>8}" for share in angles),
        "  turned by at most   " + "".join(f"{angle:8.1f}" for angle in angles.values()) + "  degrees",
    ]


def _shares(facts: Block) -> list[str]:
    """How much of the distance of all weights the stream takes away alone, and the blocks then."""
    alone = {"distance_before": facts["own_distance_before"], "distance_after": facts["own_distance_after"]}
    own, whole = symmetry_share(alone), symmetry_share(facts)
    if own is None or whole is None:
        return []
    return [f"{100 * own:.4g} % of it is symmetry of the stream alone, {100 * whole:.4g} % together with the blocks"]


def _routes(totals: Block) -> list[str]:
    """By which route the optimal assignment of the neurons was proven."""
    names = {
        "neurons_prefix_1": "on a short prefix",
        "neurons_prefix_2": "on a longer one",
        "neurons_prefix_3": "on the longest",
        "neurons_rows": "by their rows alone",
        "neurons_full": "by the full problem",
    }
    parts = [f"{totals[key]} {label}" for key, label in names.items() if totals.get(key)]
    return [f"proven optimal: {', '.join(parts)}"] if parts else []


def _moved(b: Block) -> str:
    if b["block"] == "attention":
        return f"{b['kv_heads_moved']}/{b['kv_heads']}+{b['query_heads_moved']}/{b['query_heads']}"
    return f"{b['neurons_moved'] / b['neurons']:.1%}"


def _angles(b: Block, name: str) -> str:
    return f"{b[f'{name}_angle_median']:.1f}/{b[f'{name}_angle_max']:.1f}"


def _scales(b: Block) -> str:
    low, high = b["scale_min"], b["scale_max"]
    return "" if low == high == 1 else f"{low:.2f}-{high:.2f}"
