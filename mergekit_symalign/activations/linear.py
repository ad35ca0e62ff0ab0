"""The linear layers of a running model: what each of them reads, wherever a weight is multiplied with an input.

transformers multiplies by `torch.nn.functional.linear`, and by `torch.addmm` in GPT-2's ``Conv1D``. Both are watched,
and weights are recognised by their memory. So routers and experts, which are parameters without a module of their own,
are seen like every other layer: an expert is a slice of a packed weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mergekit_symalign.activations.runner import Batch, Recorded


@dataclass(frozen=True)
class Use:
    """One multiplication.

    Attributes:
        name: of the weight, as the watch was told.
        expert: which slice of a packed weight; None where it holds one matrix.
        read: [..., in].
        written: [..., out].
    """

    name: str
    expert: int | None
    read: Tensor
    written: Tensor


class Watch(TorchFunctionMode):
    """Inside, every multiplication by one of these weights is reported.

    Args:
        weights: by name, as the model runs with them.
        note: is told each use.
    """

    def __init__(self, weights: Mapping[str, Tensor], note: Callable[[Use], None]) -> None:
        super().__init__()
        self._note = note
        self._known: dict[int, list[tuple[str, Tensor]]] = {}
        for name, x in weights.items():
            if x.ndim >= 2:
                self._known.setdefault(x.untyped_storage().data_ptr(), []).append((name, x))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read, weight = _operands(func, args, kwargs)
        if read is not None and weight is not None and (found := self._found(weight)) is not None:
            self._note(Use(*found, read, out))
        return out

    def _found(self, weight: Tensor) -> tuple[str, int | None] | None:
        for name, x in self._known.get(weight.untyped_storage().data_ptr(), ()):
            at = weight.storage_offset() - x.storage_offset()
            if weight.shape == x.shape and at == 0:
                return name, None
            if x.ndim == 3 and weight.shape == x.shape[1:] and 0 <= at < x.numel():
                return name, at // x.stride(0)
        return None


def _operands(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """What is read, and the weight."""
    if func is functional.linear:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
        return given.get("input"), given.get("weight")
    if func is torch.addmm and len(args) == 3:
        return args[1], args[2]
    return None, None


class Rows:
    """Which rows of what a layer reads are tokens of the inputs, and which are padding.

    Args:
        batch: the inputs.
        recorded: what the model hands to its layers; None in front of them.
        first: whether this is the first batch. What does not depend on the inputs (relative positions, which DeBERTa
            projects like tokens) is counted in it, and in no other.
    """

    def __init__(self, batch: Batch, recorded: Recorded | None = None, *, first: bool = True) -> None:
        self._shape, self._first = batch.valid.shape, first
        whole = bool(batch.valid.all())
        self.padding = not whole
        self._at = None if whole else torch.nonzero(batch.valid.flatten()).flatten()
        handed = recorded.tensors if recorded is not None else ()
        self._handed = {x.untyped_storage().data_ptr() for x in handed}

    def of(self, use: Use) -> Tensor:
        """[rows, in]; none where they were counted before. Experts get no padding inside `without_padding`."""
        return self.select(use.read, use)

    def are_tokens(self, use: Use) -> bool:
        """Whether the rows depend on the inputs."""
        return use.expert is not None or not self._is_position(use.read)

    def select(self, x: Tensor, use: Use) -> Tensor:
        """The rows of what a layer reads or writes."""
        flat = x.reshape(-1, x.shape[-1])
        if use.expert is not None:
            return flat
        if self._is_position(use.read):
            return flat if self._first else flat[:0]
        if self._at is None or len(flat) != self._shape.numel():  # pooled: one row for each input
            return flat
        return flat.index_select(0, self._at)

    def _is_position(self, read: Tensor) -> bool:
        if read.untyped_storage().data_ptr() in self._handed:
            return True
        rows = read.shape[:-1].numel()
        return rows not in (self._shape.numel(), self._shape[0])

    @contextmanager
    def without_padding(self, module: nn.Module, packed: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the experts of a layer are given no padding, and write zeros for it.

        Args:
            module: the layer.
            packed: its weights by the name inside it; those with three axes belong to experts.
        """
        owners = {name.rpartition(".")[0] for name, x in packed.items() if x.ndim == 3} if self.padding else ()
        handles: list[Any] = []
        for owner in owners:
            experts = module.get_submodule(owner)
            handles.append(experts.register_forward_pre_hook(self._taken, with_kwargs=True))
            handles.append(experts.register_forward_hook(self._put_back))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _taken(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tuple(map(self._compact, args)), {key: self._compact(x) for key, x in kwargs.items()}

    def _compact(self, x: Any) -> Any:
        per_row = isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == self._shape.numel()
        return x.index_select(0, self._at) if per_row and self._at is not None else x

    def _put_back(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        """Unchanged where rows are no tokens (convolutions), or each token is there once for each expert (Llama 4)."""
        assert self._at is not None
        if len(out) != len(self._at):
            return out
        whole = out.new_zeros(self._shape.numel(), *out.shape[1:])
        return whole.index_copy(0, self._at, out)
