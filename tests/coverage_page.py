"""The part of docs/architectures.md on classes that are not in `models.FAMILIES`, from measurements."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from more_models import MORE, more_model

from mergekit_symalign.commands.plain import plain_loss
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.trial.checks import deviation_of_blocks, deviation_of_stream, stream_kinds

START = "\n## More classes\n"
HEAD = f"""{START}
The same *function* in float64 on smaller models. *Stream*: what may be done to the residual stream, and how far that
moves the outputs (where a model returns the stream itself, nothing is measured). In vision-language models the text
model is aligned, and the vision tower passes through unaligned. *Plain merge*: what MergeKit's own merge of a model
with itself does to its tensors, from the layout that transformers writes.

| test model | family | transformers class | function | stream | plain merge |
|---|---|---|---:|---|---|
"""
OUT = """
### Not aligned

| classes | reason |
|---|---|
| Qwen2-VL | MergeKit does not find the number of layers in its config, so it plans no merge |
| heads for answers to questions of decoders and BERT, BERT for pre-training | MergeKit drops the head's tensors |
| GPT-J, GPTBigCode, GPT-Neo, Falcon, BLOOM, MPT, T5, BART, Whisper, MPNet | not described yet |
| Llama 4, gpt-oss, Gemma 3n, Gemma 4, Qwen3-Next, Qwen3.5, hybrids with state spaces | not described yet |
| DeepSeek V4, Kimi Linear, LongCat Flash (two attentions in a layer) | not described yet |
| NanoChat (QK-norm without gains), DiffLlama (differential attention), BitNet (norms in the attention) | no solver |
"""


def section() -> str:
    with tempfile.TemporaryDirectory() as folder:
        return HEAD + "\n".join(_rows(Path(folder))) + "\n" + OUT


def _rows(folder: Path) -> Iterable[str]:
    for name, (class_name, _) in MORE.items():
        model = more_model(name)
        layout = resolve(model.config, model=name)
        kinds = ((kind.value, deviation_of_stream(model, layout, kind)) for kind in stream_kinds(model, layout))
        row = (
            name,
            layout.family.title,
            f"`{class_name}`",
            f"{deviation_of_blocks(model, layout):.0e}",
            ", ".join(f"{kind} {off:.0e}" for kind, off in kinds) or "returned",
            (plain_loss(model, folder / name) or "fine").partition(" (")[0].partition(", ")[0],
        )
        yield f"| {' | '.join(row)} |"
