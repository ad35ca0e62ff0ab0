"""What linear layers put out, summed layer by layer, against hooks on whole models that run all prompts at once."""

from __future__ import annotations

import pytest
import torch
from models import EverythingInFloat64, make_model, perturbed
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import mergekit_symalign.activations.calibration as calibration_module
from mergekit_symalign.activations.calibration import Calibration
from mergekit_symalign.activations.outputs import Compared, compare_streams, run_outputs
from mergekit_symalign.activations.runner import LayerRunner
from mergekit_symalign.activations.statistics import Stream
from mergekit_symalign.families.flow import Place, is_parallel, layer_places
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.fusion.correlations import TokenSums, activation_costs

LENGTHS = (24, 9, 24, 17, 5, 24, 11)
# of each family one linear layer for every name, fused ones with the share of their outputs
WATCHED = {
    "llama": {
        "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj", "gate": "mlp.gate_proj",
        "up": "mlp.up_proj", "attention": "self_attn.o_proj", "mlp": "mlp.down_proj",
    },
    "gpt2": {"up": "mlp.c_fc", "attention": "attn.c_proj", "mlp": "mlp.c_proj"},
    "phi2": {"query": "self_attn.q_proj", "up": "mlp.fc1", "attention": "self_attn.dense", "mlp": "mlp.fc2"},
    "bert": {"key": "attention.self.key", "attention": "attention.output.dense", "mlp": "output.dense"},
    "gemma2": {"value": "self_attn.v_proj", "attention": "self_attn.o_proj", "mlp": "mlp.down_proj"},
}  # fmt: skip


def _calibration() -> Calibration:
    generator = torch.Generator().manual_seed(0)
    return Calibration(tuple(tuple(torch.randint(3, 97, (n,), generator=generator).tolist()) for n in LENGTHS))


def _streamed(models: list[PreTrainedModel], calibration: Calibration) -> tuple[TokenSums, list[Compared]]:
    runners = [LayerRunner(m.config, resolve(m.config, model="m")) for m in models]
    recorded = []
    for runner, model in zip(runners, models, strict=True):
        outside = {name: x for name, x in model.state_dict().items() if name in runner.layout.outside}
        recorded.append([runner.record(batch, outside) for batch in calibration.batches()])
    hidden = [[r.hidden for r in of_model] for of_model in recorded]
    kept, config, found = list(calibration.kept()), models[0].config, []
    first = compare_streams(*hidden, kept)
    places, parallel = layer_places(config, runners[0].layout), is_parallel(config, runners[0].layout)
    for layer in range(runners[0].layout.layers):
        streams = []
        for runner, model, h, r in zip(runners, models, hidden, recorded, strict=True):
            names = {part: runner.layout.name(layer, part) for part in runner.layout.inside}
            state = model.state_dict()
            weights = {part: state[name] for part, name in names.items() if name in state}
            streams.append(Stream(runner, weights, h, r, frozenset()))
        found.append(run_outputs(layer, streams[0], streams[1:], kept, places, parallel=parallel))
        hidden = found[-1].hidden
    return first, found


@torch.no_grad()
def _whole(model: PreTrainedModel, calibration: Calibration, modules: list[str]) -> dict[str, Tensor]:
    """What modules put out, of every prompt alone, joined [tokens, units]."""
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: found[name].append(out[0]))
        for name in modules
    ]
    for ids in calibration.sequences:
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(outputs) for name, outputs in found.items()}


@pytest.mark.parametrize("family", WATCHED)
def test_costs_are_those_of_whole_models(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_module, "BATCH_TOKENS", 60)
    anchor = make_model(family, 0, attn_implementation="eager")
    models = [anchor, perturbed(anchor, 0.3, 1)]
    calibration = _calibration()
    assert len(list(calibration.batches())) > 1
    layout = resolve(anchor.config, model="a test")
    with EverythingInFloat64():
        _, compared = _streamed(models, calibration)
        paths = {
            (layer, name): layout.name(layer, module)
            for layer in range(layout.layers)
            for name, module in WATCHED[family].items()
        }
        ours, theirs = (_whole(model, calibration, list(paths.values())) for model in models)
        for (layer, name), path in paths.items():
            z = [((x - x.mean(0)) / x.std(0, unbiased=False)).mT for x in (ours[path], theirs[path])]
            distances = torch.cdist(z[1], z[0], compute_mode="donot_use_mm_for_euclid_dist")
            costs = activation_costs([compared[layer].sums[0][name]], torch.float64)
            torch.testing.assert_close(costs, distances / distances.max(), rtol=0, atol=1e-6, msg=f"{layer} {name}")


def test_every_linear_layer_is_seen() -> None:
    """Also those that are fused or stored the other way round (Conv1D)."""
    for family in ("gpt2", "phi3", "gpt-neox"):
        model = make_model(family, 0, attn_implementation="eager")
        _, compared = _streamed([model, model], _calibration())
        gate = {"gate"} if family == "phi3" else set()
        assert compared[0].sums[0].keys() == {"query", "key", "value", "attended", "up", "attention", "mlp"} | gate
    assert any(isinstance(module, Conv1D) for module in make_model("gpt2", 0).modules())


def test_sizes_are_those_of_the_stream_and_of_what_is_added() -> None:
    model = make_model("gemma2", 0, attn_implementation="eager")  # its blocks end with a norm
    calibration = _calibration()
    with EverythingInFloat64():
        _, compared = _streamed([model, model], calibration)
        names = {
            Place.attention: "model.layers.0.post_attention_layernorm",
            Place.mlp: "model.layers.0.post_feedforward_layernorm",
        }
        whole = _whole(model, calibration, list(names.values()))
    for place, name in names.items():
        assert compared[0].sizes[place] == pytest.approx(float(whole[name].abs().sum()), rel=1e-6)
    assert compared[0].sizes[Place.middle] != compared[0].sizes[Place.entering]
