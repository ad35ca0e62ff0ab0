"""What travels between the driver of a merge and its workers: plain data, and no tasks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache, LoadTensor
from mergekit.options import MergeOptions
from mergekit.tokenizer import TokenizerInfo

from mergekit_symalign.distributed.parts import Component, Graph, Told
from mergekit_symalign.graph.merge_report import WriteReport


@dataclass(frozen=True)
class Job:
    """A merge, as a worker plans it again.

    Attributes:
        config: the configuration, as YAML.
        options: MergeKit's.
        out: folder of the output.
        scratch: folder of the workers' shards, inside it.
        folder: where the driver runs; relative paths begin there.
        threads: of each worker.
        seen: paths that every worker has to see as well.
        digest: of the driver's plan.
        random: state of torch's generator when the first task runs; None without a seed.
        tokenizer: of the output, if it is built: MergeKit numbers the tokens of a union anew in every process.
    """

    config: str
    options: MergeOptions
    out: str
    scratch: str
    folder: str
    threads: int
    seen: tuple[str, ...]
    digest: str
    random: bytes | None = None
    tokenizer: TokenizerInfo | None = field(default=None, hash=False, compare=False)


@dataclass(frozen=True)
class Done:
    """What a worker has done.

    Attributes:
        folder: of its shards, inside the job's scratch folder.
        weight_map: the shard of each tensor.
        size: bytes of all tensors.
        told: values for the end of the merge.
        strayed: whether it drew other random numbers than one process, though there is a seed.
    """

    folder: str
    weight_map: Mapping[str, str]
    size: int
    told: Mapping[Told, Any]
    strayed: bool = False


def digest_of(graph: Graph, components: Sequence[Component]) -> str:
    """The same for two plans of the same merge, of the same files, by the same versions."""
    facts = {
        "components": [[c.saves, c.told, c.size] for c in components],
        "heads": [task.head for task in graph.targets if isinstance(task, WriteReport)],
        "files": sorted(_files(graph)),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def models_of(graph: Graph) -> list[ModelReference]:
    """All that are read, in order."""
    loads = (task for task in graph.universe.tasks if isinstance(task, LoadTensor))
    return list(dict.fromkeys(load.model for load in loads))


def local_paths(graph: Graph) -> tuple[str, ...]:
    """The folders of the models that are no models of the Hub."""
    paths = (path for model in models_of(graph) for path in (model.model, model.lora) if path is not None)
    return tuple(dict.fromkeys(str(Path(p.path).absolute()) for p in paths if Path(p.path).exists()))


def _files(graph: Graph) -> Iterator[tuple[str, str, int]]:
    """Name and size of every file of weights, whatever folder it is in."""
    for model in models_of(graph):
        index = LoaderCache().get(model).index
        for name in sorted(set(index.tensor_paths.values())):
            yield str(model), name, (Path(index.base_path) / name).stat().st_size
