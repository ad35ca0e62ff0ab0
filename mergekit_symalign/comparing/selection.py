"""Which documents of a file are used, and how much of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_symalign.comparing.documents import Document, Piece, Read, document_of, piece_of
from mergekit_symalign.comparing.store import digest
from mergekit_symalign.errors import CalibrationError


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
        return digest(texts, self.tokens)

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
