"""One pass over the inputs, layer by layer, that sums up what the linear layers read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_symalign.activations.gram import Gram, GramSums
from mergekit_symalign.activations.inputs import Inputs, Shared
from mergekit_symalign.activations.linear import Rows, Use, Watch
from mergekit_symalign.activations.objectives import IGNORED, Samples, logits_of, negative_log_likelihood
from mergekit_symalign.activations.runner import Recorded
from mergekit_symalign.activations.sources import Source, full_names, outside_of

LOGITS_TOKENS = 1024  # whose logits are in memory at once


@dataclass(frozen=True)
class Loss:
    """Of a model on its inputs.

    Attributes:
        total: negative log-likelihood in nats.
        count: how many targets it is of.
    """

    total: float = 0.0
    count: int = 0

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.total + other.total, self.count + other.count)

    @property
    def mean(self) -> float | None:
        """None where nothing was predicted."""
        return self.total / self.count if self.count else None


@torch.inference_mode()
def sum_inputs(
    source: Source,
    samples: Samples,
    wanted: Inputs,
    *,
    full: bool,
    put: Callable[[Gram], None],
    step: Callable[[], object],
) -> Loss:
    """Gram matrices of the inputs that are wanted, each handed on as soon as it is whole.

    Args:
        source: the model.
        samples: its inputs, with targets if a loss is wanted.
        wanted: the inputs of its tensors.
        full: whether whole Gram matrices are wanted, or their diagonals.
        put: gets each.
        step: is called after each layer.

    Returns:
        The loss, where there are targets.
    """
    runner, outside = source.runner, outside_of(source)
    sums = GramSums(wanted.front, full=full)
    recorded: list[Recorded] = []
    for i, batch in enumerate(samples.batches):
        with watching(outside, sums, Rows(batch, first=i == 0)):
            recorded.append(runner.embed(batch, outside))
    _hand_on(sums, put)
    del outside
    hidden = [r.hidden for r in recorded]
    recorded = [replace(r, hidden=r.hidden[:0]) for r in recorded]
    for index in range(len(runner.layers)):
        run_layer_noting(source, index, samples, hidden, recorded, wanted.layers[index], full=full, put=put)
        step()
    outside = outside_of(source)
    sums, loss = GramSums(wanted.behind, full=full), Loss()
    for i in range(len(samples.batches)):
        for at, piece, targets in samples.rows(i, LOGITS_TOKENS):
            if targets is None and not wanted.behind:
                continue
            with watching(outside, sums, Rows(piece)):
                output = runner.head(piece, outside, hidden[i][at])
            if targets is not None:
                total = negative_log_likelihood(logits_of(output), targets)
                loss += Loss(float(total), int((targets != IGNORED).sum()))
    _hand_on(sums, put)
    return loss


def run_layer_noting(
    source: Source,
    index: int,
    samples: Samples,
    hidden: list[Tensor],
    recorded: list[Recorded],
    wanted: Iterable[Shared],
    *,
    full: bool,
    put: Callable[[Gram], None],
) -> None:
    """Run one layer on all batches, in place of its ``hidden`` states, and hand on the Gram matrices of its inputs."""
    runner, weights = source.runner, source.layer(index)
    names = full_names(runner, index, weights)
    sums = GramSums(wanted, full=full)
    for i, batch in enumerate(samples.batches):
        rows = Rows(batch, recorded[i], first=i == 0)
        with rows.without_padding(runner.layers[index], weights), watching(names, sums, rows):
            hidden[i] = runner.call(index, weights, hidden[i], recorded[i])
    _hand_on(sums, put)


@contextmanager
def watching(weights: dict[str, Tensor], sums: GramSums, rows: Rows) -> Iterator[None]:
    """Inside, what the tensors read is summed."""

    def note(use: Use) -> None:
        sums.note(use, rows)

    with Watch(weights, note):
        yield


def _hand_on(sums: GramSums, put: Callable[[Gram], None]) -> None:
    for gram in sums.found():
        put(gram)
