"""Loading tensors for an aligned merge: MergeKit's own tasks, with every value checked where it is read."""

from __future__ import annotations

from functools import partial
from typing import Any, Dict, Optional, Tuple

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors, LoaderCache, LoadTensor

from mergekit_symalign.errors import CheckpointError, ValueInTensorError
from mergekit_symalign.graph.damaged import describe
from mergekit_symalign.graph.joined import joined
from mergekit_symalign.symmetry.rows import is_finite


class LoadStored(LoadTensor):
    """MergeKit's `LoadTensor`, without the bookkeeping for gradients that a pickled parameter brings along."""

    def _load_converted_tensor(self, loader: Any) -> Optional[torch.Tensor]:
        """Joined from pieces as transformers joins them, also those of a text model inside another model."""
        device = self.device or "cpu"
        pieces = {key: partial(loader.get_tensor, key, device=device) for key in loader.index.tensor_paths}
        config = self.model.config(trust_remote_code=LoaderCache().trust_remote_code)
        x = joined(config, pieces, (self.tensor, *(self.aliases or ())))
        return None if x is None else x.to(device)

    def execute(self) -> Optional[torch.Tensor]:
        """
        Raises:
            CheckpointError: if the file does not give the tensor.
        """
        try:
            x = super().execute()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # safetensors, PyTorch's unpickler and MergeKit's have errors of their own
            raise CheckpointError(
                f"tensor {self.tensor} of model {self.model}",
                f"it cannot be read ({describe(error)})",
                "Download or export this checkpoint again",
            ) from error
        return None if x is None else x.detach()


class LoadFinite(LoadStored):
    """The same, refusing NaN and infinity. Equal loads are one task: nothing is read twice.

    Attributes:
        label: when to schedule it, instead of by the tensor's name.
    """

    label: Optional[str] = None

    def group_label(self) -> Optional[str]:
        return self.label or super().group_label()

    def execute(self) -> Optional[torch.Tensor]:
        x = super().execute()
        if x is not None and not is_finite(x):
            raise ValueInTensorError(
                f"tensor {self.tensor} of model {self.model}",
                "it holds NaN or infinity",
                "Download or export this checkpoint again; a merge would spread the bad value",
            )
        return x


class GatherAligned(GatherTensors):
    """MergeKit's `GatherTensors` with finite loads, some of them replaced by aligned tensors.

    Attributes:
        aligned: the task that gives a model's tensor, for each model that is aligned.
        label: of the loads.
    """

    aligned: Tuple[Tuple[ModelReference, Task], ...] = ()
    label: Optional[str] = None

    def loads(self) -> Dict[ModelReference, LoadFinite]:
        """The plain load of each model's tensor."""
        loads = zip(self.weight_info.keys(), super().arguments().values(), strict=True)
        return {model: LoadFinite(**dict(load), label=self.label) for model, load in loads}

    def arguments(self) -> Dict[str, Task]:
        tasks: Dict[ModelReference, Task] = {**self.loads(), **dict(self.aligned)}
        return {f"{model}:{info.name}": tasks[model] for model, info in self.weight_info.items()}
