"""Time and memory of the run on prompts, against plain forward passes of both models over the same tokens.

    OMP_NUM_THREADS=1 python examples/activations/measure.py tuned/anchor tuned/style --calibration prompts.jsonl

Seconds of CPU time, which other work on the same machine changes less than the clock's. Each part runs in a process of
its own, so that the peaks of memory are its own, and the two parts in turn; medians are shown.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_symalign import hook
from mergekit_symalign.activations.calibration import calibrate


def plain(args: argparse.Namespace) -> dict[str, float]:
    """Both models, one after the other, on the batches of the alignment; the vocabulary matrix apart."""
    seconds: dict[str, float] = defaultdict(float)
    for folder in (args.anchor, args.model):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        calibration = calibrate(args.calibration, tokenizer, {}, tokens=args.tokens)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.inference_mode():
            for batch in calibration.batches():
                started = time.process_time()
                hidden = model.base_model(batch.ids, attention_mask=batch.valid.long(), use_cache=False)[0]
                middle = time.process_time()
                model.lm_head(hidden)
                seconds["forward"] += middle - started
                seconds["vocabulary"] += time.process_time() - middle
    return seconds | {"tokens": float(calibration.tokens)}


def aligned(args: argparse.Namespace) -> dict[str, float]:
    """`mergekit-symalign solve`, with the time of its streaming and of its solving steps."""
    hook.install()
    from mergekit_symalign.commands.solve import run_solve
    from mergekit_symalign.graph import activations

    seconds: dict[str, float] = defaultdict(float)

    def timed(cls: Any, name: str) -> None:
        original = cls.execute

        def execute(self: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            result = original(self, **kwargs)
            seconds[name] += time.process_time() - started
            return result

        cls.execute = execute

    timed(activations.EmbedPrompts, "embed")
    timed(activations.RunLayer, "layers")
    timed(activations.SolveActivations, "solves")
    settings = {"objective": "activations", "calibration": str(args.calibration), "calibration_tokens": args.tokens}
    with tempfile.TemporaryDirectory() as folder:
        run_solve(args.anchor, args.model, Path(folder) / "a.safetensors", MergeOptions(quiet=True), settings)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("anchor")
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--part", choices=["plain", "aligned"])
    args = parser.parse_args()
    if args.part:
        found = (plain if args.part == "plain" else aligned)(args)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"peak": peak, **found}))
        return
    results = [{part: run(part) for part in ("plain", "aligned")} for _ in range(args.runs)]

    def median(part: str, *names: str) -> float:
        return statistics.median(sum(result[part][name] for name in names) for result in results)

    full, streamed = median("plain", "forward", "vocabulary"), median("aligned", "embed", "layers")
    ratios = [
        (r["aligned"]["embed"] + r["aligned"]["layers"]) / (r["plain"]["forward"] + r["plain"]["vocabulary"])
        for r in results
    ]
    print(f"{median('plain', 'tokens'):.0f} tokens, median of {args.runs} runs, CPU seconds")
    print(f"two plain forwards: {full:.1f} s ({median('plain', 'forward'):.1f} s without logits)")
    print(f"run on prompts:     {streamed:.1f} s, and solves {median('aligned', 'solves'):.1f} s")
    print(f"ratio:              {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")
    peaks = median("plain", "peak"), median("aligned", "peak")
    print(f"peak memory:        {peaks[0]:.0f} MiB plain (one model), {peaks[1]:.0f} MiB aligned")


def run(part: str) -> dict[str, float]:
    """One part in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", part], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
