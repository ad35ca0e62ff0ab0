"""Where the configs of a merge's models say different things of the same weights, and whose config the output has."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mergekit.common import ModelReference

from mergekit_symalign.families.function import Differences, config_differences
from mergekit_symalign.families.resolve import ModelLayout, text_config
from mergekit_symalign.families.stream import ties_embeddings

LOG = logging.getLogger(__name__)

_OF_THE_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")
_OF_THE_OUTPUT = ("dtype", "torch_dtype", "architectures", "transformers_version", *_OF_THE_TOKENIZER)


@dataclass(frozen=True)
class Functions:
    """What models compute from the same weights.

    Attributes:
        anchor: the model whose config MergeKit gives to the output.
        differences: of each model whose config says something else of the same weights, what.
        own: the only model that takes part, whose config the output keeps; None if the output has the anchor's.
    """

    anchor: ModelReference | None = None
    differences: Mapping[ModelReference, Differences] = field(default_factory=dict)
    own: ModelReference | None = None

    def changed(self) -> dict[ModelReference, Differences]:
        """The models whose function is not what comes out."""
        return {model: found for model, found in self.differences.items() if model != self.own}

    def without(self, key: str) -> Functions:
        """The same where a key makes no difference."""
        left = {m: {k: x for k, x in found.items() if k != key} for m, found in self.differences.items()}
        return replace(self, differences={model: found for model, found in left.items() if found})

    def warn(self) -> None:
        """Say which values differ, and what follows."""
        for model, found in self.differences.items():
            what = f"model {model} and the anchor {self.anchor} differ in their configs: {shown(found)}"
            if model == self.own:
                LOG.info("%s. The output keeps the config of this model, as it has no other", what)
            else:
                LOG.warning(
                    "%s. The merged model runs with the anchor's values, so this model's weights do not compute there "
                    "what they were trained to compute",
                    what,
                )

    def facts(self) -> dict[str, Any]:
        """For the report."""
        found = {str(m): {key: list(values) for key, values in of.items()} for m, of in self.differences.items()}
        return {"config": str(self.own or self.anchor), "config_differences": found}

    def reasons(self) -> list[str]:
        """Why the merge is not exact, one sentence for each model."""
        return [
            f"the config of {model} differs from the anchor's in {', '.join(found)}, and the output has the anchor's"
            for model, found in self.changed().items()
        ]

    def keep_own(self, out: Any, trust_remote_code: bool) -> None:
        """Write the only model's values into the config of the output, which MergeKit has taken from the anchor.

        Tokens stay the anchor's, whose tokenizer MergeKit copies.
        """
        if self.own is not None:
            take_over(out, self.own.config(trust_remote_code=trust_remote_code), self.differences.get(self.own, {}))


def compare_functions(
    anchor: ModelReference,
    models: Iterable[ModelReference],
    layout: ModelLayout,
    *,
    only: ModelReference | None,
    texts: Collection[ModelReference] = (),
    trust_remote_code: bool,
) -> Functions:
    """
    Args:
        anchor: the model whose config MergeKit gives to the output.
        models: all that the merge reads.
        layout: the anchor's.
        only: the model that the output consists of, if it is a whole one.
        texts: models that are compared with the text model inside the anchor.
        trust_remote_code: MergeKit's option.
    """
    config = anchor.config(trust_remote_code=trust_remote_code)
    configs = {m: m.config(trust_remote_code=trust_remote_code) for m in models if m != anchor}
    found = {
        model: config_differences(_text_part(config, layout) if model in texts else config, other, layout)
        for model, other in configs.items()
    }
    own = only if only in configs and type(configs[only]) is type(config) else None
    return Functions(anchor, {model: differences for model, differences in found.items() if differences}, own)


def _text_part(config: Any, layout: ModelLayout) -> Any:
    """What a config says of the text model inside; whether that one's head is its embedding, the outer config says."""
    part = copy.deepcopy(text_config(config, layout.family))
    part.tie_word_embeddings = ties_embeddings(config, layout)
    return part


def take_over(out: Any, own: Any, differences: Differences) -> None:
    """Give a config another one's values, all but tokens, dtype and names, unless a difference says they matter."""
    matter = {key.partition(".")[0] for key in differences}
    for key in {*vars(out), *vars(own)}:
        if key.startswith("_") or (key in _OF_THE_OUTPUT and key not in matter):
            continue
        if key in vars(own):
            setattr(out, key, copy.deepcopy(vars(own)[key]))
        else:
            delattr(out, key)


def shown(differences: Differences) -> str:
    """``rms_norm_eps is 1e-06 in the anchor and 1e-05 in the model; …``."""
    return "; ".join(f"{key} is {a!r} in the anchor and {b!r} in the model" for key, (a, b) in differences.items())
