"""What the family files say of the residual stream, against the transformers models they describe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import EverythingInFloat64, logits, relative_deviation
from streams import CASES, case
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from mergekit_symalign.errors import ParameterError
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.families.schema import StreamNorm
from mergekit_symalign.families.stream import is_gain, residual_group, residual_kind, ties_embeddings
from mergekit_symalign.symmetry.residual.kinds import Residual, ResidualKind

_ON_THE_WAY = frozenset(("__getitem__", "reshape", "view", "dropout", "to", "float", "contiguous", "index_select"))
_READING = frozenset(("linear", "addmm", "matmul", "conv2d"))


class _Readers(TorchFunctionMode):
    """Which weights are multiplied with the output of each norm, as the model runs."""

    def __init__(self, model: PreTrainedModel, gains: list[str]) -> None:
        super().__init__()
        self.found: dict[str, set[str]] = {gain: set() for gain in gains}
        self._weights = {x.untyped_storage().data_ptr(): name for name, x in model.named_parameters() if x.ndim > 1}
        self._outputs: dict[int, tuple[str, torch.Tensor]] = {}  # tensors are kept, so that no id is used twice
        for gain in gains:
            module = model.get_submodule(gain.rpartition(".")[0])
            module.register_forward_hook(lambda _, __, out, gain=gain: self._outputs.update({id(out): (gain, out)}))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if name in _READING:
            weights = {self._weights.get(x.untyped_storage().data_ptr()) for x in tensors} - {None}
            for x in tensors:
                if id(x) in self._outputs:
                    self.found[self._outputs[id(x)][0]] |= weights
        elif name in _ON_THE_WAY and tensors and id(tensors[0]) in self._outputs and isinstance(result, torch.Tensor):
            self._outputs[id(result)] = (self._outputs[id(tensors[0])][0], result)
        return result


def _is_last_of_several(model: PreTrainedModel, gain: str) -> bool:
    """Whether a norm belongs to the last layer: behind a block, its output goes on along the stream only before it."""
    layout = resolve(model.config, model="m")
    return layout.layer_of(gain) == layout.layers - 1


def _stream_norms(model: PreTrainedModel) -> dict[str, set[str]]:
    """Gains of norms on the stream, and by the table the tensors that read them, all by full name."""
    layout = resolve(model.config, model="m")
    found = {}
    names = set(dict(model.named_parameters()))
    for name in names:
        claim = layout.claim(name)
        assert claim is not None
        if is_gain(claim.part, claim.spec):
            layer = claim.layer
            readers = claim.spec.read_by
            found[name] = {part if layer is None else layout.name(layer, part) for part in readers} & names
    return found


def _is_read_by(model: PreTrainedModel, gain: str, readers: set[str]) -> bool:
    """Whether these are all that sees a norm's output: multiplied there and divided here, nothing changes."""
    before = logits(model)
    parameters = dict(model.named_parameters())
    factor = torch.rand(len(parameters[gain]), generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    offset = 1.0 if "Gemma" in type(model).__name__ else 0.0
    bias = parameters.get(gain.removesuffix("weight") + "bias")
    claim = resolve(model.config, model="m").claim
    saved = {name: parameters[name].detach().clone() for name in readers | {gain}}
    with torch.no_grad():
        parameters[gain].copy_((parameters[gain] + offset) * factor - offset)
        if bias is not None:
            bias.mul_(factor)
        for name in readers:
            found = claim(name)
            assert found is not None
            columns = len(found.spec.axes) - 1 - found.spec.axes[::-1].index("residual")
            shape = [-1 if i == columns else 1 for i in range(parameters[name].ndim)]
            parameters[name].div_(factor.reshape(shape))
        after = logits(model)
        for name, x in saved.items():
            parameters[name].copy_(x)
        if bias is not None:
            bias.div_(factor)
    return relative_deviation(before, after) < 1e-9


@pytest.mark.parametrize("name", CASES)
def test_every_norm_lists_all_that_reads_it(name: str) -> None:
    """Watched while the model runs; where its output goes elsewhere too, the table lists nothing."""
    model = case(name)
    table = _stream_norms(model)
    with torch.no_grad(), _Readers(model, list(table)) as watched:
        logits(model)
    tied = set((getattr(model, "all_tied_weights_keys", None) or {}).values())
    for gain, readers in watched.found.items():
        if any(name in tied for name in readers):
            continue  # the head is the embedding, which no table calls a reader
        if _is_last_of_several(model, gain) and not table[gain]:
            continue
        assert table[gain] == (readers if readers and _is_read_by(model, gain, readers) else set()), gain


@pytest.mark.parametrize("name", CASES)
def test_norms_subtract_the_mean_where_the_table_says_so(name: str) -> None:
    model = case(name)
    layout = resolve(model.config, model="m")
    for gain in _stream_norms(model):
        norm = model.get_submodule(gain.rpartition(".")[0])
        x = torch.randn(5, len(norm.weight), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        with torch.no_grad(), EverythingInFloat64():
            blind = torch.allclose(norm(x), norm(x + 1), atol=1e-9)
        assert blind == (layout.family.stream.norm is StreamNorm.layer), gain


ROTATES = ResidualKind.rotation, ResidualKind.mean_keeping_rotation
ADMITTED: dict[str, ResidualKind | str] = {
    "llama": ResidualKind.rotation,
    "llama-tied": "untie: true",
    "mistral": ResidualKind.rotation,
    "qwen2": ResidualKind.rotation,
    "qwen2-tied": "untie: true",
    "qwen3": ResidualKind.rotation,
    "gemma": "embedding.*residual: permutation",
    "gemma2": "behind the block",
    "gemma3": "behind the block",
    "olmo2": "behind the block",
    "glm4": "behind the block",
    "phi3": ResidualKind.rotation,
    "phi2": ResidualKind.mean_keeping_rotation,
    "gpt-neox": ResidualKind.mean_keeping_rotation,
    "gpt2": "untie: true",
    "gpt2-untied": ResidualKind.mean_keeping_rotation,
    "cohere2": ResidualKind.mean_keeping_rotation,
    "starcoder2-unbiased": ResidualKind.mean_keeping_rotation,
    "bert": "returns the residual stream",
    "bert-classifier": "behind the block",
    "modernbert": "behind the embeddings",
    "vit": "returns the residual stream",
    "vit-classifier": ResidualKind.mean_keeping_rotation,
    "mixtral": ResidualKind.rotation,
}


@pytest.mark.parametrize("name", ADMITTED)
def test_what_is_not_exact_is_refused_with_what_would_be(name: str) -> None:
    config, wanted = case(name).config, ADMITTED[name]
    layout = resolve(config, model="m")
    tied = ties_embeddings(config, layout)
    if isinstance(wanted, ResidualKind):
        assert residual_kind(layout, tied, Residual.rotation) is wanted
    else:
        with pytest.raises(
            ParameterError, match=rf"residual: rotation with {layout.family.title.split()[0]}.*{wanted}"
        ):
            residual_kind(layout, tied, Residual.rotation)
    if layout.family.stream.returned:
        with pytest.raises(ParameterError, match=r"residual: permutation with .*Use residual: none"):
            residual_kind(layout, tied, Residual.permutation)
    else:
        signed = residual_kind(layout, tied, Residual.permutation) is ResidualKind.signed_permutation
        assert signed == (layout.family.stream.norm is StreamNorm.rms)
    assert residual_kind(layout, tied, Residual.none) is ResidualKind.none
    assert residual_group(layout, tied).kinds[0] is ResidualKind.none
