"""The text of a file of statistics, as data that validate themselves: nothing is believed before it was checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from mergekit_symalign.sealed.text import (
    Count,
    Data,
    Float,
    Int,
    Text,
    Word,
    digest,
    first_of,
    loaded,
    require_format,
    shown,
)

FORMAT = 1
ENTRY = "mergekit_symalign_statistics"  # of the metadata of a safetensors file, and of an index
MOST_TEXT = 32 << 20  # characters; the statistics of 126 layers have 2 million
KINDS = ("gram", "mean", "fisher", "gradient_gram")
Kind = Literal["gram", "mean", "fisher", "gradient_gram"]
Tokens = int | tuple[int, ...]


class Origin(Data):
    """What statistics belong to.

    Attributes:
        model: its name, for people.
        fingerprint: of its checkpoint (graph/fingerprint.py).
        family: the family file.
        sizes: its geometry, by name.
        tokenizer: digest of what turns inputs into numbers.
        versions: of the packages that measured.
    """

    model: Text
    fingerprint: Word
    family: Word
    sizes: dict[Word, Int]
    tokenizer: Word
    versions: dict[Word, Word] = Field(default_factory=dict)


class Measured(Data):
    """How statistics were measured.

    Attributes:
        gram: form of the Gram matrices.
        fisher: whose token or label the gradients are of; ``kronecker``: factors of the empirical Fisher matrix.
        tokens, sequences: how many the model saw, padding left out.
        sequence_length: how many tokens of a prompt were used at most.
        only: the regular expression that names had to match; None: all.
        loss: mean over tokens (labels) of the negative log-likelihood, in nats; None where it was not computed.
        labels: whether the loss is a task head's.
        calibration: digest of the inputs.
        seed: of the tokens that were drawn.
    """

    gram: Literal["full", "diagonal", "none"] = "full"
    fisher: Literal["none", "empirical", "sampled", "hard", "kronecker"] = "none"
    tokens: Count
    sequences: Count
    sequence_length: Count
    only: Text | None = None
    loss: Float | None = None
    labels: bool = False
    calibration: Word
    seed: Int = 0


Described = tuple[Word, Annotated[list[Count], Field(max_length=8)], Word]  # dtype, shape, SHA-256 of the bytes


class Content(Data):
    """All that a file says beside its numbers."""

    format: int
    origin: Origin
    measured: Measured
    statistics: dict[Text, dict[Kind, Text]]
    tokens: dict[Text, Count | list[Count]]
    tensors: dict[Text, Described]
    sha256: Word


def parsed(text: str) -> Content:
    """The content of a file's text.

    Raises:
        NewerFormatError: if a later version wrote it.
        ValueError: if it is anything else than what this version writes.
    """
    raw = loaded(text, MOST_TEXT, "file of statistics")
    require_format(raw, FORMAT)
    try:
        content = Content.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(first_of(error)) from None
    if digest(raw) != content.sha256:
        raise ValueError("they differ from what was saved")
    _require_consistent(content)
    return content


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The text of a file of this format, as JSON holds it, with the digest that tells damage."""
    whole: dict[str, Any] = json.loads(json.dumps({**content, "format": FORMAT}))
    return whole | {"sha256": digest(whole)}


def problem_of_shape(kind: str, shape: Sequence[int], tokens: Tokens, gram: str) -> str | None:
    """What is wrong with the shape of a statistic.

    Args:
        kind: one of `KINDS`.
        shape: of its tensor.
        tokens: those that reached the tensor; one number for each expert where it holds several.
        gram: form of the Gram matrices.
    """
    if kind == "fisher":
        return None
    experts = () if isinstance(tokens, int) else (len(tokens),)
    rest = shape[len(experts) :]
    square = kind == "gradient_gram" or (kind == "gram" and gram == "full")
    right = len(rest) == (2 if square else 1) and len(set(rest)) == 1 and 0 not in rest
    if right and tuple(shape[: len(experts)]) == experts:
        return None
    wanted = " x ".join([*map(str, experts), *("nn" if square else "n")])
    return f"its {kind} has shape {' x '.join(map(str, shape)) or 'of a single number'}, not {wanted}"


def _require_consistent(content: Content) -> None:
    """
    Raises:
        ValueError: if a statistic has no tensor, a tensor no use, or a wrong type or shape.
    """
    used = {stored for kinds in content.statistics.values() for stored in kinds.values()}
    if other := used ^ content.tensors.keys():
        reason = "missing" if other & used else "not used by any statistic"
        raise ValueError(f"tensor {shown(min(other))} is {reason}")
    if other := content.statistics.keys() ^ content.tokens.keys():
        raise ValueError(f"they do not say how many tokens reached {shown(min(other))}, or have no statistic of it")
    for name, kinds in content.statistics.items():
        tokens = content.tokens[name]
        counted: Tokens = tokens if isinstance(tokens, int) else tuple(tokens)
        for kind, stored in kinds.items():
            dtype, shape, _ = content.tensors[stored]
            wrong = problem_of_shape(kind, shape, counted, content.measured.gram)
            if wrong is None and dtype != "F32":
                wrong = f"its {kind} is of type {shown(dtype)}, not F32"
            if wrong is not None:
                raise ValueError(f"tensor {shown(name, 100)}: {wrong}")
