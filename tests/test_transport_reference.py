"""OT-WTS on a ViT classifier, layer by layer as the papers' published code does it, written down anew with numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import ot
import pytest
import torch
from conftest import merge_config, merged
from models import make_model, save

Array = np.ndarray[Any, np.dtype[np.float64]]


class Fusion:
    """Fuses two models' matrices one after another, ``T`` [model, anchor]."""

    def __init__(self, anchor: dict[str, Array], model: dict[str, Array], regularization: float) -> None:
        self.anchor, self.model, self.regularization = anchor, model, regularization
        self.fused: dict[str, Array] = {}

    def plan(self, ours: Array, theirs: Array) -> Array:
        """From rows, the model's already in the anchor's coordinates."""
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (ours, theirs))
        cost = np.sqrt(((b[:, None] - a[None]) ** 2).sum(-1))
        cost /= cost.max()
        n = len(cost)
        mass = np.full(n, 1 / n)
        exact = self.regularization == 0
        plan = ot.emd(mass, mass, cost) if exact else ot.sinkhorn(mass, mass, cost, self.regularization, stopThr=1e-12)
        return n * plan

    def linear(self, name: str, t_in: Array | None, *, last: bool = False) -> Array | None:
        ours, theirs = (x[f"{name}.weight"].reshape(len(x[f"{name}.weight"]), -1) for x in (self.anchor, self.model))
        bias = self.model[f"{name}.bias"]
        theirs = theirs if t_in is None else theirs @ t_in
        t_out = None if last else self.plan(ours, theirs)
        if t_out is not None:
            theirs, bias = t_out.T @ theirs, t_out.T @ bias
        shape = self.anchor[f"{name}.weight"].shape
        self.mean(f"{name}.weight", theirs.reshape(shape))
        self.mean(f"{name}.bias", bias)
        return t_out

    def norm(self, name: str, t_in: Array) -> None:
        for kind in ("weight", "bias"):
            self.mean(f"{name}.{kind}", self.model[f"{name}.{kind}"] @ t_in)

    def mean(self, name: str, theirs: Array) -> None:
        self.fused[name] = (self.anchor[name] + theirs) / 2


def _reference(
    anchor: dict[str, Array], model: dict[str, Array], layers: int, regularization: float
) -> dict[str, Array]:
    f = Fusion(anchor, model, regularization)
    patches = f.linear("vit.embeddings.patch_embeddings.projection", None)
    positions = "vit.embeddings.position_embeddings"
    t_positions = f.plan(anchor[positions][0].T, model[positions][0].T)
    f.mean(positions, model[positions] @ t_positions)
    stream = (patches + t_positions) / 2
    f.mean("vit.embeddings.cls_token", model["vit.embeddings.cls_token"] @ stream)
    for i in range(layers):
        at = f"vit.layers.{i}"
        f.norm(f"{at}.layernorm_before", stream)
        f.linear(f"{at}.attention.q_proj", stream)
        f.linear(f"{at}.attention.k_proj", stream)
        values = f.linear(f"{at}.attention.v_proj", stream)
        stream = (stream + f.linear(f"{at}.attention.o_proj", values)) / 2
        f.norm(f"{at}.layernorm_after", stream)
        neurons = f.linear(f"{at}.mlp.fc1", stream)
        stream = (stream + f.linear(f"{at}.mlp.fc2", neurons)) / 2
    f.norm("vit.layernorm", stream)
    f.linear("classifier", stream, last=True)
    return f.fused


@pytest.mark.parametrize("regularization", [0.0, 0.06])
def test_fusion_of_two_vits_is_the_published_one(regularization: float, tmp_path: Path) -> None:
    models = [make_model("vit-classifier", seed) for seed in (0, 1)]
    paths = [save(model, tmp_path / str(i), torch.float64) for i, model in enumerate(models)]
    parameters = {"regularization": regularization}
    out = merged(merge_config("ot_fusion", paths[0], paths, parameters=parameters, dtype="float64"), tmp_path / "out")
    states = [{name: x.numpy() for name, x in model.state_dict().items()} for model in models]
    wanted = _reference(*states, models[0].config.num_hidden_layers, regularization)
    assert wanted.keys() == out.keys()
    for name, x in wanted.items():
        np.testing.assert_allclose(out[name].numpy(), x, rtol=0, atol=1e-6, err_msg=name)
