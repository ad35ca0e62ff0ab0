"""Texts and labels as inputs and targets of one model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_symalign.activations.calibration import (
    calibrate,
    groups,
    padded,
    read_labels,
    read_prompts,
    require_positive,
    text_of,
)
from mergekit_symalign.activations.objectives import IGNORED, Objective, Samples, next_tokens
from mergekit_symalign.activations.runner import Batch
from mergekit_symalign.errors import CalibrationError

_MASKED = 0.15  # of the tokens, as BERT was trained


@dataclass(frozen=True)
class Prepared:
    """Inputs of a model, and what is told of them.

    Attributes:
        samples: the inputs and targets.
        tokens, sequences: how many there are.
        digest: of inputs and labels.
        largest: token id; None for images.
    """

    samples: Samples
    tokens: int
    sequences: int
    digest: str
    largest: int | None = None


@dataclass(frozen=True)
class How:
    """How texts become inputs.

    Attributes:
        tokens: how many to use at most.
        length: how many of a text to use at most.
        objective: what the model predicts; `Objective.nothing` where no targets are wanted.
        labels: the model's labels: number of each name.
        alone: whether each input is a batch of its own, so that nothing is padded.
        seed: of the tokens that are hidden.
    """

    tokens: int
    length: int
    objective: Objective
    labels: Mapping[str, int]
    alone: bool
    seed: int = 0


def prepare_texts(path: Path, tokenizer: Any, how: How) -> Prepared:
    """
    Raises:
        CalibrationError: if the file cannot be used, or has no labels where they are needed.
    """
    if how.objective.needs_labels:
        require_positive(how.tokens, how.length)
        pairs = _labelled(path, tokenizer, how)
    else:
        calibration = calibrate(path, tokenizer, {}, tokens=how.tokens, length=how.length)
        pairs = [(sequence, None) for sequence in calibration.sequences]
    if how.objective is Objective.masked_token:
        pairs = masked(path, pairs, tokenizer, how.seed)
    said = json.dumps([(list(ids), target if target is None else list(target)) for ids, target in pairs])
    return Prepared(
        samples=_batched(pairs, how),
        tokens=sum(len(ids) for ids, _ in pairs),
        sequences=len(pairs),
        digest=hashlib.sha256(said.encode()).hexdigest(),
        largest=max(max(ids) for ids, _ in pairs),
    )


Pair = tuple[Sequence[int], Sequence[int] | None]  # ids, and one target or one for each token


def _batched(pairs: Sequence[Pair], how: How) -> Samples:
    """In batches, with targets."""
    together = [[i] for i in range(len(pairs))] if how.alone else list(groups([len(ids) for ids, _ in pairs]))
    batches = [padded([pairs[i][0] for i in group]) for group in together]
    targets = [
        targets_of(batch, [pairs[i][1] for i in group], how.objective)
        for batch, group in zip(batches, together, strict=True)
    ]
    return Samples(tuple(batches), tuple(targets))


def targets_of(batch: Batch, known: Sequence[Sequence[int] | None], objective: Objective) -> Tensor | None:
    if objective is Objective.nothing:
        return None
    if objective is Objective.next_token:
        return next_tokens(batch)
    if objective is Objective.label:
        return torch.tensor([target[0] for target in known if target is not None])
    found = torch.full_like(batch.ids, IGNORED)
    for row, target in enumerate(known):
        found[row, : len(target or ())] = torch.tensor(target)
    return found


def _labelled(path: Path, tokenizer: Any, how: How) -> list[Pair]:
    """Texts with their labels, until there are enough tokens."""
    pairs: list[Pair] = []
    left = how.tokens
    for number, (prompt, label) in enumerate(zip(read_prompts(path), read_labels(path), strict=True), 1):
        where = f"calibration {path}, prompt {number}"
        text, special = text_of(prompt, tokenizer, where)
        most = min(how.length, left)
        if how.objective is Objective.label:
            ids, target = (
                tokenizer(text, add_special_tokens=special)["input_ids"][:most],
                [label_id(label, how.labels, where)],
            )
        else:
            ids, target = _words(tokenizer, text.split(), label, how.labels, where, most)
        if ids:
            pairs.append((ids, target))
            left -= len(ids)
        if left <= 0:
            break
    if not pairs:
        raise CalibrationError(f"calibration {path}", "its prompts give no tokens", "Put text on each line")
    return pairs


def _words(
    tokenizer: Any, words: list[str], labels: Any, known: Mapping[str, int], where: str, most: int
) -> tuple[list[int], list[int]]:
    """The tokens of some words; the first token of each word gets the word's label."""
    if not isinstance(labels, list) or len(labels) != len(words):
        reason = f"its label is not a list of {len(words)}, one for each word between spaces"
        raise CalibrationError(where, reason, "Give each word a label")
    numbers = [label_id(label, known, where) for label in labels]
    encoded = tokenizer(words, is_split_into_words=True)
    of_word = encoded.word_ids()
    first = [i for i, word in enumerate(of_word) if word is not None and (i == 0 or of_word[i - 1] != word)]
    target = [IGNORED] * len(of_word)
    for i in first:
        target[i] = numbers[of_word[i]]
    return encoded["input_ids"][:most], target[:most]


def label_id(label: Any, known: Mapping[str, int], where: str) -> int:
    """The number of a label, which may be given by its name.

    Raises:
        CalibrationError: if the model has no such label.
    """
    if isinstance(label, str) and label in known:
        return known[label]
    if type(label) is int and label in known.values():
        return label
    names = ", ".join(f"{name} ({number})" for name, number in list(known.items())[:8])
    raise CalibrationError(where, f"the model has no label {str(label)[:60]!r}", f"Its labels are {names}")


def masked(path: Path, pairs: Sequence[Pair], tokenizer: Any, seed: int) -> list[Pair]:
    """The same texts with some tokens hidden, which are the targets."""
    mask = getattr(tokenizer, "mask_token_id", None)
    if mask is None:
        where = f"calibration {path}"
        raise CalibrationError(
            where, "the model predicts hidden tokens, and its tokenizer has no mask token", "Use --fisher none"
        )
    generator, special = torch.Generator().manual_seed(seed), set(tokenizer.all_special_ids)
    found: list[Pair] = []
    for ids, _ in pairs:
        at = [i for i, token in enumerate(ids) if token not in special]
        count = max(1, round(_MASKED * len(at))) if at else 0
        hidden = {at[int(i)] for i in torch.randperm(len(at), generator=generator)[:count]}
        given = [mask if i in hidden else token for i, token in enumerate(ids)]
        found.append((given, [token if i in hidden else IGNORED for i, token in enumerate(ids)]))
    return found


def moved(prepared: Prepared, device: torch.device | str) -> Samples:
    """The inputs and targets on a device."""
    return Samples(
        tuple(type(batch)(batch.ids.to(device), batch.valid.to(device)) for batch in prepared.samples.batches),
        tuple(target if target is None else target.to(device) for target in prepared.samples.targets),
    )
