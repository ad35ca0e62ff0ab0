"""A real trained model, SmolLM2-135M, and a twin in other coordinates of its residual stream and of all blocks.

Cut to two layers and the first tokens, to be quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State, load, merged
from models import relative_deviation
from safetensors.torch import save_file
from streams import joined, split
from transformers import AutoConfig, AutoModelForCausalLM

from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.families.stream import residual_kind
from mergekit_symalign.planting import random_elements, random_stream
from mergekit_symalign.symmetry.residual.kinds import Residual
from mergekit_symalign.symmetry.residual.move import move_scope
from mergekit_symalign.symmetry.residual.scope import norms_of

LAYERS, TOKENS, NOISE = 2, 8192, 0.02


class SmolLM2:
    """The model, a sibling of it, and the sibling's twin: tied under a signed permutation, untied under a rotation."""

    def __init__(self, folder: Path, wanted: Residual, whole: State, config: Any) -> None:
        self.folder, self.wanted = folder, wanted
        tied = wanted is Residual.permutation
        sizes = {"num_hidden_layers": LAYERS, "vocab_size": TOKENS}
        config.update({**sizes, "tie_word_embeddings": tied, "dtype": "float32"})
        config.layer_types = None
        self.config, self.layout = config, resolve(config, model="m")
        anchor = {name: x.float() for name, x in whole.items() if self._is_kept(name)}
        anchor["model.embed_tokens.weight"] = anchor["model.embed_tokens.weight"][:TOKENS].clone()
        if not tied:
            anchor["lm_head.weight"] = anchor["model.embed_tokens.weight"].clone()
        generator = torch.Generator().manual_seed(1)
        noise = {name: torch.randn(x.shape, generator=generator) * NOISE * x.std() for name, x in anchor.items()}
        sibling = {name: x + noise[name] for name, x in anchor.items()}
        states = {"anchor": anchor, "sibling": sibling, "twin": self._twin(sibling, tied=tied)}
        for name, state in states.items():
            self._save(name, state)

    def _is_kept(self, name: str) -> bool:
        claim = self.layout.claim(name)
        return claim is not None and (claim.layer is None or claim.layer < LAYERS)

    def _twin(self, state: State, *, tied: bool) -> State:
        kind = residual_kind(self.layout, tied, self.wanted)
        stream, planted = random_stream(kind, self.layout.geometry.hidden, 3), random_elements(self.layout, 4)
        scopes, parts = split(self.layout, state)
        moved = []
        for i, (scope, x) in enumerate(zip(scopes, parts, strict=True)):
            blocks = {kind.value: g for (layer, kind), g in planted.items() if layer == i - 1}
            wide = {name: y.double() for name, y in x.items()}
            norms = {
                name: (1 + 0.2 * torch.rand_like(gain), bias) for name, (gain, bias) in norms_of(scope, wide).items()
            }
            moved.append(
                {
                    name: y.float().contiguous()
                    for name, y in move_scope(scope, wide, kind, stream, blocks, norms).items()
                }
            )
        return joined(self.layout, moved)

    def _save(self, name: str, state: State) -> None:
        (self.folder / name).mkdir()
        self.config.save_pretrained(self.folder / name)
        save_file(state, self.folder / name / "model.safetensors", metadata={"format": "pt"})

    def merge(self, name: str) -> State:
        models = [{"model": str(self.folder / x), "parameters": {"weight": 0.5}} for x in ("anchor", name)]
        config = {
            "merge_method": "aligned_linear",
            "base_model": str(self.folder / "anchor"),
            "models": models,
            "parameters": {"residual": self.wanted.value, "residual_rounds": 2},
            "dtype": "float32",
        }
        return merged(config, self.folder / f"{name}-merged")

    def logits(self, name: str) -> torch.Tensor:
        tokens = torch.randint(0, TOKENS, (2, 32), generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(self.folder / name, dtype=torch.float32)(tokens).logits


@pytest.mark.parametrize(("wanted", "most"), [(Residual.permutation, 1e-6), (Residual.rotation, 1e-4)])
def test_the_merge_with_a_twin_is_the_merge_with_its_original(
    wanted: Residual, most: float, smollm2: Path, tmp_path: Path
) -> None:
    models = SmolLM2(tmp_path, wanted, load(smollm2), AutoConfig.from_pretrained(smollm2))
    assert relative_deviation(models.logits("sibling"), models.logits("twin")) < 1e-3
    found, original = models.merge("twin"), models.merge("sibling")
    off = {n: float((found[n].double() - x.double()).norm() / x.double().norm()) for n, x in original.items()}
    assert max(off.values()) < most
    assert relative_deviation(models.logits("sibling-merged"), models.logits("twin-merged")) < 1e-4
