"""What an aligned merge did, written beside its output: ``symalign_report.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from mergekit.common import ModelReference
from mergekit.graph import Task

from mergekit_symalign import __version__
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.families.towers import Layer, in_order
from mergekit_symalign.symmetry.neurons.match import ROUTES
from mergekit_symalign.symmetry.residual.kinds import ResidualKind
from mergekit_symalign.whole_file import written_whole

REPORT = "symalign_report.json"
FORMAT = 1
LOSS = "none was measured"  # of a merge: `barrier` measures it
_COUNTED = ("neurons", "experts", "kv_heads", "query_heads")
_SUMMED = (
    "distance_before",
    "distance_after",
    "signs_flipped",
    *_COUNTED,
    *(f"{name}_moved" for name in _COUNTED),
    *ROUTES,
)
_LARGEST = ("query_angle_max", "value_angle_max", "value_condition_max", "scale_max")


class FactsOf(Task[Dict[str, Any]]):
    """What is known of the solution of a block, without the element itself, which can then be let go."""

    solution: Task

    def arguments(self) -> Dict[str, Task]:
        return {"solution": self.solution}

    def group_label(self) -> Optional[str]:
        return self.solution.group_label()

    def execute(self, solution: Dict[str, Any]) -> Dict[str, Any]:
        facts: Dict[str, Any] = solution["facts"]
        return facts


class StreamFacts(FactsOf):
    """The same of a residual stream.

    Attributes:
        kind: of its element.
        share: the task that tells what it does alone, where it was solved; a merge does not run it.
    """

    kind: str
    share: Optional[Task]

    def execute(self, solution: Dict[str, Any]) -> Dict[str, Any]:
        return {**super().execute(solution), "kind": self.kind, "loss": LOSS}


class WriteReport(Task[str]):
    """Writes the report when everything else has been written.

    Attributes:
        path: of the file.
        head: method, anchor, settings and versions, as JSON.
        blocks: model, layer of the output, kind of block, and the task that gives the facts.
        streams: model, and the task that gives the facts of its residual stream.
        findings: what a method that uses data tells of a tensor, by its name.
        after: the task that ends the merge.
    """

    path: str
    head: str
    blocks: Tuple[Tuple[str, Layer, BlockKind, FactsOf], ...]
    streams: Tuple[Tuple[str, StreamFacts], ...] = ()
    findings: Tuple[Tuple[str, Task], ...] = ()
    after: Optional[Task] = None

    def arguments(self) -> Dict[str, Task]:
        tasks: Dict[str, Task] = {f"block{i}": facts for i, (*_, facts) in enumerate(self.blocks)}
        tasks |= {f"stream{i}": facts for i, (_, facts) in enumerate(self.streams)}
        tasks |= {f"finding{i}": task for i, (_, task) in enumerate(self.findings)}
        return tasks if self.after is None else {**tasks, "after": self.after}

    def main_thread_only(self) -> bool:
        return True

    def execute(self, after: Any = None, **facts: Dict[str, Any]) -> str:
        found = [(model, layer, kind, facts[f"block{i}"]) for i, (model, layer, kind, _) in enumerate(self.blocks)]
        told = {name: facts[f"finding{i}"] for i, (name, _) in enumerate(self.findings)}
        tensors = {"tensors": {name: one for name, one in told.items() if one}} if self.findings else {}
        models = with_streams(by_model(found), {m: facts[f"stream{i}"] for i, (m, _) in enumerate(self.streams)})
        text = json.dumps(json.loads(self.head) | {"models": models} | tensors, indent=1)
        path = Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as scratch:
            scratch.write_text(text + "\n", "utf-8")
        return self.path


def by_model(found: Sequence[tuple[str, Layer, BlockKind, Mapping[str, Any]]]) -> dict[str, Any]:
    """The facts of every block of every model, and their totals."""
    models: dict[str, Any] = {}
    for model, layer, kind, facts in found:
        blocks = models.setdefault(model, {"totals": {}, "blocks": []})["blocks"]
        blocks.append({**_place(layer), "block": kind.value, **facts})
    for entry in models.values():
        entry["totals"] = totals(entry["blocks"])
    return models


def _place(layer: Layer) -> dict[str, Any]:
    """How a report tells where a block is."""
    return {"layer": layer} if isinstance(layer, int) else {"tower": layer.tower, "layer": layer.index}


def with_streams(models: Mapping[str, Any], streams: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The same, with the facts of each residual stream that was moved."""
    nothing: dict[str, Any] = {"totals": {}, "blocks": []}
    return {**models, **{model: {**models.get(model, nothing), "residual": facts} for model, facts in streams.items()}}


def totals(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums, and the largest angle and factor, over all blocks of a model."""
    result: dict[str, Any] = {"blocks": len(blocks)}
    for name in _SUMMED:
        if values := [block[name] for block in blocks if name in block]:
            result[name] = sum(values)
    for name in _LARGEST:
        if values := [block[name] for block in blocks if name in block]:
            result[name] = max(values)
    if values := [block["scale_min"] for block in blocks if "scale_min" in block]:
        result["scale_min"] = min(values)
    return result


@dataclass
class Reports:
    """The facts of a merge, as they are planned."""

    _blocks: list[tuple[str, Layer, BlockKind, FactsOf]] = field(default_factory=list)
    _findings: list[tuple[str, Task]] = field(default_factory=list)
    _streams: list[tuple[str, StreamFacts]] = field(default_factory=list)

    def record(self, model: ModelReference, layer: Layer, kind: BlockKind, solution: Task) -> None:
        self._blocks.append((str(model), layer, kind, FactsOf(solution=solution)))

    def record_stream(self, model: ModelReference, kind: ResidualKind, solution: Task, share: Task | None) -> None:
        self._streams.append((str(model), StreamFacts(solution=solution, kind=kind.value, share=share)))

    def find(self, findings: Sequence[tuple[str, Task]]) -> None:
        """Add what tasks will tell of tensors."""
        self._findings.extend(findings)

    @property
    def blocks(self) -> tuple[tuple[str, Layer, BlockKind, FactsOf], ...]:
        return tuple(sorted(self._blocks, key=lambda block: (block[0], in_order(block[1]), block[2].value)))

    def task(self, out_path: str, head: Mapping[str, Any], after: Task | None) -> WriteReport:
        versions = {name: metadata.version(name) for name in ("mergekit", "torch", "transformers")}
        whole = {"format": FORMAT, **head, "versions": {"mergekit_symalign": __version__, **versions}}
        return WriteReport(
            path=str(Path(out_path) / REPORT),
            head=json.dumps(whole),
            blocks=self.blocks,
            streams=tuple(self._streams),
            findings=tuple(self._findings),
            after=after,
        )
