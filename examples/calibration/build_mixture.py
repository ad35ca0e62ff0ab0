"""Build a calibration file from the data sets that the papers took their prompts from (needs access to the hub).

    pip install datasets
    python examples/calibration/build_mixture.py --out mixture.jsonl --each 64

Only prompts are written, as `messages`, so that the anchor's chat template is used. The data sets are mixed evenly, in
turn, so that `calibration_tokens` cuts all of them alike. MATH has no development set of its own: its prompts are taken
from the 12,000 problems that are not in MATH-500, on which the papers test.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from datasets import load_dataset

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One data set on the hub, and how a row of it becomes a prompt (None: skip it)."""

    path: str
    name: str | None
    split: str
    prompt: Callable[[Row], str | None]


def choices(row: Row) -> str:
    """A question of MMLU with its four answers."""
    return "\n".join(
        [row["question"], *(f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True))]
    )


def first_turn(row: Row) -> str | None:
    """What an English user of WildChat began with."""
    return row["conversation"][0]["content"] if row["language"] == "English" and not row["toxic"] else None


SOURCES = (
    Source("cais/mmlu", "all", "validation", choices),
    Source("ucinlp/drop", None, "validation", lambda row: f"{row['passage']}\n\n{row['question']}"),
    Source("nlile/hendrycks-MATH-benchmark", None, "train", lambda row: row["problem"]),
    Source("openai/gsm8k", "main", "train", lambda row: row["question"]),
    Source("allenai/tulu-3-sft-personas-code", None, "train", lambda row: row["messages"][0]["content"]),
    Source("allenai/WildChat", None, "train", first_turn),
)


def prompts(source: Source, seed: int) -> Iterator[str]:
    """Prompts of one data set in a shuffled order, streamed: nothing is downloaded whole."""
    rows = load_dataset(source.path, source.name, split=source.split, streaming=True).shuffle(
        seed=seed, buffer_size=2000
    )
    return (prompt for row in rows if (prompt := source.prompt(row)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--each", type=int, default=64, help="prompts of each data set")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    groups = [list(islice(prompts(source, args.seed), args.each)) for source in SOURCES]
    for source, group in zip(SOURCES, groups, strict=True):
        if len(group) < args.each:
            parser.error(f"{source.path} has only {len(group)} prompts: give --each {len(group)} at most")
    mixed = chain.from_iterable(zip(*groups, strict=True))
    lines = [json.dumps({"messages": [{"role": "user", "content": prompt}]}) for prompt in mixed]
    args.out.write_text("\n".join(lines) + "\n", "utf-8")
    print(f"wrote {len(lines)} prompts to {args.out}")


if __name__ == "__main__":
    main()
