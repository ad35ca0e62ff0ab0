"""The run on prompts behind optimal transport fusion by activations: what every linear layer puts out, compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task

from mergekit_symalign.activations.outputs import compare_streams, run_outputs
from mergekit_symalign.families.flow import Place
from mergekit_symalign.fusion.correlations import TokenSums
from mergekit_symalign.graph.activations import LayerTask, Part
from mergekit_symalign.graph.ready import Context
from mergekit_symalign.graph.streaming import Aligned, start_run

FRONT = -1  # in front of the layers


@dataclass(frozen=True)
class Run:
    """A run on prompts.

    Attributes:
        evidence: by layer (-1: in front of them), the task that gives what each model has in common with the anchor.
    """

    evidence: Mapping[int, Task]


class CompareStreams(Task[List[Dict[str, Any]]]):
    """What enters the first layer of each model, compared with what enters the anchor's.

    Attributes:
        hidden: of the anchor and each model, of each batch.
        recorded: where the prompts are no padding.
    """

    hidden: Task
    recorded: Task

    def arguments(self) -> Dict[str, Task]:
        return {"hidden": self.hidden, "recorded": self.recorded}

    def group_label(self) -> Optional[str]:
        return self.hidden.group_label()

    def uses_accelerator(self) -> bool:
        return True

    def execute(self, hidden: Any, recorded: Any) -> List[Dict[str, Any]]:
        anchor, *models = hidden
        sums = ({"stream": compare_streams(anchor, model, recorded["kept"])} for model in models)
        return [_packed(of, {}, anchor[0].dtype) for of in sums]


class RunOutputs(LayerTask):
    """Compares what the linear layers of a layer put out with the anchor's.

    Attributes:
        places: of the layer's tensors in the residual stream.
        parallel: attention and MLP read the same stream.
    """

    places: Tuple[Tuple[str, Place], ...]
    parallel: bool

    def execute(self, hidden: Any, recorded: Any, **tensors: Optional[torch.Tensor]) -> Dict[str, Any]:
        streams = self.streams(hidden, recorded, tensors)
        found = run_outputs(
            self.layer, streams[0], streams[1:], recorded["kept"], dict(self.places), parallel=self.parallel
        )
        dtype = hidden[0][0].dtype
        return {"hidden": found.hidden, "evidence": [_packed(sums, found.sizes, dtype) for sums in found.sums]}


def plan_run(
    context: Context,
    models: Tuple[ModelReference, ...],
    aligned: Aligned,
    places: Mapping[str, Place],
    *,
    parallel: bool,
) -> Run:
    """One step for each layer, for the anchor and all models together.

    Args:
        context: the merge.
        models: anchor first.
        aligned: of each tensor by name, the tasks that give it for models that are aligned first.
        places: of a layer's tensors in the residual stream.
        parallel: attention and MLP read the same stream.

    Raises:
        ArchitectureError, ConfigError, CalibrationError: as `start_run`.
    """
    planned = [(one.weight, one.planned) for one in context.tensors]
    layers = context.checkpoints[models[0]].layout.layers
    run = start_run(planned, models, layers - 1, context.checkpoints, context.options, aligned, parameter="cost")
    hidden = run.hidden
    evidence: Dict[int, Task] = {FRONT: CompareStreams(hidden=hidden, recorded=run.recorded)}
    shared: Dict[str, Any] = {"recorded": run.recorded, "places": tuple(places.items()), "parallel": parallel}
    for layer in range(layers):
        step = RunOutputs(hidden=hidden, **shared, **run.step(layer))
        hidden = Part(of=step, keys=("hidden",))
        evidence[layer] = Part(of=step, keys=("evidence",))
    return Run(evidence)


def _packed(sums: Mapping[str, TokenSums], sizes: Mapping[Place, float], dtype: torch.dtype) -> Dict[str, Any]:
    """As dicts and tuples of tensors and plain values."""
    return {
        "outputs": {name: of.tensors() for name, of in sums.items()},
        "sizes": {place.value: size for place, size in sizes.items()},
        "dtype": str(dtype).removeprefix("torch."),
    }
