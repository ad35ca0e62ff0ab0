"""The work of a comparison: one model after another is measured on what is missing, and all of it is remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_symalign.activations.calibration import tokenizer_digest
from mergekit_symalign.commands.common import parsed
from mergekit_symalign.commands.compare_configs import Asked
from mergekit_symalign.commands.compare_inputs import File, Prepared
from mergekit_symalign.commands.compare_measuring import losses_of, scores_of
from mergekit_symalign.commands.compare_merges import MergeFailedError, Merges, ToMerge
from mergekit_symalign.commands.outcome import explained
from mergekit_symalign.comparing.rows import Column, Row, best_overall
from mergekit_symalign.comparing.store import Store, digest, file_digest
from mergekit_symalign.comparing.table import loss_column
from mergekit_symalign.graph.alignments import package_versions
from mergekit_symalign.graph.fingerprint import fingerprint_of
from mergekit_symalign.graph.readers import tokenizer_of
from mergekit_symalign.graph.shared_files import SharedFiles

_MATTERS = ("allow_crimes", "unsafe_truncate_embeddings", "lora_merge_dtype", "random_seed")  # options of a merge


@dataclass(frozen=True)
class Compared:
    """What came of it.

    Attributes:
        rows: models first, then merges.
        columns: files, then tasks.
        kept: folders of merges that stay, by label.
    """

    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    kept: Mapping[str, Path]


@dataclass(frozen=True)
class Source:
    """A row to be measured.

    Attributes:
        label: in the table.
        key: digest of all that its weights, and how it reads texts, depend on.
        is_merge: or a model that merges are of.
        model: what is there; None for a merge to make.
        merge: what is to be made.
    """

    label: str
    key: str
    is_merge: bool
    model: ModelReference | None = None
    merge: ToMerge | None = None


def compare_all(
    asked: Asked, prepared: Prepared, options: MergeOptions, say: Callable[[str], object] = lambda _: None
) -> Compared:
    """Measure what is missing, a model at a time.

    Args:
        asked: what the user wants.
        prepared: the same, read and checked.
        options: of MergeKit.
        say: gets a line for each step.
    """
    store = Store(asked.out)
    run = _Run(asked, prepared, options, store, Merges(asked.out, options, store, say), say)
    sources, rows = list(_sources(prepared, options)), list[Row]()
    with run.merges.at_work():
        for number, source in enumerate(sources, 1):
            rows.append(run.row(source, f"{number} of {len(sources)}"))
            staying = _staying(rows, run.columns(sources), asked.keep)
            for done, row in zip(sources, rows, strict=False):
                if done.merge is not None and row not in staying:
                    run.merges.let_go(done.merge)
        kept = {
            row.label: run.merges.keep(source.merge)
            for source, row in zip(sources, rows, strict=True)
            if source.merge is not None and row in staying
        }
    return Compared(tuple(rows), run.columns(sources), kept)


def _staying(rows: Sequence[Row], columns: Sequence[Column], keep: str) -> list[Row]:
    """Those whose merges stay on disk."""
    if keep == "all":
        return [row for row in rows if row.failed is None]
    best = best_overall(rows, columns) if keep == "best" else None
    return [] if best is None else [best]


def _sources(prepared: Prepared, options: MergeOptions) -> Iterator[Source]:
    """Every row, models first."""
    keys = {model: _key_of(model, options) for model in prepared.models.values()}
    for label, model in prepared.models.items():
        yield Source(label, keys[model], False, model)
    matters = {name: getattr(options, name) for name in _MATTERS}
    for variant in prepared.merges:
        config = MergeConfiguration.model_validate(dict(variant.config))
        models = sorted((str(model), keys[model]) for model in config.referenced_models())
        shared = sorted(SharedFiles.of(config, options).commits.values())
        files = [file_digest(path) for path in _files_in(variant.config)]
        key = digest("merge", variant.config, models, files, shared, matters, package_versions())
        yield Source(variant.label, key, True, merge=ToMerge(variant, key))
    for label, model in prepared.folders.items():
        yield Source(label, _key_of(model, options), True, model)


def _key_of(model: ModelReference, options: MergeOptions) -> str:
    """Of the weights, the config and the tokenizer."""
    config = model.config(trust_remote_code=options.trust_remote_code).to_dict()
    config.pop("_name_or_path", None)
    tokenizer = tokenizer_of(model, options)
    reads = (tokenizer_digest(tokenizer), tokenizer("a")["input_ids"])
    return digest("model", fingerprint_of(model), config, reads, package_versions())


def _files_in(config: Any) -> Iterator[Path]:
    """The files that a config names: alignments, statistics, calibration."""
    if isinstance(config, Mapping):
        config = list(config.values())
    if isinstance(config, list):
        for part in config:
            yield from _files_in(part)
    elif isinstance(config, str) and len(config) < 1024 and "\n" not in config and Path(config).is_file():
        yield Path(config)


@dataclass(frozen=True)
class _Run:
    """One comparison: what is asked for, and where results and merges are."""

    asked: Asked
    prepared: Prepared
    options: MergeOptions
    store: Store
    merges: Merges
    say: Callable[[str], object]

    def row(self, source: Source, place: str) -> Row:
        """Measure what is missing of a row. Only a merge may fail: without its models a comparison says nothing."""
        failed = None
        try:
            self._measure(source, place)
        except MergeFailedError as error:
            failed = str(error)
        except Exception as error:
            shown = explained(error)
            if shown is None or not source.is_merge:
                raise
            failed = f"it could not be measured: {shown.format_message()}"
        nats = {file.name: x["nats"] for file in self.prepared.files if (x := self._loss(source, file)) is not None}
        scores = {t: (x["value"], x["error"]) for t in self._tasks if (x := self._score(source, t)) is not None}
        cost = self.store.cost(source.key) or {}
        values = {} if source.merge is None else source.merge.variant.values
        seconds, peak = cost.get("seconds"), cost.get("peak_mib")
        return Row(source.label, source.is_merge, nats, scores, seconds, peak, values, failed)

    def columns(self, sources: Sequence[Source]) -> tuple[Column, ...]:
        """Files, then tasks, as far as one of them was measured."""
        found = [loss_column(file.name, file.selection.tokens) for file in self.prepared.files]
        for task in self._tasks:
            known = next((x for source in sources if (x := self._score(source, task)) is not None), None)
            if known is not None:
                found.append(Column(task, known["metric"], higher_is_better=known["higher_is_better"]))
        return tuple(found)

    def _measure(self, source: Source, place: str) -> None:
        files = [file for file in self.prepared.files if self._loss(source, file) is None]
        tasks = [task for task in self._tasks if self._score(source, task) is None]
        if not files and not tasks:
            return
        model = source.model or parsed(str(self.merges.made(source.merge, place)))  # type: ignore[arg-type]
        self.say(f"measuring {source.label} ({place})")
        if files:
            for file, nats in losses_of(model, files, self.prepared.dtype, self.options):
                self.store.put_measured(self._loss_key(source, file), {"nats": nats})
        if tasks and self.asked.harness is not None:
            for task, score in scores_of(model, tasks, self.asked.harness, self.prepared.dtype, self.options):
                self.store.put_measured(self._score_key(source, task), asdict(score))

    @property
    def _tasks(self) -> tuple[str, ...]:
        return () if self.asked.harness is None else self.asked.harness.tasks

    def _loss(self, source: Source, file: File) -> Mapping[str, Any] | None:
        return self.store.measured(self._loss_key(source, file))

    def _score(self, source: Source, task: str) -> Mapping[str, Any] | None:
        return self.store.measured(self._score_key(source, task))

    def _loss_key(self, source: Source, file: File) -> str:
        return digest("loss", source.key, file.selection.digest, str(self.prepared.dtype))

    def _score_key(self, source: Source, task: str) -> str:
        harness = self.asked.harness
        how = None if harness is None else (harness.limit, harness.fewshot, str(harness.search_path))
        return digest("task", source.key, task, how, str(self.prepared.dtype))
