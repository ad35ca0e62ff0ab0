"""What the demo measures: exact match of answers, loss on texts, deviation between two models' logits.

Everything runs on the CPU in float32. The functions on model directories load the model and hand it to the
function of the same purpose on a loaded model.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from mergekit_symalign.demo.data import Problem
from mergekit_symalign.demo.progress import Tick, silent
from mergekit_symalign.demo.source import quiet

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Item = TypeVar("Item")


class Loaded(NamedTuple):
    """A model of the demo with its tokenizer."""

    model: Any  # a LlamaForCausalLM; its generate() has no type a checker accepts
    tokenizer: "PreTrainedTokenizerBase"


def load(model_dir: Path) -> Loaded:
    """Load a model in float32, ready for evaluation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    if tokenizer.pad_token is None:  # older transformers read none from GGUF; which one it is makes no difference
        tokenizer.pad_token = tokenizer.eos_token
    return Loaded(model.eval(), tokenizer)


def exact_match(model_dir: Path, problems: Sequence[Problem], batch_size: int = 50) -> float:
    """The share of problems a model directory answers exactly; see `answers`."""
    return matching_share(load(model_dir), problems, batch_size)


def text_loss(model_dir: Path, texts: Sequence[str]) -> float:
    """Mean next-token cross entropy in nats per token of a model directory; see `mean_loss`."""
    return mean_loss(load(model_dir), texts)


def logit_deviation(dir_a: Path, dir_b: Path, texts: Sequence[str], batch_size: int = 10) -> float:
    """Largest |logits_b − logits_a| over all tokens of the texts, by the standard deviation of logits_a.

    Zero for two models that compute the same function; about float32 rounding (1e-4) for an exact alignment.
    """
    import torch

    model_a, tokenizer = load(dir_a)
    model_b, _ = load(dir_b)
    largest, count, total, square = 0.0, 0, 0.0, 0.0
    for chunk in _chunks(texts, batch_size):
        batch = _encode(tokenizer, chunk, side="right")
        with torch.inference_mode():
            a, b = (model(**batch).logits[batch["attention_mask"].bool()] for model in (model_a, model_b))
        largest = max(largest, (b - a).abs().max().item())
        count += a.numel()
        total += a.sum(dtype=torch.float64).item()
        square += a.square().sum(dtype=torch.float64).item()
    return largest / (square / count - (total / count) ** 2) ** 0.5


def matching_share(loaded: Loaded, problems: Sequence[Problem], batch_size: int = 50, tick: Tick = silent) -> float:
    """The share of problems whose greedy answer equals the expected one; ``tick`` counts them."""
    given = answers(loaded, problems, batch_size, tick)
    return sum(text == problem.answer for text, problem in zip(given, problems, strict=True)) / len(problems)


def answers(loaded: Loaded, problems: Sequence[Problem], batch_size: int = 50, tick: Tick = silent) -> list[str]:
    """Continue each prompt greedily up to the end token, or to one token more than the longest answer has."""
    import torch

    model, tokenizer = loaded
    longest = max(len(tokenizer(problem.answer)["input_ids"]) for problem in problems)
    given: list[str] = []
    for chunk in _chunks(problems, batch_size):
        batch = _encode(tokenizer, [problem.prompt for problem in chunk], side="left")
        with torch.inference_mode():
            output = model.generate(**batch, max_new_tokens=longest + 1, do_sample=False)
        new = output[:, batch["input_ids"].shape[1] :]
        given += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
        tick(len(chunk))
    return given


def mean_loss(loaded: Loaded, texts: Sequence[str], tick: Tick = silent) -> float:
    """Mean next-token cross entropy over all tokens of all texts but the first of each, in nats per token."""
    from mergekit_symalign.comparing import statistics
    from mergekit_symalign.comparing.documents import Document, piece_of
    from mergekit_symalign.comparing.losses import document_losses

    pieces = [piece_of(Document("", text), loaded.tokenizer) for text in texts]
    return statistics.mean_loss(document_losses(loaded.model, pieces, tick), [piece.counted for piece in pieces])


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], side: str) -> "BatchEncoding":
    """Token ids and attention mask, each [texts, tokens], padded on `side`."""
    return tokenizer(list(texts), padding=True, padding_side=side, return_tensors="pt")


def _chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))
