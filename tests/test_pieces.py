"""Large tensors a piece at a time: the same bits as whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from mergekit import merge_methods
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask, TensorDictWrapper
from torch import Tensor

from mergekit_symalign.graph import apply, merge, pieces
from mergekit_symalign.graph.apply import ApplyBlock
from mergekit_symalign.graph.merge import MergeInPieces, merge_task
from mergekit_symalign.symmetry.element import BlockElement, Fused, TensorAxes
from mergekit_symalign.symmetry.groups import AxisAction, HeadRotation, Permutation, PlaneRotation
from mergekit_symalign.symmetry.threads import one_thread

MODELS = [ModelReference.model_validate(f"model_{i}") for i in range(24)]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((pieces, "PIECE"), (apply, "PIECE"), (merge, "MERGED")):
        monkeypatch.setattr(module, name, 64)


def _task(method: str, models: Sequence[ModelReference], **parameters: Any) -> ExecuteMergeMethodTask:
    """As it is planned for an aligned merge."""
    inner = merge_methods.get(method)
    values = {p.name: p.default for p in inner.spec.parameters if p.name not in ("weight", "density")}
    of_models = {m: {"weight": 0.3 + 0.2 * i, "density": 1.0} for i, m in enumerate(models)}
    return merge_task(
        inner,
        gather_tensors=TensorDictWrapper(tensors=ImmutableMap(data={})),
        model_order=tuple(models),
        base_model=None if method == "linear" else models[0],
        output_weight=WeightInfo(name="x", optional=True),
        parameters=ImmutableMap(data=values | parameters),
        input_parameters=ImmutableMap(data={m: ImmutableMap(data=v) for m, v in of_models.items()}),
    )


def _whole(task: ExecuteMergeMethodTask) -> ExecuteMergeMethodTask:
    """As MergeKit plans it."""
    return ExecuteMergeMethodTask(**dict(task))


def _tensors(models: Sequence[ModelReference], shape: Sequence[int], *dtypes: torch.dtype) -> dict[Any, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {m: torch.randn(*shape, generator=g).to(dtypes[i % len(dtypes)]) for i, m in enumerate(models)}


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("shape", [(37, 11), (130,), (5, 3, 17), (1, 300), (300, 1)], ids=str)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,), (torch.float32,), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 24])
def test_merged_in_pieces(method: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], count: int) -> None:
    models = MODELS[:count]
    tensors = _tensors(models, shape, *dtypes)
    for parameters in ({}, {"normalize": True}, {"normalize": False}, {"lambda": 0.7}):
        if not parameters.keys() <= {p.name for p in merge_methods.get(method).spec.parameters}:
            continue
        task = _task(method, models, **parameters)
        assert (type(task) is MergeInPieces) is (method == "linear" or count <= 5)
        whole, in_pieces = _whole(task).execute(tensors), task.execute(tensors)
        assert whole is not None
        assert in_pieces is not None
        assert in_pieces.dtype == whole.dtype
        assert torch.equal(in_pieces, whole)


def test_pieces_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step sees more than a piece: the test above compares what it says."""
    seen: list[int] = []
    execute = ExecuteMergeMethodTask.execute

    def noted(self: Any, tensors: dict[Any, Tensor], **kwargs: Any) -> Tensor | None:
        seen.append(next(iter(tensors.values())).numel())
        return execute(self, tensors, **kwargs)

    monkeypatch.setattr(ExecuteMergeMethodTask, "execute", noted)
    _task("linear", MODELS[:2]).execute(_tensors(MODELS[:2], (40, 16), torch.float32))
    assert sum(seen) == 40 * 16 + 16  # and one row, for the dtype
    assert max(seen) <= 64


def test_what_mergekit_treats_otherwise_is_left_to_it() -> None:
    """A model without the tensor, numbers that are not floating point, shapes that differ."""
    models, g = MODELS[:2], torch.Generator().manual_seed(0)
    only_base = {models[0]: torch.randn(40, 16, generator=g)}
    for tensors in (only_base, {m: torch.arange(640).reshape(40, 16) for m in models}):
        task = _task("task_arithmetic", models)
        expected, found = _whole(task).execute(tensors), task.execute(tensors)
        assert (expected is None and found is None) or torch.equal(expected, found)  # type: ignore[arg-type]
    unlike = {models[0]: torch.randn(40, 16, generator=g), models[1]: torch.randn(41, 16, generator=g)}
    with pytest.raises(ValueError, match="Tensor size mismatch"):
        _task("linear", models).execute(unlike)


def test_only_elementwise_methods_are_divided() -> None:
    assert type(_task("ties", MODELS[:2])) is ExecuteMergeMethodTask
    assert type(_task("slerp", MODELS[:2])) is ExecuteMergeMethodTask


def _actions() -> dict[str, AxisAction]:
    g = torch.Generator().manual_seed(1)
    matrix = torch.linalg.qr(torch.randn(3, 8, 8, generator=g, dtype=torch.float64)).Q
    scale = 1 + torch.rand(3, generator=g, dtype=torch.float64)
    angles, scales = torch.randn(3, 4, generator=g), 1 + torch.rand(3, 4, generator=g)
    order = torch.randperm(24, generator=g)
    return {
        "value": HeadRotation(matrix, scale),
        "attended": HeadRotation(matrix, scale).dual(),
        "query": PlaneRotation(angles, scales),
        "gate": Permutation(order),
    }


AXES = {
    "rows": TensorAxes(("query", "hidden")),
    "columns": TensorAxes(("hidden", "attended")),
    "fused": TensorAxes((Fused((("query", 24), ("key", 24), ("value", 24))), "hidden")),
    "moved only": TensorAxes(("gate", "hidden")),
    "untouched": TensorAxes(("hidden", "key")),
}


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_transformed_in_pieces(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    axes, element = AXES[name], BlockElement(_actions())
    shape = {"columns": (50, 24), "fused": (72, 50)}.get(name, (24, 50))
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    before, widths = x.clone(), []
    call = BlockElement.__call__

    def noted(self: BlockElement, x: Tensor, axes: TensorAxes) -> Tensor:
        widths.append(x.numel())
        return call(self, x, axes)

    task = _apply(axes)
    whole = element(x, axes)
    monkeypatch.setattr(BlockElement, "__call__", noted)
    found = task.execute(x, {"actions": element.pack()})
    assert torch.equal(x, before)
    assert found.dtype == whole.dtype
    torch.testing.assert_close(found, whole)
    assert (len(widths) > 3) is (name in ("rows", "columns", "fused"))
    with one_thread():
        assert torch.equal(task.execute(x, {"actions": element.pack()}), found)


def _apply(axes: TensorAxes) -> ApplyBlock:
    nothing = TensorDictWrapper(tensors=ImmutableMap(data={}))
    return ApplyBlock.model_construct(load=nothing, axes=axes, solution=nothing)
