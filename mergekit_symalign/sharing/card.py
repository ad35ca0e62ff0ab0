"""What the card of a repository says of one file: what it belongs to, how it came about, and how to use it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from mergekit_symalign.alignment_file import AlignmentFile
from mergekit_symalign.alignments.fit import STREAM_BLOCK
from mergekit_symalign.hub.address import Address
from mergekit_symalign.sharing.sections import plain, table
from mergekit_symalign.statistics.file import StatisticsFile

_PLAIN_NAME = re.compile(r"[\w./@+-]+")
_PINNED = "To use this very version whatever comes later, add `@` and the commit to the address."


def of_alignment(file: AlignmentFile, address: Address, told: str) -> str:
    """The section of an alignment.

    Args:
        file: with public names.
        address: where it is to be.
        told: one sentence on how much it aligns.
    """
    origin = file.origin
    anchor, model = _usable(origin.anchor, "ANCHOR"), _usable(origin.model, "MODEL")
    full = any(file.settings_of(block).get("rotation") == "full" for block in file.blocks)
    computes = (
        "**It changes what the model computes** (`rotation: full`)."
        if full
        else "What the model computes does not change."
    )
    rows = [
        ("anchor", plain(origin.anchor)),
        ("model", plain(origin.model)),
        *_common(origin.family, origin.sizes),
        ("blocks", str(len(file.blocks.keys() - {STREAM_BLOCK}))),
        ("residual stream", "moved" if STREAM_BLOCK in file.blocks else "not moved"),
        ("how much", plain(told)),
        ("settings", _listed(_settings(file))),
        ("fingerprint of the anchor", f"`{plain(origin.anchor_fingerprint)}`"),
        ("fingerprint of the model", f"`{plain(origin.model_fingerprint)}`"),
        *_made(file.sha256, origin.versions),
    ]
    untied = any(file.settings_of(block).get("untie") for block in file.blocks)
    merge: dict[str, Any] = {"merge_method": "rotation_match", "base_model": anchor}
    merge["models"] = [{"model": anchor}, {"model": model, "parameters": {"alignment": str(address)}}]
    merge |= {"parameters": {"untie": True}} if untied else {}
    return "\n\n".join(
        [
            f"## {plain(address.file)}: an alignment",
            f"It puts the neurons and attention heads of {plain(origin.model)} where {plain(origin.anchor)} has them. "
            f"{computes}",
            table(rows),
            "Use it in a merge with `mergekit-yaml config.yml out/`. `aligned_ties`, `aligned_slerp` and all other "
            "aligned methods take it in the same way:",
            _yaml(merge | {"dtype": "bfloat16"}),
            "Or write the aligned model by itself, and check that it computes what the original computes:",
            f"    mergekit-symalign apply {address} {model} -o aligned --anchor {anchor}\n"
            f"    mergekit-symalign verify {model} aligned",
            "The file is used only if both models have these fingerprints, and if it is a symmetry of the model. "
            f"{_PINNED}",
        ]
    )


def of_statistics(file: StatisticsFile, address: Address) -> str:
    """The section of a file of statistics. Takes what `of_alignment` does."""
    origin, measured = file.origin, file.measured
    model = _usable(origin.model, "MODEL")
    kinds = sorted({kind for name in file.names for kind in file.kinds(name)})
    rows = [
        ("model", plain(origin.model)),
        *_common(origin.family, origin.sizes),
        ("statistics", f"{', '.join(f'`{kind}`' for kind in kinds)} of {len(file.names)} tensors"),
        ("settings", _listed({"gram": measured.gram, "fisher": measured.fisher, "only": measured.only})),
        ("measured on", f"{measured.tokens} tokens in {measured.sequences} sequences"),
        ("mean loss", "not measured" if measured.loss is None else f"{measured.loss:.4g} nats"),
        ("digest of the inputs", f"`{plain(measured.calibration)}`"),
        ("digest of the tokenizer", f"`{plain(origin.tokenizer)}`"),
        ("fingerprint of the model", f"`{plain(origin.fingerprint)}`"),
        *_made(file.sha256, origin.versions),
    ]
    method = "regmean" if "gram" in kinds else "fisher"
    merge = {
        "merge_method": method,
        "models": [
            {"model": model, "parameters": {"statistics": str(address)}},
            {"model": "OTHER", "parameters": {"statistics": "other.safetensors"}},
        ],
        "dtype": "bfloat16",
    }
    return "\n\n".join(
        [
            f"## {plain(address.file)}: statistics",
            f"They say what the layers of {plain(origin.model)} read, or how its loss depends on them. The file holds "
            "no weights and no texts.",
            table(rows),
            "Use them in a merge with another fine-tune of the same base, with `mergekit-yaml config.yml out/`. Its "
            "own statistics come from `mergekit-symalign measure OTHER -o other.safetensors --calibration FILE`:",
            _yaml(merge),
            f"The file is used only if the model has this fingerprint and tokenizer. {_PINNED}",
        ]
    )


def front_matter(kind: str, models: Sequence[str]) -> dict[str, list[str]]:
    """What the Hub's search reads.

    Args:
        kind: of the file.
        models: that it belongs to, those with a repository.
    """
    tags = {"tags": ["mergekit", "mergekit-symalign", kind]}
    return {**tags, "base_model": list(dict.fromkeys(models))} if models else tags


def _settings(file: AlignmentFile) -> dict[str, str]:
    """Every parameter with its value, or all of its values where blocks differ; without what was not given."""
    found: dict[str, dict[str, None]] = {}
    for block in file.blocks:
        for name, value in file.settings_of(block).items():
            if value is not None:
                found.setdefault(name, {})[_word(value)] = None
    return {name: " or ".join(values) for name, values in sorted(found.items())}


def _common(family: str, sizes: Mapping[str, Any]) -> list[tuple[str, str]]:
    known = {name: size for name, size in sizes.items() if size}
    return [("family", plain(family)), ("sizes", _listed(known))]


def _made(sha256: str, versions: Mapping[str, str]) -> list[tuple[str, str]]:
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [("SHA-256", f"`{plain(sha256)}`"), ("made with", plain(packages) or "not told")]


def _listed(values: Mapping[str, Any]) -> str:
    return plain("; ".join(f"{name}: {_word(value)}" for name, value in values.items())) or "none"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _usable(name: str, otherwise: str) -> str:
    """A name that commands and YAML take as it is."""
    return name if _PLAIN_NAME.fullmatch(name) else otherwise


def _yaml(config: Mapping[str, Any]) -> str:
    return f"```yaml\n{yaml.safe_dump(dict(config), sort_keys=False, width=200)}```"
