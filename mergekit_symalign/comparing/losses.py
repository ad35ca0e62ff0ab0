"""The loss of a language model on documents, in nats of each document."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mergekit_symalign.activations.calibration import BATCH_TOKENS, groups, padded
from mergekit_symalign.comparing.documents import Piece

_LOGITS = 2**28  # numbers that a batch may have: half a GiB in bfloat16
_AT_ONCE = 2**25  # numbers of logits that become float32 together: 128 MiB, and as much again for their logarithms


@torch.inference_mode()
def document_losses(model: Any, pieces: Sequence[Piece], tick: Callable[[int], object] = lambda _: None) -> list[float]:
    """Σ −log p of the tokens that count, for each document, in the order given.

    Documents of similar length run together. Logits are calculated from the first token that is needed on, and
    compared in float32 whatever the model computes in. Models that choose which tokens to attend to (DeepSeek V3.2,
    GLM-5) would choose among padding too, so they get one document at a time.

    Args:
        model: of transformers, for the next token, on its device.
        pieces: the documents as its tokenizer reads them.
        tick: is told how many documents were done.
    """
    found = [0.0] * len(pieces)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    chooses = getattr(model.config.get_text_config(), "index_topk", None) is not None
    most = 1 if chooses else min(BATCH_TOKENS, _LOGITS // vocabulary)
    for group in groups([len(piece.ids) for piece in pieces], most=most):
        for i, nats in zip(group, _together(model, [pieces[i] for i in group]), strict=True):
            found[i] = nats
        tick(len(group))
    return found


def _together(model: Any, pieces: Sequence[Piece]) -> list[float]:
    """The documents of one batch."""
    batch = padded([piece.ids for piece in pieces])
    ids, first = batch.ids.to(model.device), min(piece.start for piece in pieces) - 1
    inputs: dict[str, Any] = {"attention_mask": batch.valid.long().to(model.device), "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = ids.shape[1] - first
    logits = model(input_ids=ids, **inputs).logits
    first = ids.shape[1] - logits.shape[1]
    return [
        _nats(logits[row, piece.start - 1 - first : len(piece.ids) - 1 - first], ids[row, piece.start : len(piece.ids)])
        for row, piece in enumerate(pieces)
    ]


def _nats(logits: Tensor, following: Tensor) -> float:
    """Σ −log p, a few tokens at a time; logits [tokens, vocabulary]."""
    count, total = max(1, _AT_ONCE // logits.shape[-1]), 0.0
    for some, wanted in zip(logits.split(count), following.split(count), strict=True):
        total += float(cross_entropy(some.float(), wanted, reduction="none").double().sum())
    return total
