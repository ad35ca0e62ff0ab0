"""The part of docs/architectures.md on classes that are not in `models.FAMILIES`, from measurements."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from hub_models import CLASSES as HUB
from hub_models import hub_model
from more_models import MORE, more_model
from transformers import PreTrainedModel

from mergekit_symalign.commands.plain import plain_loss
from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.trial.checks import deviation_of_blocks, deviation_of_stream, stream_kinds
from mergekit_symalign.trial.models import randomise

START = "\n## More classes\n"
HEAD = f"""{START}
The same *function* in float64 on smaller models. *Stream*: what may be done to the residual stream, and how far that
moves the outputs (where a model returns the stream itself, nothing is measured). In vision-language models the text
model is aligned, and so are the blocks of vision towers that a family describes: CLIP, SigLIP, Pixtral, InternViT, and
those of Qwen2.5-VL, Qwen3-VL and GLM-4V. All others pass through unaligned. *Plain merge*: what MergeKit's own merge of
a model with itself does to its tensors, from the layout that transformers writes. A text model can be
merged into the text part of a vision-language model ([how](faq.md#choosing)).

`make architectures` plants a twin of each of these models, merges it through MergeKit, and compares. What the merge
computes is off by less than 1e-4 standard deviations, and it is no farther from the anchor than before planting. The
one exception is `dinov2-swiglu`, which is refused.

| test model | family | transformers class | function | stream | plain merge |
|---|---|---|---:|---|---|
"""
HUB_HEAD = """
### Code on the Hub

transformers does not have these classes. They were measured on a Llama that keeps its tensors as they do. Aligned
methods from weights merge them; methods that run the model (activations, statistics) do not.

| class | family | function | stream |
|---|---|---:|---|
"""
OUT = """
### Not aligned

| classes | reason |
|---|---|
| Qwen2-VL | MergeKit does not find the number of layers in its config, so it plans no merge |
| heads for answers to questions of decoders | not described yet |
| Falcon 7B (Falcon's first architecture) | MergeKit's file for Falcon lists tensors that only 40B and 180B have |
| Baichuan, ChatGLM, Jais, Phi-3-small, the first Qwen, Solar | code on the Hub, not described |
| Persimmon, Fuyu, Phi and StableLM with QK layer norms that have biases | no solver |
| Nystromformer, YOSO, MRA, Longformer, LUKE, X-MOD | not described yet |
| ELECTRA, RoFormer with embeddings narrower than the hidden size | refused by their shape |
| CTRL, XLM, FlauBERT, XLNet, Funnel, FNet, ALBERT, SqueezeBERT, MobileBERT, I-BERT | of another build |
| CLIPModel, CLIPForImageClassification | MergeKit cannot build them to find their tensors (`get_input_embeddings`) |
| DINOv2 giant (SwiGLU) | MergeKit cannot split the tensor that gate and up projection share in checkpoints |
| LongT5, Switch Transformers, Speech2Text, BlenderBot 3, NLLB-MoE, BART as a decoder alone | not described yet |
| vision towers that scale, window or convolve otherwise (Llama 4, Gemma 3n, SAM, Qwen2-VL) | pass through unaligned |
| Gemma 3n, Gemma 4 | heads of another size in some layers, and layers that share keys and values: no solver |
| Llama 4 with vision | transformers 5.24 cannot run the class |
| Laguna, MiMo V2 | heads of another number or size in some layers |
| Zamba 2 | one attention that many layers share, each with an adapter of its own |
| DeepSeek V4, Kimi Linear | not described yet |
| LongCat Flash (two attentions in a layer) | not described yet |
| DiffLlama (differential attention), BitNet (norms in the attention) | no solver |
"""


def section() -> str:
    with tempfile.TemporaryDirectory() as folder:
        rows = "\n".join(_rows(Path(folder)))
    return f"{HEAD}{rows}\n{HUB_HEAD}" + "\n".join(_hub_rows()) + f"\n{OUT}"


def _hub_rows() -> Iterable[str]:
    for kind in HUB:
        model = randomise(hub_model(kind), 0)
        layout = resolve(model.config, model=kind.__name__)
        cells = (f"`{kind.__name__}`", layout.family.title, f"{deviation_of_blocks(model, layout):.0e}")
        yield f"| {' | '.join((*cells, _stream(model, layout)))} |"


def _stream(model: PreTrainedModel, layout: ModelLayout) -> str:
    """What may be done to the residual stream, and how far that moves the outputs."""
    kinds = ((kind.value, deviation_of_stream(model, layout, kind)) for kind in stream_kinds(model, layout))
    return ", ".join(f"{kind} {off:.0e}" for kind, off in kinds)


def _no_stream(layout: ModelLayout) -> str:
    if layout.family.stream.returned:
        return "returned"
    return "none: encoder and decoder share it" if layout.family.stream.shared else "none: positions are calculated"


def _rows(folder: Path) -> Iterable[str]:
    for name, (class_name, _) in MORE.items():
        model = more_model(name)
        layout = resolve(model.config, model=name)
        row = (
            name,
            layout.family.title,
            f"`{class_name}`",
            f"{deviation_of_blocks(model, layout):.0e}",
            _stream(model, layout) or _no_stream(layout),
            (plain_loss(model, folder / name) or "fine").partition(" (")[0].partition(", ")[0],
        )
        yield f"| {' | '.join(row)} |"
