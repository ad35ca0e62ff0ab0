"""What a descent reads and needs: texts as inputs and targets, and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from mergekit.options import MergeOptions

from mergekit_symalign.activations.calibration import calibrate
from mergekit_symalign.activations.objectives import Objective
from mergekit_symalign.activations.samples import masked
from mergekit_symalign.commands.learning import Pair
from mergekit_symalign.commands.sizes import human
from mergekit_symalign.errors import ArchitectureError, CalibrationError, ConfigError
from mergekit_symalign.graph.readers import require_embedded_ids, tokenizer_of
from mergekit_symalign.learning.descent import Plan
from mergekit_symalign.learning.memory import Needed, Sizes, free_memory, needed
from mergekit_symalign.learning.texts import Data, windows

DEFAULT_LENGTH = 256  # tokens
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Asked:
    """What the user wants.

    Attributes:
        plan: of the descent.
        batch_size: texts of a step.
        length: tokens of a text; longer ones are cut in pieces. None: `DEFAULT_LENGTH`, or as many as the models have
            positions.
        dtype: in which the models compute.
        checkpoints: whether layers run once more on the way back.
        orders: whether permutations are learned too.
    """

    plan: Plan = field(default_factory=Plan)
    batch_size: int = 8
    length: int | None = None
    dtype: str = "float32"
    checkpoints: bool = False
    orders: bool = False


def text_length(pair: Pair, wanted: int | None) -> int:
    """Tokens of a text.

    Raises:
        ConfigError: if the models have no positions for so many.
    """
    known = [positions for of in (pair.anchor, pair.model) if (positions := of.positions()) is not None]
    if wanted is not None and known and wanted > min(known):
        reason = f"the models have {min(known)} positions"
        raise ConfigError(f"--sequence-length {wanted}", reason, f"Give at most {min(known)}")
    return wanted or min((DEFAULT_LENGTH, *known))


def read_texts(pair: Pair, path: Path, asked: Asked, options: MergeOptions) -> Data:
    """The texts as inputs and targets.

    Raises:
        ArchitectureError: if the models predict nothing that a text tells.
        CalibrationError: if the texts cannot be used, or the tokenizers differ on them.
    """
    objective = _objective(pair)
    tokenizers = [tokenizer_of(of.checkpoint.model, options) for of in (pair.anchor, pair.model)]
    length = asked.length or DEFAULT_LENGTH
    most = (asked.plan.steps * asked.batch_size + 64) * length
    first, second = (calibrate(path, tokenizer, {}, tokens=most, length=most).sequences for tokenizer in tokenizers)
    if first != second:
        at = next(
            (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(map(len, (first, second)))
        )
        raise CalibrationError(
            f"--data {path}",
            f"the tokenizers of {pair.anchor.name} and {pair.model.name} turn text {at + 1} into different tokens, so "
            "the models between them have no tokenizer",
            "Give the models one tokenizer first",
        )
    pieces = windows(first, length)
    if len(pieces) < 2:
        raise CalibrationError(
            f"--data {path}", f"it gives {len(pieces)} texts of two tokens or more", "Give more texts, one on each line"
        )
    for of in (pair.anchor, pair.model):
        require_embedded_ids(max(map(max, pieces)), of.checkpoint)
    pairs: Any = [(piece, None) for piece in pieces]
    if objective is Objective.masked_token:
        pairs = masked(path, pairs, tokenizers[0], asked.plan.seed)
    return Data.of(pairs, objective, asked.batch_size, asked.plan.seed)


def _objective(pair: Pair) -> Objective:
    """
    Raises:
        ArchitectureError: if a text alone has no loss.
    """
    name = type(pair.anchor.runner.model).__name__
    found = pair.anchor.objective()
    if found not in (Objective.next_token, Objective.masked_token):
        what = "has no head that predicts anything" if found is Objective.nothing else f"predicts a {found.value}"
        raise ArchitectureError(
            f"model {pair.anchor.name}",
            f"{name} {what}, so it has no loss on texts",
            "Learn with models that predict tokens, or solve an alignment: mergekit-symalign solve",
        )
    return found


def require_memory(pair: Pair, asked: Asked, say: Callable[[str], object]) -> None:
    """Say how much memory it takes.

    Raises:
        ConfigError: if the device has less.
    """
    sizes = _sizes(pair, asked)
    found, device = needed(sizes), torch.device(pair.anchor.device)
    free = free_memory(device)
    has = "" if free is None else f"; {device} has {human(free)} free"
    say(f"memory: about {human(found.whole)} ({_parts(found)}){has}")
    if free is not None and found.models + found.merged > free:
        raise ConfigError(
            f"learning on {device}",
            f"models and merged weights alone take {human(found.models + found.merged)}, and {human(free)} are free",
            "Use --gradient-checkpointing, a smaller --batch-size or --sequence-length, or another --device",
        )


def _parts(found: Needed) -> str:
    return ", ".join(f"{human(size)} {name}" for name, size in asdict(found).items())


def _sizes(pair: Pair, asked: Asked) -> Sizes:
    runner, geometry = pair.anchor.runner, pair.anchor.checkpoint.layout.geometry
    weights = sum(x.numel() for x in runner.model.parameters())
    layers = [sum(x.numel() for x in layer.parameters()) for layer in runner.layers]
    return Sizes(
        weights=weights,
        largest=max(weights - sum(layers), *layers),
        learned=geometry.hidden**2 + len(layers) * geometry.kv_heads * geometry.head_dim**2,
        layers=len(layers),
        hidden=geometry.hidden,
        vocabulary=runner.model.config.get_text_config().vocab_size,
        inputs=asked.batch_size,
        length=asked.length or DEFAULT_LENGTH,
        checkpoints=asked.checkpoints,
    )
