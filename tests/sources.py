"""A model in memory, handed to the measurements one layer at a time as `StoredModel` hands on a stored one."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_symalign.activations.images import Images
from mergekit_symalign.activations.runner import Batch, LayerRunner
from mergekit_symalign.families.resolve import resolve


class InMemory:
    """The tensors of a whole model; tied ones under their first name, as they are stored."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.runner = LayerRunner(model.config, resolve(model.config, model="m"), "sdpa")
        self._state = {name: x.detach() for name, x in model.named_parameters()}

    def layer(self, index: int) -> dict[str, Tensor]:
        prefix = self.runner.layout.name(index, "")
        return {name.removeprefix(prefix): x for name, x in self._state.items() if name.startswith(prefix)}

    def outside(self) -> dict[str, Tensor]:
        return {name: x for name, x in self._state.items() if self.runner.layout.layer_of(name) is None}


def inputs_alone(model: PreTrainedModel, lengths: tuple[int, ...] = (9, 5, 12), seed: int = 0) -> list[Batch]:
    """Some random inputs, each in a batch of its own."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    if hasattr(config, "image_size"):
        size = (len(lengths), config.num_channels, config.image_size, config.image_size)
        pixels = torch.randn(size, generator=generator, dtype=model.dtype)
        patches = (config.image_size // config.patch_size) ** 2 + 1
        return [Images(image[None], torch.ones(1, patches, dtype=torch.bool)) for image in pixels]
    ids = [torch.randint(3, config.vocab_size, (1, length), generator=generator) for length in lengths]
    return [Batch(x, torch.ones_like(x, dtype=torch.bool)) for x in ids]


def together(batches: list[Batch]) -> Batch:
    """The same inputs in one batch, padded on the right."""
    if isinstance(batches[0], Images):
        return Images(torch.cat([b.ids for b in batches]), torch.cat([b.valid for b in batches]))
    width = max(b.ids.shape[1] for b in batches)
    ids, valid = (torch.zeros(len(batches), width, dtype=d) for d in (torch.int64, torch.bool))
    for row, batch in enumerate(batches):
        ids[row, : batch.ids.shape[1]], valid[row, : batch.ids.shape[1]] = batch.ids[0], True
    return Batch(ids, valid)
