"""Statistics of a small model, measured in one piece: the whole model in memory, every product watched, in float64."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from models import EverythingInFloat64
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from mergekit_symalign.activations.calibration import tokenizer_digest
from mergekit_symalign.errors import CalibrationError
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.graph.fingerprint import fingerprint
from mergekit_symalign.graph.readers import tokenizer_of
from mergekit_symalign.statistics.file import Measured, Origin, write_statistics

Kinds = dict[str, dict[str, Tensor]]


def inputs_of(model: PreTrainedModel, seed: int, sequences: int = 12, length: int = 10) -> Tensor:
    """Random tokens or images; other seeds prefer other ones."""
    generator = torch.Generator().manual_seed(seed)
    if hasattr(model.config, "image_size"):
        size = (sequences, model.config.num_channels, model.config.image_size, model.config.image_size)
        return torch.randn(size, generator=generator, dtype=torch.float64)
    kinds = torch.randperm(model.config.vocab_size - 3, generator=generator)[:40] + 3
    return kinds[torch.randint(len(kinds), (sequences, length), generator=generator)]


class _Watch(TorchFunctionMode):
    """Notes every multiplication by a parameter: its name, the expert, what is read and what is written."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._at = {x.data_ptr(): (name, None) for name, x in model.named_parameters() if x.ndim == 2}
        packed = [(name, x) for name, x in model.named_parameters() if x.ndim == 3]
        self._at |= {x[e].data_ptr(): (name, e) for name, x in packed for e in range(len(x))}
        self.uses: list[tuple[str, int | None, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (functional.linear, torch.addmm):
            read, weight = args[1:3] if func is torch.addmm else args[:2]
            if weight.data_ptr() in self._at:
                if out.requires_grad:
                    out.retain_grad()
                self.uses.append((*self._at[weight.data_ptr()], read.detach().flatten(0, -2), out))
        return out


def grams(model: PreTrainedModel, inputs: Tensor, *, factors: bool = False) -> tuple[Kinds, dict[str, Any]]:
    """Gram matrices, means (and the gradients' Gram matrices) of everything that multiplies, and the tokens of each."""
    rows: dict[tuple[str, int | None], list[Tensor]] = defaultdict(list)
    slopes: dict[tuple[str, int | None], list[Tensor]] = defaultdict(list)
    for sequence in inputs.split(1) if factors else [inputs]:
        watch = _Watch(model)
        with EverythingInFloat64(), watch, torch.set_grad_enabled(factors):
            output = model(sequence)[0]
        if factors:
            _loss(output, sequence).backward()
        for name, expert, read, written in watch.uses:
            rows[name, expert].append(read)
            if factors and written.grad is not None:
                slopes[name, expert].append(written.grad.flatten(0, -2))
    weights = dict(model.named_parameters())
    statistics: Kinds = {}
    tokens: dict[str, Any] = {}
    for name in dict.fromkeys(name for name, _ in rows):
        count = len(weights[name]) if weights[name].ndim == 3 else None
        found = [rows.get((name, e), []) for e in ([None] if count is None else range(count))]
        back = [slopes.get((name, e), []) for e in ([None] if count is None else range(count))]
        width = next(x.shape[-1] for (other, _), xs in rows.items() if other == name for x in xs)
        joined = [torch.cat(xs) if xs else torch.zeros(0, width, dtype=torch.float64) for xs in found]
        statistics[name] = {
            "gram": _first_if(count, torch.stack([x.mT @ x / max(len(x), 1) for x in joined])),
            "mean": _first_if(count, torch.stack([x.sum(0) / max(len(x), 1) for x in joined])),
        }
        if factors:
            high = next(x.shape[-1] for (other, _), xs in slopes.items() if other == name for x in xs)
            slope = [torch.cat(xs) if xs else torch.zeros(0, high, dtype=torch.float64) for xs in back]
            squares = torch.stack([x.mT @ x / max(len(x), 1) for x in slope])
            statistics[name]["gradient_gram"] = _first_if(count, squares)
        tokens[name] = len(joined[0]) if count is None else tuple(len(x) for x in joined)
    return statistics, tokens


def fishers(model: PreTrainedModel, inputs: Tensor) -> tuple[Kinds, dict[str, Any]]:
    """Mean over sequences of the squared gradient of every parameter."""
    total = {name: torch.zeros_like(x) for name, x in model.named_parameters()}
    for sequence in inputs.split(1):
        model.zero_grad()
        with EverythingInFloat64():
            output = model(sequence)[0]
        _loss(output, sequence).backward()
        for name, x in model.named_parameters():
            total[name] += (x.grad if x.grad is not None else torch.zeros_like(x)).square() / len(inputs)
    return {name: {"fisher": x} for name, x in total.items()}, dict.fromkeys(total, inputs.numel())


def measure(
    model: PreTrainedModel,
    folder: Path,
    out: Path,
    *,
    seed: int = 0,
    fisher: str = "none",
    gram: str = "full",
    inputs: Tensor | None = None,
    **changes: Any,
) -> Path:
    """Write the statistics of a model that was saved in ``folder``."""
    inputs = inputs_of(model, seed) if inputs is None else inputs
    statistics, tokens = (
        fishers(model, inputs) if fisher == "empirical" else grams(model, inputs, factors=fisher == "kronecker")
    )
    tied = [name for name in statistics if fisher != "empirical" and len(_names_of(model, name)) > 1]
    statistics = {name: kinds for name, kinds in statistics.items() if name not in tied}
    if fisher == "kronecker":
        rest, counts = fishers(model, inputs)
        rest = {name: kinds for name, kinds in rest.items() if name not in statistics}
        statistics, tokens = statistics | rest, tokens | {name: counts[name] for name in rest}
    if gram == "diagonal":
        for kinds in statistics.values():
            kinds["gram"] = kinds["gram"].diagonal(dim1=-2, dim2=-1)
    edit = changes.pop("edit", None)
    statistics = {n: {k: x.detach().float().contiguous() for k, x in kinds.items()} for n, kinds in statistics.items()}
    if edit is not None:
        edit(statistics, tokens)
    write_statistics(
        out,
        origin(model, folder) if "origin" not in changes else changes.pop("origin"),
        Measured(
            gram="none" if fisher == "empirical" else gram,  # type: ignore[arg-type]
            fisher=fisher,  # type: ignore[arg-type]
            tokens=inputs.shape[0] * inputs.shape[1],
            sequences=len(inputs),
            sequence_length=inputs.shape[1],
            calibration="0" * 64,
            **changes,
        ),
        statistics,
        {name: tokens[name] for name in statistics},
    )
    return out


def origin(model: PreTrainedModel, folder: Path, **changes: Any) -> Origin:
    """What a file says that it is of."""
    layout = resolve(model.config, model="m")
    reference = ModelReference.model_validate({"model": str(folder)})
    fields: dict[str, Any] = {
        "model": str(folder),
        "fingerprint": fingerprint(LoaderCache().get(reference).index),
        "family": layout.family.name,
        "sizes": {"layers": layout.layers, **asdict(layout.geometry)},
        "tokenizer": _reader(reference),
    }
    return Origin(**fields | changes)


def _reader(reference: ModelReference) -> str:
    """Digest of the tokenizer that lies beside the weights, if one does."""
    try:
        return tokenizer_digest(tokenizer_of(reference, MergeOptions()))
    except CalibrationError:
        return "none"


def _first_if(count: int | None, x: Tensor) -> Tensor:
    return x[0] if count is None else x


def _names_of(model: PreTrainedModel, name: str) -> list[str]:
    weights = dict(model.named_parameters(remove_duplicate=False))
    return [other for other, x in weights.items() if x is weights[name]]


def _loss(output: Tensor, inputs: Tensor) -> Tensor:
    """Of the next token where there are logits of tokens, else of the largest output."""
    if output.ndim == 3 and inputs.ndim == 2 and output.shape[-1] > int(inputs.max()):
        return functional.cross_entropy(output[:, :-1].flatten(0, 1), inputs[:, 1:].flatten(), reduction="sum")
    flat = output.flatten(0, -2)
    return functional.cross_entropy(flat, flat.argmax(-1), reduction="sum")
