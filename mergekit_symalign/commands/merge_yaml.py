"""``mergekit-symalign yaml``: MergeKit's own command, for environments that strip the autoload's ``.pth`` file."""

from __future__ import annotations

from copy import copy

from mergekit.scripts.run_yaml import main as mergekit_yaml

yaml = copy(mergekit_yaml)
yaml.name = "yaml"
yaml.help = """Run the merge that CONFIG_FILE describes and write it to OUT_PATH, as mergekit-yaml does.

The options are those of mergekit-yaml. Both know the aligned methods; this one also where Python's startup files
(.pth) are not read.

\b
Example: mergekit-symalign yaml merge.yml merged --cuda
"""
