"""The prompts on which anchor and model are compared, as tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_symalign.activations.defaults import DEFAULT_LENGTH, DEFAULT_PROMPTS, DEFAULT_TOKENS
from mergekit_symalign.activations.runner import Batch
from mergekit_symalign.errors import CalibrationError

BATCH_TOKENS = 4096  # of prompts that run together, padding included
_FORMS = "Give each line an object with text, prompt or messages"

Prompt = str | list[dict[str, Any]]  # a text, or the messages of a conversation


@dataclass(frozen=True)
class Calibration:
    """Prompts as tokens, in the order of the file.

    Attributes:
        sequences: token ids of each prompt that is used.
    """

    sequences: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.sequences).encode()).hexdigest()

    def batches(self) -> Iterator[Batch]:
        """Prompts of similar length together, padded on the right."""
        yield from map(padded, self._together())

    def kept(self) -> Iterator[Tensor | None]:
        """Of each batch, where among all its prompts × tokens those are that are no padding; None if all are."""
        for together in self._together():
            width = len(together[0])
            at = [row * width + i for row, sequence in enumerate(together) for i in range(len(sequence))]
            yield None if len(at) == width * len(together) else torch.tensor(at)

    def _together(self) -> Iterator[list[tuple[int, ...]]]:
        """The prompts of each batch, the longest first."""
        for group in groups([len(sequence) for sequence in self.sequences]):
            yield [self.sequences[i] for i in group]


def groups(lengths: Sequence[int], most: int | None = None) -> Iterator[list[int]]:
    """Which prompts run together: those of similar length, the longest first, with so many tokens (4096) at most."""
    most = BATCH_TOKENS if most is None else most
    ordered = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while ordered:
        count = max(1, most // lengths[ordered[0]])
        yield ordered[:count]
        ordered = ordered[count:]


def padded(sequences: Sequence[Sequence[int]]) -> Batch:
    """Some prompts as one batch, padded on the right."""
    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
    valid = torch.zeros_like(ids, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        valid[row, : len(sequence)] = True
    return Batch(ids, valid)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a ``.jsonl`` file (``text``, ``prompt`` or ``messages``) or of a ``.txt`` file (one each line).

    Raises:
        CalibrationError: if the file cannot be read, holds nothing, or a line is of another form.
    """
    if path.suffix not in (".jsonl", ".txt"):
        raise CalibrationError(f"calibration {path}", "it is neither .jsonl nor .txt", "Name a file of prompts")
    lines = numbered_lines(path, f"calibration {path}", "Name a file of prompts")
    prompts = [line if path.suffix == ".txt" else _prompt(path, i, line) for i, line in lines]
    if not prompts:
        raise CalibrationError(f"calibration {path}", "it holds no prompt", "Put one prompt on each line")
    return prompts


def numbered_lines(path: Path, where: str, remedy: str) -> list[tuple[int, str]]:
    """The lines of a file that are not empty, with their numbers from 1.

    Raises:
        CalibrationError: with ``where`` and ``remedy``, if the file cannot be read.
    """
    try:
        return [(i, line) for i, line in enumerate(_lines(path), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(where, f"it cannot be read ({error})", remedy) from error


def parsed_line(line: str, where: str, remedy: str) -> Any:
    """
    Raises:
        CalibrationError: with ``where`` and ``remedy``, if a line is not JSON.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(where, f"it is not JSON ({error})", remedy) from error


def _lines(path: Path) -> list[str]:
    r"""The lines of a UTF-8 file with or without byte order mark. Only ``\n`` and ``\r\n`` end a line: texts may hold
    other separators (U+2028, U+0085, form feeds), which `str.splitlines` would take for ends of lines."""
    return [line.removesuffix("\r") for line in path.read_bytes().decode("utf-8-sig").split("\n")]


def calibrate(
    path: Path, anchor: Any, models: Mapping[str, Any], *, tokens: int = DEFAULT_TOKENS, length: int = DEFAULT_LENGTH
) -> Calibration:
    """Read and tokenise prompts until there are enough tokens; longer ones are cut.

    Args:
        path: the file of prompts.
        anchor: the anchor's tokenizer; its chat template writes the messages.
        models: the tokenizers of the models by name, which must give the same ids.
        tokens: how many tokens to use at most.
        length: how many tokens of a prompt to use at most.

    Raises:
        CalibrationError: also if tokenizers differ on a prompt that is used, or there is no chat template for messages.
    """
    require_positive(tokens, length)
    used: list[tuple[int, ...]] = []
    left = tokens
    for number, prompt in enumerate(read_prompts(path), 1):
        where = f"calibration {path}, prompt {number}"
        text, special = text_of(prompt, anchor, where)
        ids = anchor(text, add_special_tokens=special)["input_ids"]
        for name, tokenizer in models.items():
            _require_same(where, text, ids, name, tokenizer(text, add_special_tokens=special)["input_ids"])
        if ids:
            used.append(tuple(ids[: min(length, left)]))
            left -= len(used[-1])
        if left == 0:
            break
    if not used:
        raise CalibrationError(f"calibration {path}", "its prompts give no tokens", "Put text on each line")
    return Calibration(tuple(used))


def require_positive(tokens: int, length: int) -> None:
    """
    Raises:
        CalibrationError: if one of them is not.
    """
    for name, value in (("calibration_tokens", tokens), ("calibration_sequence_length", length)):
        if value < 1:
            raise CalibrationError(f"parameter {name}", f"it is {value}", "Give a positive number")


def read_labels(path: Path) -> list[Any]:
    """The field ``label`` of each line of a ``.jsonl`` file that holds a prompt.

    Raises:
        CalibrationError: if a line has none.
    """
    if path.suffix != ".jsonl":
        raise CalibrationError(f"calibration {path}", "only a .jsonl file can hold labels", "Give each line a label")
    labels = []
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            entry = json.loads(line)  # `read_prompts` found every line well formed
            if "label" not in entry:
                where = f"calibration {path}, line {number}"
                raise CalibrationError(where, "it has no label", "Give each line an object with text and label")
            labels.append(entry["label"])
    return labels


def tokenizer_digest(tokenizer: Any) -> str:
    """What a tokenizer does, as SHA-256 of the ids that it gives for the prompts of the package.

    Special tokens are left out, so a fine-tune that adds some has the digest of its base.
    """
    texts = [prompt for prompt in read_prompts(DEFAULT_PROMPTS) if isinstance(prompt, str)]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def _prompt(path: Path, number: int, line: str) -> Prompt:
    entry = parsed_line(line, f"calibration {path}, line {number}", _FORMS)
    for key, kind in (("messages", list), ("prompt", str), ("text", str)):
        if isinstance(entry, dict) and isinstance(entry.get(key), kind):
            return entry[key]
    raise CalibrationError(f"calibration {path}, line {number}", "it has no text, prompt or messages", _FORMS)


def text_of(prompt: Prompt, anchor: Any, where: str) -> tuple[str, bool]:
    """The prompt as text, and whether the tokenizer shall add its special tokens (a template has them already)."""
    if isinstance(prompt, str):
        return prompt, True
    try:
        return anchor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True), False
    except Exception as error:  # templates are programs, and raise what they like
        raise CalibrationError(
            where, f"the anchor's chat template cannot write its messages ({error})", "Use prompt or text instead"
        ) from error


def _require_same(where: str, text: str, ids: Sequence[int], name: str, others: Sequence[int]) -> None:
    if list(ids) == list(others):
        return
    at = next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))
    raise CalibrationError(
        where,
        f"the anchor and {name} turn it into different tokens: from token {at} on {list(ids[at : at + 4])} and "
        f"{list(others[at : at + 4])}, in {text[:80]!r}",
        "Activations can be compared for equal tokens only: use objective: weights",
    )
