"""Files on the Hub that a configuration names: fetched before anything else, and from then on named by commits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit.config import ConditionalParameter, MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_symalign.graph.config_groups import all_settings, scalars
from mergekit_symalign.hub.address import is_address
from mergekit_symalign.sharing.fetch import ALIGNMENT, STATISTICS, with_commit

_PARAMETERS = (ALIGNMENT, STATISTICS)
_BEFORE, _AFTER = r"(?<![\w/.:@-])", r"(?=[\s\"'\],}]|$)"  # an address in YAML, and no part of a longer one


@dataclass(frozen=True)
class SharedFiles:
    """The addresses in a configuration, and what they are now.

    Attributes:
        commits: by address as the user wrote it: the same with the commit.
    """

    commits: Mapping[str, str]

    @staticmethod
    def of(config: MergeConfiguration, options: MergeOptions) -> SharedFiles:
        """Fetch every file on the Hub that the configuration names, each once.

        Raises:
            HubError: if one is not there, not open to this user, or cannot be reached.
            StatisticsFileError: if an index is damaged.
        """
        asked = {
            (value, name): None
            for _, settings in all_settings(config)
            for name in _PARAMETERS
            for value in scalars(settings.get(name))
            if is_address(value)
        }
        found = {value: with_commit(value, name, options.transformers_cache) for value, name in asked}
        return SharedFiles({value: commit for value, commit in found.items() if value != commit})

    def config(self, config: MergeConfiguration) -> MergeConfiguration:
        """The configuration with commits; itself where there is nothing to change."""
        if not self.commits:
            return config
        config = config.model_copy(deep=True)
        for _, settings in all_settings(config):
            for name in filter(settings.__contains__, _PARAMETERS):
                settings[name] = self._value(settings[name])  # type: ignore[index]
        return config

    def text(self, text: str) -> str:
        """The same of the configuration as the user wrote it."""
        for address, commit in self.commits.items():
            text = re.sub(f"{_BEFORE}{re.escape(address)}{_AFTER}", commit, text)
        return text

    def in_any(self, argument: Any) -> Any:
        """The same of any argument of `run_merge`; MergeKit hands the text on in one of them."""
        return self.text(argument) if isinstance(argument, str) else argument

    def _value(self, value: Any) -> Any:
        """One setting, with filters and gradients."""
        if isinstance(value, list):
            return [self._value(item) for item in value]
        if isinstance(value, ConditionalParameter):
            return value.model_copy(update={"value": self._value(value.value)})
        return self.commits.get(value, value) if isinstance(value, str) else value
