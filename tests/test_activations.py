"""Alignment by activations: what streams is what the whole model computes, and planted twins are recovered."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State, load, merge_config, merged
from models import FAMILIES, EverythingInFloat64, make_model, perturbed, save, with_weights, word_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mergekit_symalign.activations import calibration as calibration_module
from mergekit_symalign.activations.calibration import Calibration
from mergekit_symalign.activations.runner import LayerRunner
from mergekit_symalign.activations.statistics import Stream, run_layer
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.graph import streaming
from mergekit_symalign.planting import Planted, random_elements, transform
from mergekit_symalign.symmetry import covariance
from mergekit_symalign.symmetry.covariance import Covariance

TOKENS, LENGTH = 2048, 24
ALL_AXES = frozenset(("query", "key", "value", "attended", "down"))


def prompts(path: Path, vocabulary: int = 97, tokens: int = TOKENS, seed: int = 0) -> Path:
    """A .jsonl file of random words, prompts of 5 to 24 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    while tokens > 0:
        length = int(torch.randint(5, LENGTH + 1, (1,), generator=generator))
        words = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        lines.append(json.dumps({"text": " ".join(f"w{i}" for i in words)}))
        tokens -= length
    path.write_text("\n".join(lines))
    return path


class Twins:
    """An anchor, a planted twin of it, a sibling, and a planted twin of that, saved in float32 with tokenizers."""

    def __init__(self, family: str, folder: Path) -> None:
        self.anchor = make_model(family, 0)
        self.sibling = perturbed(self.anchor, 0.02, 1)
        layout = resolve(self.anchor.config, model=family)
        elements = random_elements(layout, 3, Planted())
        self.paths = {}
        states = {"anchor": self.anchor.state_dict(), "sibling": self.sibling.state_dict()}
        states |= {f"{name}-twin": transform(state, layout, elements) for name, state in states.items()}
        for name, state in states.items():
            self.paths[name] = save(with_weights(self.anchor, state), folder / name)
            word_tokenizer(97).save_pretrained(folder / name)
        self.prompts = prompts(folder / "prompts.jsonl")

    def match(self, model: str, out: Path, **parameters: Any) -> State:
        settings = {"objective": "activations", "calibration": str(self.prompts)} | parameters
        config = merge_config("rotation_match", self.paths["anchor"], [self.paths[model]], parameters=settings)
        return merged(config, out)


@pytest.fixture(autouse=True)
def _tokenizers_as_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """For some model types transformers puts a class of its own around any tokenizer file, and reads no words."""
    monkeypatch.setattr(streaming, "AutoTokenizer", PreTrainedTokenizerFast)


@pytest.fixture(scope="module", params=FAMILIES)
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return Twins(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return Twins("llama", tmp_path_factory.mktemp("llama"))


def test_a_twin_is_recovered_from_activations_alone(
    twins: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(covariance, "PRIOR", 0.0)
    out, anchor = twins.match("anchor-twin", tmp_path), load(twins.paths["anchor"])
    for name, x in anchor.items():
        # a neuron out of place would be an error of order 1, a rotation off by 1e-3 one of that order
        torch.testing.assert_close(out[name], x, rtol=0, atol=1e-3 * float(x.abs().max()), msg=name)
    planted = load(twins.paths["anchor-twin"])
    assert sum(not torch.allclose(planted[name], x, atol=0.1) for name, x in anchor.items()) > len(anchor) / 3


def test_a_twin_aligns_to_the_same_weights_as_the_original(twins: Twins, tmp_path: Path) -> None:
    out = [twins.match(name, tmp_path / name) for name in ("sibling", "sibling-twin")]
    for name, x in out[0].items():
        torch.testing.assert_close(out[1][name], x, rtol=0, atol=1e-3 * float(x.abs().max()), msg=name)


STREAMED = ["mistral", "gemma3", "qwen3", "olmo2", "cohere2", "phi4-mini", "gpt2"]  # windows, QK-norms, fused, Conv1D
# Where the activations are in the modules of transformers, written down once more, without the family files.
OUTPUTS = {
    "q_proj": ("query",),
    "k_proj": ("key",),
    "v_proj": ("value",),
    "qkv_proj": ("query", "key", "value"),
    "c_attn": ("query", "key", "value"),
}
INPUTS = {"o_proj": "attended", "dense": "attended", "down_proj": "down", "fc2": "down"}


@contextmanager
def _hooked(model: PreTrainedModel) -> Iterator[dict[tuple[int, str], torch.Tensor]]:
    seen: dict[tuple[int, str], torch.Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), -1)
        last = name.rpartition(".")[2]
        two = ".".join(name.split(".")[-2:])
        reads = INPUTS.get(last) or {"attn.c_proj": "attended", "mlp.c_proj": "down"}.get(two)

        writes = OUTPUTS.get(last, ())

        def output(m: Any, args: Any, out: torch.Tensor, axes: Any = writes, layer: int = layer) -> None:
            heads, kv = model.config.num_attention_heads, model.config.num_key_value_heads
            kv = heads if model.config.model_type == "gpt2" else kv
            d = out.shape[-1] // (heads + 2 * kv)
            sizes = [heads * d, kv * d, kv * d] if len(axes) > 1 else [out.shape[-1]]
            seen.update({(layer, axis): x for axis, x in zip(axes, out.split(sizes, -1), strict=True)})

        def read(m: Any, args: Any, axis: Any = reads, layer: int = layer) -> None:
            seen[layer, axis] = args[0]

        if writes:
            handles.append(module.register_forward_hook(output))
        if reads:
            handles.append(module.register_forward_pre_hook(read))
    yield seen
    for handle in handles:
        handle.remove()


@torch.no_grad()
def _reference(anchor: PreTrainedModel, model: PreTrainedModel, calibration: Calibration) -> dict[Any, list[Any]]:
    """Products of plain forwards of the whole models, one prompt at a time, so without any padding."""
    sums: dict[Any, list[Any]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for sequence in calibration.sequences:
        ids, seen = torch.tensor([sequence]), []
        for each in (anchor, model):
            with _hooked(each) as found:
                each(ids, use_cache=False)
            seen.append({key: x[0] for key, x in found.items()})
        for key, a in seen[0].items():
            b = seen[1][key]
            for i, product in enumerate((a.mT @ b, a.square().sum(0), b.square().sum(0))):
                sums[key][i] = sums[key][i] + product
    return sums


def _streamed(models: list[PreTrainedModel], calibration: Calibration) -> dict[Any, Covariance]:
    runners = [LayerRunner(m.config, resolve(m.config, model="m")) for m in models]
    batches = list(calibration.batches())
    recorded, hidden = [], []
    for runner, model in zip(runners, models, strict=True):
        outside = {name: x for name, x in model.state_dict().items() if name in runner.layout.outside}
        recorded.append([runner.record(batch, outside) for batch in batches])
        hidden.append([r.hidden for r in recorded[-1]])
    found = {}
    for layer in range(runners[0].layout.layers):
        streams = []
        for runner, model, h, r in zip(runners, models, hidden, recorded, strict=True):
            state = model.state_dict()
            weights = {part: state[runner.layout.name(layer, part)] for part in runner.layout.inside}
            streams.append(Stream(runner, weights, h, r, ALL_AXES if model is models[1] else frozenset()))
        hidden, sums = run_layer(layer, streams[0], streams[1:], [b.valid for b in batches])
        found.update({(layer, axis): c for axis, c in sums[0].items()})
    return found


@pytest.mark.parametrize("family", STREAMED)
def test_streamed_statistics_are_those_of_the_whole_models(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_module, "BATCH_TOKENS", 200)
    anchor = make_model(family, 0, attn_implementation="eager")
    model = perturbed(anchor, 0.1, 1)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, LENGTH + 1, (40,), generator=generator).tolist()
    calibration = Calibration(tuple(tuple(torch.randint(97, (n,), generator=generator).tolist()) for n in lengths))
    assert len(list(calibration.batches())) > 1
    with EverythingInFloat64():
        expected, found = _reference(anchor, model, calibration), _streamed([anchor, model], calibration)
    assert found.keys() == expected.keys()
    assert len(found) == 5 * anchor.config.num_hidden_layers
    for key, sums in expected.items():
        for wanted, got in zip(sums, (found[key].cross, found[key].anchor, found[key].model), strict=True):
            assert (got - wanted).abs().max() <= 1e-6 * wanted.abs().max(), key
