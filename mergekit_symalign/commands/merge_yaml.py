"""``mergekit-symalign yaml``: MergeKit's own command, where the autoload's ``.pth`` file is stripped, and on Ray."""

from __future__ import annotations

from copy import copy
from typing import Any

import click
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_symalign import hook
from mergekit_symalign.commands.outcome import readable

_AUTO = "auto"


class Address(click.ParamType):
    """Of a Ray cluster; the option may stand without a value, and must not swallow an argument for it."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in (_AUTO, "local") and ":" not in value:
            self.fail(f"{value} is no address of a Ray cluster. Write --ray auto, or --ray HOST:PORT", param, ctx)
        return str(value)


_OPTIONS = (
    click.Option(
        ["--ray"],
        is_flag=False,
        flag_value=_AUTO,
        type=Address(),
        metavar="[auto|ADDRESS]",
        help="Merge on a Ray cluster: the running one, or one on this machine (auto), or the one at ADDRESS",
    ),
    click.Option(
        ["--workers"], type=click.IntRange(min=1), help="With --ray: workers at a time [default: all that fit]"
    ),
    click.Option(
        ["--gpus-per-worker"],
        type=click.FloatRange(min=0),
        help="With --ray: GPUs of each worker [default: 1 with --cuda, else 0]",
    ),
)


def _merge(**arguments: Any) -> None:
    """MergeKit's own function, on Ray if that is asked for."""
    own = {option.name: arguments.pop(option.name) for option in _OPTIONS if option.name is not None}
    if own["ray"] is not None:
        with readable():
            hook.require_known("--ray")
        from mergekit_symalign.distributed import cluster, command

        request = command.requested(arguments, address=own["ray"], workers=own["workers"], gpus=own["gpus_per_worker"])
        with readable():
            cluster.require_ray()
        command.merge_on_ray(_run, arguments, request)
    elif given := [option for option in _OPTIONS if own[str(option.name)] is not None]:
        raise click.UsageError(f"{given[0].opts[0]} is for --ray, which is not given")
    else:
        _run(arguments)


def _run(arguments: dict[str, Any]) -> None:
    assert mergekit_yaml.callback is not None
    mergekit_yaml.callback(**arguments)


yaml = copy(mergekit_yaml)
yaml.name = "yaml"
yaml.params = [*mergekit_yaml.params, *_OPTIONS]
yaml.callback = _merge
yaml.help = """Run the merge that CONFIG_FILE describes and write it to OUT_PATH, as mergekit-yaml does.

The options are those of mergekit-yaml. Both know the aligned methods; this one also where Python's startup files
(.pth) are not read. With --ray the merge runs on the machines of a Ray cluster.

\b
Example: mergekit-symalign yaml merge.yml merged --cuda
"""
