"""What towers of images and sounds write to the residual stream moves with it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from more_models import more_model
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.trial import checks
from mergekit_symalign.trial.checks import EXACT, deviation_of_stream, stream_kinds
from mergekit_symalign.trial.models import EverythingInFloat64


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


PICTURE = {"pixel_values": _random(1, 3, 28, 28)}
PATCHES = {"pixel_values": _random(4, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 2, 2]])}
PERCEIVED: dict[str, dict[str, Any]] = {
    "video-llava": {"pixel_values_images": PICTURE["pixel_values"]},
    "vip-llava": PICTURE,
    "got-ocr": PICTURE,
    "cohere2-vision": PICTURE,
    "deepseek-vl": PICTURE,
    "lighton-ocr": PICTURE | {"image_sizes": [(28, 28)]},
    "ovis2": PICTURE,
    "paddleocr": {"pixel_values": _random(4, 3, 14, 14), "image_grid_thw": torch.tensor([[1, 2, 2]])},
    "videollama3": {"pixel_values": _random(4, 3 * 14 * 14), "image_merge_sizes": torch.tensor([1])}
    | {"image_grid_thw": torch.tensor([[1, 2, 2]])},
    "hyperclovax-vl": PATCHES,
    "glm4.6v": PATCHES,
    "hunyuan-vl": {"pixel_values": _random(4, 3 * 14 * 14), "image_grid_thw": torch.tensor([[1, 2, 2]])},
    "audio-flamingo": {"input_features": _random(1, 8, 32), "input_features_mask": torch.ones(1, 32).long()},
}


@torch.no_grad()
def _scores(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Products of what is perceived with all words: any change of coordinates of the stream keeps them."""
    perceive = getattr(model.model, "get_audio_features" if "input_features" in inputs else "get_image_features")
    with EverythingInFloat64():
        found = perceive(**inputs)
    found = getattr(found, "pooler_output", found)
    parts = found if isinstance(found, (tuple, list)) else [found]
    rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
    return rows @ model.get_input_embeddings().weight.T


@pytest.mark.parametrize("name", PERCEIVED)
def test_what_is_perceived_moves_with_the_stream(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = more_model(name)
    layout = resolve(model.config, model=name)
    monkeypatch.setattr(checks, "outputs", partial(_scores, **PERCEIVED[name]))
    kinds = stream_kinds(model, layout)
    assert kinds
    assert all(deviation_of_stream(model, layout, kind) < EXACT for kind in kinds)
