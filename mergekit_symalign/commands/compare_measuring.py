"""What one model loses on documents and reaches in tasks."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from tqdm import tqdm

from mergekit_symalign.commands.compare_inputs import File
from mergekit_symalign.commands.outcome import bars
from mergekit_symalign.commands.whole_models import load_whole, with_adapter
from mergekit_symalign.comparing.documents import Piece, piece_of
from mergekit_symalign.comparing.losses import document_losses
from mergekit_symalign.comparing.tasks import Harness, Score, scores
from mergekit_symalign.errors import CalibrationError, ValueInTensorError
from mergekit_symalign.families.resolve import lookup
from mergekit_symalign.graph.readers import tokenizer_of


def losses_of(
    model: ModelReference, files: Sequence[File], dtype: torch.dtype, options: MergeOptions
) -> Iterator[tuple[File, list[float]]]:
    """Nats of each document, a file at a time; the model is loaded for it and let go.

    Raises:
        CalibrationError: if the tokenizer cannot be loaded, or knows tokens that the model has no row for.
        ValueInTensorError: if the loss is not a number.
    """
    tokenizer = tokenizer_of(model, options)
    capped = lookup(model.config(trust_remote_code=options.trust_remote_code), "attn_logit_softcapping")
    loaded = load_whole(model, options, dtype, attention="eager" if capped else None)  # fast kernels know no soft caps
    for file in files:
        pieces = [piece_of(document, tokenizer) for document in file.selection.documents]
        _require_rows(model, loaded, pieces, file)
        with tqdm(total=len(pieces), desc="Documents", disable=not bars(options.quiet), leave=False, ncols=79) as bar:
            nats = document_losses(loaded, pieces, bar.update)
        if not all(map(math.isfinite, nats)):
            raise ValueInTensorError(f"model {model}", "its loss is not a number", "Try --dtype float32")
        yield file, nats
    del loaded
    gc.collect()


def _require_rows(model: ModelReference, loaded: Any, pieces: Sequence[Piece], file: File) -> None:
    """
    Raises:
        CalibrationError: if a token has no row in the embedding.
    """
    rows, largest = loaded.get_input_embeddings().weight.shape[0], max(max(piece.ids, default=0) for piece in pieces)
    if largest >= rows:
        reason = f"{file.name} contains token {largest}, but its embedding has only {rows} rows"
        raise CalibrationError(f"model {model}", reason, "Check that the tokenizer belongs to this model")


def scores_of(
    model: ModelReference, tasks: Sequence[str], harness: Harness, dtype: torch.dtype, options: MergeOptions
) -> Iterator[tuple[str, Score]]:
    """What the model reaches in each task."""
    source = with_adapter(model, options)
    arguments: dict[str, Any] = {"pretrained": source.path, "dtype": str(dtype).removeprefix("torch.")}
    arguments |= {"revision": source.revision} if source.revision else {}
    arguments |= {"trust_remote_code": True} if options.trust_remote_code else {}
    yield from scores(arguments, tasks, harness, options.device or "cpu", bars=bars(options.quiet))
    gc.collect()
