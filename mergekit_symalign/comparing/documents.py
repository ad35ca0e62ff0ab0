"""Documents that models are measured on: texts, answers to prompts, and conversations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_symalign.activations.calibration import numbered_lines, parsed_line
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
    lines = numbered_lines(path, where, "Name a file of texts")
    if not lines:
        raise CalibrationError(where, "it holds no text", "Put one text on each line")
    if path.suffix == ".txt":
        return [line for _, line in lines]
    return [_entry(f"{where}, line {i}", line) for i, line in lines]


def _entry(where: str, line: str) -> Read:
    entry = parsed_line(line, where, _FORMS)
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
