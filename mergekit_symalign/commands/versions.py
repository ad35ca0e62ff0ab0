"""``mergekit-symalign --version``: the versions of everything that a merge depends on, to paste into an issue."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import metadata

import click

from mergekit_symalign import __version__

PACKAGES = (
    "mergekit",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "accelerate",
    "peft",
    "numpy",
    "scipy",
    "pydantic",
    "click",
)


def versions() -> str:
    """One line for each package, Python and the operating system."""
    rows = [("mergekit-symalign", __version__), *((name, _installed(name)) for name in PACKAGES), *_machine()]
    return "\n".join(f"{name:18} {version}" for name, version in rows)


def show_versions(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """The callback of ``--version``: prints and ends."""
    if wanted and not context.resilient_parsing:
        click.echo(versions())
        context.exit()


def _installed(name: str) -> str:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
    return f"{version} ({_build()})" if name == "torch" else version


def _build() -> str:
    """What torch was built for, and what it finds: the same version differs between CPUs, CUDA and ROCm."""
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if getattr(torch.version, "hip", None):
        built = f"ROCm {torch.version.hip}"
    devices = torch.cuda.device_count()
    found = ", ".join(torch.cuda.get_device_name(i) for i in range(devices)) or "no GPU"
    return f"{built}, {found}, {torch.get_num_threads()} threads"


def _machine() -> Iterator[tuple[str, str]]:
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "platform", f"{platform.platform()}, {sys.getfilesystemencoding()}, {sys.byteorder}-endian"
