"""Documents that models are measured on: texts, answers to prompts, and conversations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_symalign.activations.calibration import file_lines
from mergekit_symalign.errors import CalibrationError

ANSWERS = ("answer", "completion", "response")  # fields beside a prompt, by which of them a file may call it
_FORMS = "Give each line an object with text, with prompt and answer, or with messages"


@dataclass(frozen=True)
class Document:
    """What a model reads, and of which part the loss is taken.

    Attributes:
        prompt: what comes before; its loss is not counted.
        answer: whose loss is counted. A text is an answer to nothing.
        special: whether the tokenizer adds its special tokens; a chat template has them already.
    """

    prompt: str
    answer: str
    special: bool = True

    @property
    def text(self) -> str:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Piece:
    """A document as one model reads it.

    Attributes:
        ids: its tokens.
        start: the first token whose loss counts; at least 1, as nothing predicts the first.
    """

    ids: tuple[int, ...]
    start: int

    @property
    def counted(self) -> int:
        return len(self.ids) - self.start


@dataclass(frozen=True)
class Selection:
    """The documents of a file that are used.

    Attributes:
        documents: in the order of the file.
        tokens: of each whose loss counts, by the tokenizer that all rows are measured with.
        there: how many the file has.
        cut: how many were longer than allowed, and end early.
        passed_over: how many leave nothing to count: too short, or with a prompt that takes all the room.
    """

    documents: tuple[Document, ...]
    tokens: tuple[int, ...]
    there: int
    cut: int
    passed_over: int

    @property
    def digest(self) -> str:
        """Of what models read, and of what is counted."""
        texts = [(x.prompt, x.answer, x.special) for x in self.documents]
        return hashlib.sha256(json.dumps([texts, self.tokens]).encode()).hexdigest()

    @property
    def note(self) -> str | None:
        """What of the file is not used, if anything."""
        unread = self.there - len(self.documents) - self.passed_over
        parts = [
            f"{unread} documents are beyond --tokens" if unread else "",
            f"{self.cut} are cut at --max-length" if self.cut else "",
            f"{self.passed_over} leave nothing to count" if self.passed_over else "",
        ]
        return "; ".join(filter(None, parts)) or None


Read = str | tuple[str, str] | list[dict[str, Any]]  # a text, a prompt with its answer, or a conversation


def read_file(path: Path) -> list[Read]:
    """The lines of a ``.jsonl`` file, or the texts of a ``.txt`` file (one each line).

    Raises:
        CalibrationError: naming the line that is of another form.
    """
    where = f"--data {path}"
    if path.suffix not in (".jsonl", ".txt"):
        raise CalibrationError(
            where, "it is neither .jsonl nor .txt", "Name a file of texts, or of prompts and answers"
        )
    try:
        lines = [(i, line) for i, line in enumerate(file_lines(path), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(where, f"it cannot be read ({error})", "Name a file of texts") from error
    if not lines:
        raise CalibrationError(where, "it holds no text", "Put one text on each line")
    if path.suffix == ".txt":
        return [line for _, line in lines]
    return [_entry(f"{where}, line {i}", line) for i, line in lines]


def _entry(where: str, line: str) -> Read:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(where, f"it is not JSON ({error})", _FORMS) from error
    if not isinstance(entry, dict):
        raise CalibrationError(where, "it is no object", _FORMS)
    if isinstance(messages := entry.get("messages"), list):
        if not (messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"):
            reason = "its last message is not the assistant's, so there is no answer whose loss could be taken"
            raise CalibrationError(where, reason, "End each conversation with what the assistant says")
        return messages
    answer = next((entry[name] for name in ANSWERS if isinstance(entry.get(name), str)), None)
    if isinstance(prompt := entry.get("prompt"), str) and answer is not None:
        return prompt, answer
    if isinstance(text := entry.get("text"), str):
        return text
    reason = "it has a prompt and no answer" if isinstance(prompt, str) else "it has no text, answer or messages"
    raise CalibrationError(where, reason, _FORMS)


def document_of(read: Read, tokenizer: Any, where: str) -> Document:
    """What all models read.

    Args:
        read: a line.
        tokenizer: whose chat template writes conversations.
        where: for errors.

    Raises:
        CalibrationError: if the template cannot write them.
    """
    if isinstance(read, str):
        return Document("", read)
    if isinstance(read, tuple):
        return Document(*read)
    try:
        prompt = tokenizer.apply_chat_template(read[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(read, tokenize=False)
    except Exception as error:  # templates are programs, and raise what they like
        reason = f"the chat template cannot write its messages ({error})"
        raise CalibrationError(where, reason, "Use prompt and answer instead") from error
    if not whole.startswith(prompt):
        reason = "the chat template writes the conversation in another way when the answer is there"
        raise CalibrationError(where, reason, "Use prompt and answer instead")
    return Document(prompt, whole[len(prompt) :], special=False)


def piece_of(document: Document, tokenizer: Any) -> Piece:
    """The document as tokens. The whole is tokenised at once, as a model reads it.

    The answer begins where the tokens of the whole part from those of the prompt alone. A token that holds the end of
    the prompt and the begin of the answer therefore counts.
    """
    whole = tokenizer(document.text, add_special_tokens=document.special)["input_ids"]
    if not document.prompt:
        return Piece(tuple(whole), 1)
    alone = tokenizer(document.prompt, add_special_tokens=document.special)["input_ids"]
    shared = next(
        (i for i, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b), min(map(len, (whole, alone)))
    )
    return Piece(tuple(whole), max(1, shared))


def select(read: Sequence[Read], path: Path, tokenizer: Any, *, tokens: int, length: int) -> Selection:
    """Documents until there are enough tokens; longer ones are cut, as text, so that all models read the same.

    Args:
        read: the lines of the file.
        path: of the file, for errors.
        tokens: how many to use at most, prompts included. The first document is always used.
        length: how many of a document to use at most.

    Raises:
        CalibrationError: if nothing is left whose loss could be taken.
    """
    used: list[tuple[Document, int]] = []
    left, cut, passed_over = tokens, 0, 0
    for number, line in enumerate(read, 1):
        document = document_of(line, tokenizer, f"--data {path}, document {number}")
        piece = piece_of(document, tokenizer)
        is_long = len(piece.ids) > length
        if is_long:
            document = _cut(document, piece, tokenizer, length)
            piece = piece_of(document, tokenizer)
        if piece.counted < 1 or not document.answer:
            passed_over += 1
            continue
        if used and len(piece.ids) > left:
            break
        used.append((document, piece.counted))
        left, cut = left - len(piece.ids), cut + is_long
    if not used:
        reason = f"no document has a second token, or an answer within {length} tokens, whose loss could be taken"
        raise CalibrationError(f"--data {path}", reason, "Give longer texts, or a larger --max-length")
    documents, counted = zip(*used, strict=True)
    return Selection(documents, counted, len(read), cut, passed_over)


def _cut(document: Document, piece: Piece, tokenizer: Any, length: int) -> Document:
    """The beginning of a document, at the end of a token."""
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(document.text, add_special_tokens=document.special, return_offsets_mapping=True)
        end = max(stop for _, stop in offsets["offset_mapping"][:length])
    else:
        end = len(tokenizer.decode(piece.ids[:length], skip_special_tokens=document.special))
    return replace(document, answer=document.text[:end][len(document.prompt) :])
