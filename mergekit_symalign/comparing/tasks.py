"""Tasks of the LM Evaluation Harness (lm-eval), as mergekit-evolve runs them."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_symalign.errors import ConfigError

PACKAGE = "lm_eval"


@dataclass(frozen=True)
class Harness:
    """What is asked of the harness.

    Attributes:
        tasks: by name.
        search_path: a folder with tasks of one's own.
        limit: how many questions of each task; None for all.
        fewshot: how many examples stand before each question; None for what the task says.
        batch_size: questions that run together.
    """

    tasks: tuple[str, ...]
    search_path: Path | None = None
    limit: int | None = None
    fewshot: int | None = None
    batch_size: int = 8


@dataclass(frozen=True)
class Score:
    """What a model reached.

    Attributes:
        value, error: of the task's first metric, and its standard error if the harness knows it.
        metric: its name.
        higher_is_better: as the harness says.
    """

    value: float
    error: float | None
    metric: str
    higher_is_better: bool


def require_tasks(asked: Harness) -> None:
    """
    Raises:
        ConfigError: if the harness is not installed, or has no such task.
    """
    where = f"--tasks {','.join(asked.tasks)}"
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError(where, "lm-eval is not installed", "pip install 'mergekit-symalign[eval]'")
    known = set(_manager(asked).all_tasks)
    if unknown := [task for task in asked.tasks if task not in known]:
        reason = f"lm-eval has no task {', '.join(unknown)}"
        raise ConfigError(where, reason, "See lm-eval ls tasks, or name a folder of yours: --task-search-path DIR")


def scores(
    model: Mapping[str, Any], tasks: Sequence[str], asked: Harness, device: str, *, bars: bool
) -> Iterator[tuple[str, Score]]:
    """One model's score in each task, one after another.

    Args:
        model: arguments of the harness' class `hf`: pretrained, dtype and so on.
        tasks: which of them.
        asked: how to run them.
        device: where.
        bars: whether the harness may draw its progress bars.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager, loaded = _manager(asked), HFLM(device=device, batch_size=asked.batch_size, **model)
    for task in tasks:
        with nullcontext() if bars else redirect_stderr(io.StringIO()):
            found = simple_evaluate(
                model=loaded,
                tasks=[task],
                num_fewshot=asked.fewshot,
                limit=asked.limit,
                task_manager=manager,
                log_samples=False,
            )
        better = (found.get("higher_is_better") or {}).get(task) or {}
        yield task, score_of(found["results"][task], better)


def score_of(result: Mapping[str, Any], better: Mapping[str, bool]) -> Score:
    """The first metric of a task, as the harness writes it: ``acc,none`` and ``acc_stderr,none``."""
    keys = [key for key in result if "," in key and not key.partition(",")[0].endswith("_stderr")]
    metric, _, kind = keys[0].partition(",")
    error = result.get(f"{metric}_stderr,{kind}")
    known = error if isinstance(error, (int, float)) else None
    return Score(float(result[keys[0]]), known, metric, better.get(metric) is not False)


def _manager(asked: Harness) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if asked.search_path is None else str(asked.search_path))


def names(text: str) -> tuple[str, ...]:
    """Tasks as people list them: ``gsm8k,arc_easy``."""
    found: Sequence[str] = [name.strip() for name in text.split(",")]
    return tuple(dict.fromkeys(name for name in found if name))
