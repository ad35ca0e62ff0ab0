"""Time and memory of the run on prompts, against plain forward passes of both models over the same tokens.

    python examples/activations/measure.py tuned/anchor tuned/style --calibration prompts.jsonl --tokens 8192

Each part runs in a process of its own, so that the peaks of memory are its own.
"""

import argparse
import json
import resource
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
                started = time.perf_counter()
                hidden = model.base_model(batch.ids, attention_mask=batch.valid.long(), use_cache=False)[0]
                middle = time.perf_counter()
                model.lm_head(hidden)
                seconds["forward"] += middle - started
                seconds["vocabulary"] += time.perf_counter() - middle
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
            started = time.perf_counter()
            result = original(self, **kwargs)
            seconds[name] += time.perf_counter() - started
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
    parser.add_argument("--part", choices=["plain", "aligned"])
    args = parser.parse_args()
    if args.part:
        found = (plain if args.part == "plain" else aligned)(args)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"peak": peak, **found}))
        return
    results = {}
    for part in ("plain", "aligned"):
        run = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", part], capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stderr)
        results[part] = json.loads(run.stdout.splitlines()[-1])
    forward, streamed = results["plain"], results["aligned"]
    run_seconds = streamed["embed"] + streamed["layers"]
    full = forward["forward"] + forward["vocabulary"]
    print(f"{forward['tokens']:.0f} tokens")
    print(f"two plain forwards: {full:.1f} s ({forward['forward']:.1f} s without logits)")
    print(f"run on prompts:     {run_seconds:.1f} s, and solves {streamed['solves']:.1f} s")
    print(f"ratio:              {run_seconds / full:.2f} ({run_seconds / forward['forward']:.2f} without logits)")
    print(f"peak memory:        {forward['peak']:.0f} MiB plain (one model), {streamed['peak']:.0f} MiB aligned")


if __name__ == "__main__":
    main()
