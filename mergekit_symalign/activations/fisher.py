"""Fisher information of every tensor, one layer of the model in memory at a time.

The Fisher information of a sequence is the square of the gradient of its log-likelihood, which is the sum over its
tokens, not their mean. The mean over sequences is what Matena and Raffel (2022) call the diagonal of the Fisher matrix,
with a sequence for an example. Sequences in which nothing is predicted do not count.

Sequences run forward through one layer after another, and what enters each layer waits on disk. Then gradients run
backward through one layer after another, each loaded again. A gradient is squared as soon as it is there, sequence by
sequence, so two tensors are kept for each weight: the sum and one gradient. Tensors outside the layers come last, as a
tied embedding gets a gradient from both ends, and both are added before they are squared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mergekit_symalign.activations.gram import Gram, GramSums
from mergekit_symalign.activations.inputs import Shared
from mergekit_symalign.activations.linear import Rows, Use, Watch
from mergekit_symalign.activations.objectives import (
    IGNORED,
    Samples,
    drawn,
    likeliest,
    logits_of,
    negative_log_likelihood,
)
from mergekit_symalign.activations.runner import Recorded
from mergekit_symalign.activations.sources import Source, full_names, outside_of, tied_names
from mergekit_symalign.activations.spill import Spill
from mergekit_symalign.activations.stream import Loss, run_layer_noting, watching
from mergekit_symalign.activations.wanted import Wanted

Put = Callable[[str, tuple[str, ...], Tensor], None]  # kind, names of the tensors, numbers


class FisherPass:
    """One measurement.

    Args:
        source: the model.
        samples: one input in each batch, without padding, and its targets.
        wanted: what is measured.
        spill: for hidden states.
        gram, put: get each statistic as soon as it is whole.
        step: is called after each layer, forward and backward.
    """

    def __init__(
        self,
        source: Source,
        samples: Samples,
        wanted: Wanted,
        spill: Spill,
        *,
        gram: Callable[[Gram], None],
        put: Put,
        step: Callable[[], object],
    ) -> None:
        self._source, self._runner, self._samples, self._wanted, self._spill = (
            source,
            source.runner,
            samples,
            wanted,
            spill,
        )
        self._gram, self._put, self._step = gram, put, step
        self._targets: list[Tensor] = []
        self._moving: tuple[int, ...] = ()  # which arguments of the layers depend on weights

    def run(self) -> Loss:
        """Measure everything.

        Returns:
            The loss of the true targets.
        """
        recorded = self._forward()
        loss, upstream = self._behind()
        arguments: list[list[Tensor | None]] = [[None] * len(self._moving) for _ in recorded]
        for index in reversed(range(len(self._runner.layers))):
            self._backward(index, recorded, upstream, arguments)
            self._step()
        self._outside(upstream, arguments)
        return loss

    @property
    def _count(self) -> int:
        """Sequences in which something is predicted."""
        return max(1, sum(bool((targets != IGNORED).any()) for targets in self._targets))

    def _forward(self) -> list[Recorded]:
        """Run all layers, and keep what enters each of them, and what leaves the last one."""
        weights = tracked(outside_of(self._source))
        sums = GramSums(self._wanted.inputs.front, full=self._wanted.full)
        recorded = []
        for i, batch in enumerate(self._samples.batches):
            with watching(weights, sums, Rows(batch, first=i == 0)):
                found = self._runner.embed(batch, weights)
            self._moving = tuple(j for j, x in enumerate(found.tensors) if x.requires_grad)
            recorded.append(
                replace(found, hidden=found.hidden.detach(), tensors=tuple(x.detach() for x in found.tensors))
            )
        self._hand_on(sums)
        del weights
        hidden = [r.hidden for r in recorded]
        recorded = [replace(r, hidden=r.hidden[:0]) for r in recorded]
        for index in range(len(self._runner.layers)):
            self._spill.keep(index, hidden)
            with torch.no_grad():
                run_layer_noting(
                    self._source,
                    index,
                    self._samples,
                    hidden,
                    recorded,
                    self._wanted.inputs.layers[index],
                    full=self._wanted.full,
                    put=self._gram,
                )
            self._step()
        self._spill.keep(len(self._runner.layers), hidden)
        return recorded

    def _behind(self) -> tuple[Loss, list[Tensor]]:
        """The loss of each sequence, and its gradient where the layers end."""
        weights = outside_of(self._source)
        inputs = GramSums(self._wanted.inputs.behind, full=self._wanted.full)
        outputs = OutputSums(self._wanted.outputs.behind)
        loss, upstream = Loss(), []
        for i, hidden in enumerate(self._spill.read(len(self._runner.layers))):
            batch, truth = self._samples.batches[i], self._samples.targets[i]
            assert truth is not None
            hidden.requires_grad_()
            with watching(weights, inputs, Rows(batch)), outputs.watching(weights, Rows(batch)):
                logits = logits_of(self._runner.head(batch, weights, hidden))
            with torch.no_grad():
                loss += Loss(float(negative_log_likelihood(logits, truth)), int((truth != IGNORED).sum()))
            self._targets.append(self._chosen(i, logits, truth))
            (gradient,) = torch.autograd.grad(negative_log_likelihood(logits, self._targets[i]), hidden)
            upstream.append(gradient)
        self._hand_on(inputs)
        self._hand_out(outputs)
        return loss, upstream

    def _chosen(self, index: int, logits: Tensor, truth: Tensor) -> Tensor:
        """The targets whose log-likelihood is differentiated."""
        if self._wanted.whose == "sampled":
            return drawn(logits, truth, torch.Generator().manual_seed(self._wanted.seed * 1_000_003 + index))
        return likeliest(logits, truth) if self._wanted.whose == "hard" else truth

    def _backward(
        self, index: int, recorded: Sequence[Recorded], upstream: list[Tensor], arguments: list[list[Tensor | None]]
    ) -> None:
        """Bring the gradients from behind a layer in front of it, in place, and square its weights' own."""
        weights = self._source.layer(index)
        prefix = self._runner.layout.name(index, "")
        weights = tracked(weights, lambda part: prefix + part in self._wanted.fisher)
        names = full_names(self._runner, index, weights)
        squares = Squares({name: x for name, x in names.items() if x.requires_grad})
        outputs = OutputSums(self._wanted.outputs.layers[index])
        for i, hidden in enumerate(self._spill.take(index)):
            handed = list(recorded[i].tensors)
            for j in self._moving:
                handed[j] = handed[j].detach().requires_grad_()
            one = replace(recorded[i], tensors=tuple(handed))
            hidden.requires_grad_()
            with outputs.watching(names, Rows(self._samples.batches[i], one)):
                out = self._runner.call(index, weights, hidden, one)
            moving = [handed[j] for j in self._moving]
            found = gradients((out,), (upstream[i],), (hidden, *moving, *squares.weights))
            upstream[i] = _or_zeros(found[0], hidden)
            for j, more in enumerate(found[1 : 1 + len(moving)]):
                known = arguments[i][j]
                arguments[i][j] = more if known is None else known if more is None else known + more
            squares.add(found[1 + len(moving) :])
        self._hand_out(outputs)
        squares.hand_on(self._put, self._count)

    def _outside(self, upstream: Sequence[Tensor], arguments: Sequence[Sequence[Tensor | None]]) -> None:
        """Square the gradients of all tensors outside the layers, in front of them and behind them together."""
        weights = tracked(outside_of(self._source))
        first = {name: weights[name] for name in _first_of_each(self._runner, weights)}
        squares = Squares({name: x for name, x in first.items() if name in self._wanted.fisher})
        outputs = OutputSums(self._wanted.outputs.front)
        embedding = list(first.values()) if self._wanted.outputs.front else []
        if not squares.weights and not embedding:
            return
        for i, hidden in enumerate(self._spill.take(len(self._runner.layers))):
            batch = self._samples.batches[i]
            logits = logits_of(self._runner.head(batch, weights, hidden))
            loss = negative_log_likelihood(logits, self._targets[i])
            with outputs.watching(weights, Rows(batch)):
                entered = self._runner.embed(batch, weights)
            handed = [entered.tensors[j] for j in self._moving]
            moved = [(x, g) for x, g in zip(handed, arguments[i], strict=True) if g is not None]
            pairs = [(loss, torch.ones_like(loss)), (entered.hidden, upstream[i]), *moved]
            pairs = [(x, g) for x, g in pairs if x.requires_grad]
            of = (*squares.weights, *embedding)
            found = gradients([x for x, _ in pairs], [g for _, g in pairs], of)
            squares.add(found[: len(squares.weights)])
        self._hand_out(outputs)
        squares.hand_on(self._put, self._count)

    def _hand_on(self, sums: GramSums) -> None:
        for gram in sums.found():
            self._gram(gram)

    def _hand_out(self, sums: OutputSums) -> None:
        for gram in sums.found():
            self._put("gradient_gram", gram.names, gram.squares)


class Squares:
    """Sums of squared gradients of some weights.

    Args:
        weights: by name; `tracked`.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.names = tuple(weights)
        self.weights = tuple(weights.values())
        self._sums = [torch.zeros_like(x, requires_grad=False) for x in self.weights]

    def add(self, gradients: Iterable[Tensor | None]) -> None:
        """Count the gradients of one sequence in; None where it does not depend on the weight."""
        for total, gradient in zip(self._sums, gradients, strict=True):
            if gradient is not None:
                total.addcmul_(gradient, gradient)

    def hand_on(self, put: Put, count: int) -> None:
        for name, total in zip(self.names, self._sums, strict=True):
            put("fisher", (name,), (total / count).float())


class OutputSums:
    """Gram matrices of the gradients at the outputs of linear layers, each by itself.

    Gradients at relative positions, which are no tokens of the inputs, are left out.
    """

    def __init__(self, inputs: Iterable[Shared]) -> None:
        alone = [
            Shared((name,), written, (), shared.experts)
            for shared in inputs
            for name, written in zip(shared.names, shared.written, strict=True)
        ]
        self._sums = GramSums(alone, full=True)
        self._wanted = frozenset(shared.names[0] for shared in alone)

    def watching(self, weights: Mapping[str, Tensor], rows: Rows) -> Watch:
        """Inside, gradients that come back to what the tensors write are summed, whenever they come."""

        def note(use: Use) -> None:
            if use.name in self._wanted and rows.are_tokens(use) and use.written.requires_grad:
                use.written.register_hook(lambda gradient: self._add(replace(use, written=gradient), rows))

        return Watch(weights if self._wanted else {}, note)

    def _add(self, use: Use, rows: Rows) -> None:
        self._sums.add(use.name, rows.select(use.written, use).detach(), use.expert)

    def found(self) -> Iterable[Gram]:
        return self._sums.found()


def tracked(weights: Mapping[str, Tensor], wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
    """The same numbers, with gradients tracked of those that are wanted. One tensor under two names stays one."""
    known: dict[int, Tensor] = {}
    return {
        name: known.setdefault(id(x), x.detach().requires_grad_(x.is_floating_point() and wanted(name)))
        for name, x in weights.items()
    }


def gradients(outputs: Any, upstream: Any, of: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Of the outputs' products with what comes from above; None where they do not depend on a tensor."""
    if not of:
        return ()
    return torch.autograd.grad(list(outputs), list(of), list(upstream), allow_unused=True)


def _or_zeros(x: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if x is None else x


def _first_of_each(runner: Any, weights: Mapping[str, Tensor]) -> list[str]:
    return [next(iter(names)) for names in tied_names(runner) if next(iter(names)) in weights]
