"""Our sections in the model card that MergeKit writes, and the sentence that sums an alignment up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration

from mergekit_symalign.graph.config_groups import statistics_paths
from mergekit_symalign.graph.leftovers import shortened
from mergekit_symalign.graph.merge_report import REPORT
from mergekit_symalign.hub.address import is_address, parsed
from mergekit_symalign.methods import ROTATION_PAPER, ROTATION_TITLE, TASK_VECTORS_PAPER, TASK_VECTORS_TITLE

TAG = "mergekit-symalign"
_NOTHING, _LITTLE = 0.01, 0.1  # shares of the distance
_CONFIGURATION = "### Configuration\n"
_DIGITS = 12  # of a digest


def symmetry_share(totals: Mapping[str, Any]) -> float | None:
    """The share of the distance to the anchor that an alignment takes away; None if the distance is not known or 0."""
    before, after = totals.get("distance_before"), totals.get("distance_after")
    return None if not before or after is None else 1 - (after / before) ** 0.5


def nothing_to_align(totals: Mapping[str, Any]) -> bool:
    """Whether a plain method will do."""
    share = symmetry_share(totals)
    return totals.get("distance_before") is not None if share is None else 0 <= share < _NOTHING


def verdict(totals: Mapping[str, Any]) -> str:
    """One honest sentence on an alignment."""
    share = symmetry_share(totals)
    if share is None:
        known = nothing_to_align(totals)
        return "nothing to align: the weights are equal" if known else "distances are not known: read from a file"
    if share < 0:
        return f"matched by something else than weights: their distance rises by {_percent(-share)}"
    if nothing_to_align(totals):
        return f"nothing to align: matching lowers the distance by {_percent(share)}; the plain method will do"
    if share < _LITTLE:
        return f"little to align: {_percent(share)} of the distance is symmetry"
    return f"coordinates differ: {_percent(share)} of the distance is symmetry"


def stream_moved(facts: Mapping[str, Any]) -> str:
    """What was done to a residual stream, in half a sentence; only its kind where a file does not tell more."""
    kind = facts["kind"]
    if {"stream_moved", "signs_flipped", "stream"} <= facts.keys():
        of = facts["stream"]
        signs = f", {facts['signs_flipped']} signs flipped" if kind != "permutation" else ""
        return f"{kind}, {facts['stream_moved']} of {of} coordinates moved{signs}"
    if {"stream_angle_median", "stream_angle_max"} <= facts.keys():
        median, most = facts["stream_angle_median"], facts["stream_angle_max"]
        return f"{kind}, planes turned by {median:.1f} degrees in the median and {most:.1f} at most"
    return str(kind)


def stream_distance(facts: Mapping[str, Any]) -> str | None:
    """How far the model is from the anchor with its stream moved and its blocks aligned; None if that is not known."""
    if not {"distance_before", "distance_after"} <= facts.keys():
        return None
    rounds = facts.get("residual_rounds")
    before, after = (facts[name] ** 0.5 for name in ("distance_before", "distance_after"))
    told = f"distance of all weights {before:.6g} before, {after:.6g} after"
    return told if rounds is None else f"{told} {rounds} {'round' if rounds == 1 else 'rounds'}"


NO_LOSS = "No loss was measured, and closer weights are not always a better merge: see mergekit-symalign barrier."


def general_values(totals: Mapping[str, Any]) -> str | None:
    """What is known of general matrices of values; None if there are none."""
    condition = totals.get("value_condition_max")
    return None if condition is None else f"values under general matrices, condition numbers up to {condition:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def extend_card(out_path: Path, config: MergeConfiguration) -> None:
    """Add what the report says to the card that MergeKit has written; every other line stays as it is.

    Except that the configuration in it names files of statistics without their folder, which is one of this machine.
    """
    card, report = out_path / "README.md", out_path / REPORT
    if not card.exists() or not report.exists():
        return
    text = card.read_text("utf-8")
    front, separator, body = text.partition(_CONFIGURATION)
    front = front.replace("- merge\n", f"- merge\n- {TAG}\n", 1)
    for path in sorted(statistics_paths(config), key=len, reverse=True):
        body = body.replace(path, Path(path).name)
    told = json.loads(report.read_text("utf-8"))
    sections = (section(told) if told["anchor"] else "") + (data_section(told) if "data" in told else "")
    card.write_text(front + sections + separator + body, "utf-8")


def data_section(report: Mapping[str, Any]) -> str:
    """The card's section on the data behind a merge, as Markdown."""
    data = report["data"]
    lines = ["### Data behind the merge", "", f"Merged by {report['method']} of mergekit-symalign.", ""]
    if "transported_to" in data:
        reasons = "; ".join(report["inexact_because"])
        lines += [f"All models were transported to {_name(data['transported_to'])}. **Not exact**: {reasons}."]
    for model, told in data.get("statistics", {}).items():
        lines.append(f"- **{_name(model)}**: {_measured(told)}")
    for paper in data.get("papers", ()):
        lines += ["", f"Reference: [{paper['title']}]({paper['url']})."]
    for by, what in _EXCEPTIONS.items():
        names = [name for name, one in report.get("tensors", {}).items() if one.get("merged_by") == by]
        if names:
            lines += ["", f"{what}: {shortened(names)}."]
    return "\n".join(lines) + "\n\n"


_EXCEPTIONS = {
    "ridge": "Solved with a ridge, because the statistics are of too few tokens",
    "average": "Averaged, because no token reached them",
}


def _measured(told: Mapping[str, Any]) -> str:
    """One line on a file of statistics."""
    kinds = [f"{told['gram']} Gram matrices"] if told["gram"] != "none" else []
    kinds += [f"{told['fisher']} Fisher information"] if told["fisher"] != "none" else []
    only = f", of the tensors that match `{told['only']}`" if told["only"] else ""
    return (
        f"statistics {_file(told['file'])} ({' and '.join(kinds)}{only}; {told['tokens']} tokens in "
        f"{told['sequences']} sequences; SHA-256 {told['sha256'][:_DIGITS]})"
    )


def _file(name: str) -> str:
    """A file of a report: a link if it is on the Hub."""
    return f"[`{name}`]({parsed(name).page})" if is_address(name) else f"`{name}`"


def _name(model: str) -> str:
    """A model as a card may name it: not by a folder of this machine."""
    return Path(model).name if Path(model).is_absolute() or Path(model).exists() else model


def section(report: Mapping[str, Any]) -> str:
    """The card's section on the alignment, as Markdown."""
    exact = (
        "Exact: every aligned model computes what the original computed, up to rounding."
        if report["exact"]
        else f"**Not exact**: {'; '.join(report['inexact_because'])}."
    )
    lines = [
        "### Parameter alignment",
        "",
        f"Before the merge, mergekit-symalign {report['versions']['mergekit_symalign']} aligned the models to "
        f"{', '.join(report['anchor'])} by symmetries of the architecture. {exact}",
        "",
        f"References: [{TASK_VECTORS_TITLE}]({TASK_VECTORS_PAPER}); [{ROTATION_TITLE}]({ROTATION_PAPER}).",
        "",
    ]
    for model, told in report.get("alignment_files", {}).items():
        lines += [f"{_name(model)} by alignment {_file(told['file'])} (SHA-256 {told['sha256'][:_DIGITS]}).", ""]
    for model, names in report.get("unused_tensors", {}).items():
        lines += [f"Not merged, because the architecture has no place for them: {shortened(names)} of {model}.", ""]
    for model, entry in report["models"].items():
        lines += [
            f"**{model}**: {verdict(entry['totals'])}. {_moved(entry['totals'])}",
            "",
            *_stream(entry.get("residual")),
            *_table(entry["blocks"]),
            "",
        ]
    return "\n".join(lines) + "\n"


def _stream(facts: Mapping[str, Any] | None) -> list[str]:
    if facts is None:
        return []
    parts = [f"Its residual stream was moved: {stream_moved(facts)}", stream_distance(facts)]
    return [f"{'; '.join(part for part in parts if part is not None)}. {NO_LOSS}", ""]


def _moved(totals: Mapping[str, Any]) -> str:
    parts = [
        f"{totals[f'{name}_moved']} of {totals[name]} {label} moved"
        for name, label in (("neurons", "neurons"), ("experts", "experts"), ("kv_heads", "KV heads"))
        if totals.get(name)
    ]
    parts += [part for part in (general_values(totals),) if part is not None]
    return f"{'; '.join(parts)}." if parts else ""


def _table(blocks: list[Mapping[str, Any]]) -> list[str]:
    rows = ["<details><summary>By layer</summary>", "", "| layer | block | distance before | after | moved |"]
    rows.append("|---:|---|---:|---:|---|")
    for block in blocks:
        before, after = (
            f"{block[name] ** 0.5:.4g}" if name in block else "" for name in ("distance_before", "distance_after")
        )
        rows.append(f"| {block['layer']} | {block['block']} | {before} | {after} | {_moved(block)} |")
    return [*rows, "", "</details>"]
