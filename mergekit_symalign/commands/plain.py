"""What MergeKit's own merge does with a class of models."""

from __future__ import annotations

from pathlib import Path

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import PreTrainedModel

from mergekit_symalign.graph.silence import without_warnings

_SHOWN = 3


def plain_loss(model: PreTrainedModel, folder: Path) -> str:
    """What MergeKit's plain merge of a model with itself loses; nothing if every tensor is there afterwards.

    Args:
        model: a small one; it is saved.
        folder: where the model and the merge are written.
    """
    model.save_pretrained(folder / "model")
    source = {"model": str(folder / "model"), "parameters": {"weight": 1.0}}
    config = MergeConfiguration.model_validate({"merge_method": "linear", "models": [source]})
    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    try:
        with without_warnings():
            run_merge(config, str(folder / "out"), options)
            merged = type(model).from_pretrained(folder / "out", dtype=model.dtype).state_dict()
    except Exception as error:  # whatever it stumbles over
        return f"fails ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
    before = model.state_dict()
    lost = [
        name for name, x in before.items() if name not in merged or not torch.equal(merged[name].float(), x.float())
    ]
    more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
    return f"loses {', '.join(lost[:_SHOWN])}{more}" if lost else ""
