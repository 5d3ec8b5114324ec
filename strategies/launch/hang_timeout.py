"""How long a run may stand still before it counts as hung, by phase."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

# In seconds. All but training may take long by nature: downloads, compilation, a whole evaluation, remote storage.
DEFAULTS: Mapping[str, float] = {
    "setup": 1800.0,
    "prepare_data": 1800.0,
    "train": 300.0,
    "validate": 1800.0,
    "checkpoint": 1800.0,
    "teardown": 1800.0,
}
# Between two looks, at most.
MOST_SECONDS = 1.0
# What a run may be doing beside these, and whose time-out it has.
_COUNTS_AS = {"sanity_check": "validate", "test": "validate", "predict": "validate"}
# By default, a run may stand still for so many times the longest time that it has stood still for before it went on.
_GROWTH = 3.0


@dataclass(frozen=True)
class HangTimeout:
    """How long a run may stand still, by phase.

    Attributes:
        seconds: by phase; infinite where it may stand still for ever.
        is_default: the user has not chosen. Then a run whose steps are long by nature is given more time.
    """

    seconds: Mapping[str, float] = field(default_factory=lambda: DEFAULTS)
    is_default: bool = True

    @classmethod
    def read(cls, value: Any, defaults: Mapping[str, float] = DEFAULTS) -> HangTimeout:
        """Read the argument ``hang_timeout``.

        Args:
            value: a number of seconds or a ``timedelta`` for all phases, 0 for no watch; a mapping of these by phase;
                None for the defaults.
            defaults: the seconds of some phases where nothing else is given.

        Raises:
            ValueError: if it is none of these, or names another phase.
        """
        of_phases = {phase: _seconds(defaults[phase]) for phase in defaults}
        if value is None:
            return cls({**DEFAULTS, **of_phases})
        if not isinstance(value, Mapping):
            return cls(dict.fromkeys(DEFAULTS, _seconds(value)), is_default=False)
        if unknown := [phase for phase in value if phase not in DEFAULTS]:
            raise ValueError(
                f"hang_timeout has the phases {', '.join(map(repr, DEFAULTS))}; got {unknown[0]!r}"
            )
        chosen = {phase: _seconds(value[phase]) for phase in value}
        return cls({**DEFAULTS, **of_phases, **chosen}, is_default=False)

    @property
    def is_off(self) -> bool:
        """Whether nothing is watched."""
        return min(self.seconds.values()) == math.inf

    def interval(self) -> float:
        """How often to look, in seconds: about once a second."""
        return max(0.05, min(MOST_SECONDS, min(self.seconds.values()) / 20))

    def limit(self, phase: str, longest: float = 0.0) -> float:
        """Return how long a run may stand still in a phase.

        Args:
            phase: the phase.
            longest: for how long it has stood still there at most, before it went on.
        """
        seconds = self.seconds[_COUNTS_AS.get(phase, phase)]
        return max(seconds, _GROWTH * longest) if self.is_default else seconds

    def limit_of_waiting(self) -> float:
        """Return how long a process may wait for others: they are given their own time first.

        By default that is left to the time-out of the collectives.
        """
        if self.is_default:
            return math.inf
        return max(self.seconds.values()) + max(3.0, 3 * self.interval())


def _seconds(value: Any) -> float:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not is_number or not seconds >= 0:
        raise ValueError(
            "hang_timeout must be a number of seconds from 0 (0 for no watch), a timedelta, None, or a mapping of "
            f"these by phase; got {value!r}"
        )
    return float(seconds) or math.inf
