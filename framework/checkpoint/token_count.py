"""How many tokens a run has trained on, counted on the device and read seldom."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor


class TokenState(TypedDict):
    """What a checkpoint keeps of a :class:`TokenCount`; its attributes tell more."""

    total: float
    known: float
    known_step: int
    fastest: float


class TokenCount:
    """The weights that ``training_step`` has returned, over all steps and ranks: most often, numbers of tokens.

    To know whether a number of them is reached, nobody has to wait for the device in each step: it is read only when
    twice the fastest pace until now would have reached it. So it is read more often the nearer the number comes, and
    after the same steps in a run that resumes.

    Attributes:
        total: tokens until now: a number, or a tensor on the device.
        known: as many as were read last.
        known_step: the optimizer step after which that was.
        fastest: the most tokens of a step, in the mean between any two readings.
        is_counted: whether there were any weights.
    """

    def __init__(self) -> None:
        self.total: Any = 0
        self.known = 0.0
        self.known_step = 0
        self.fastest = 0.0
        self.is_counted = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenCount) and vars(self) == vars(other)

    __hash__ = object.__hash__

    def add(self, weight: Any) -> None:
        """Count the weight of a step, of all ranks."""
        self.is_counted = True
        if isinstance(weight, Tensor):
            weight = weight.detach().reshape(())
            # Float32 stops counting by ones at 16 million; MPS has nothing above it but integers.
            if weight.device.type != "mps":
                weight = weight.to(torch.float64)
        self.total = self.total + weight

    def has_reached(self, count: float, step: int) -> bool:
        """Whether so many tokens are known to be reached. Sometimes a host–device sync.

        Args:
            count: the number of tokens.
            step: optimizer steps until now.

        Raises:
            RuntimeError: if steps have no weights.
        """
        num_steps = step - self.known_step
        if self.known >= count or num_steps <= 0:
            return self.known >= count
        if not self.is_counted:
            raise RuntimeError(
                "an interval in tokens counts the weights of steps, and training_step returned none: return "
                '{"loss": loss, "weight": number_of_tokens} from it'
            )
        if self.fastest and self.known + 2 * num_steps * self.fastest < count:
            return False
        now = float(self.total)  # host-device sync
        self.fastest = max(self.fastest, (now - self.known) / num_steps)
        self.known = now
        self.known_step = step
        return now >= count

    def next_multiple(self, of: float) -> float:
        """The first multiple of a number of tokens that is not known to be reached."""
        return (self.known // of + 1) * of

    def state_dict(self) -> TokenState | None:
        """The count, as plain numbers; None without weights. A host-device sync."""
        if not self.is_counted:
            return None
        return {
            "total": float(self.total),
            "known": self.known,
            "known_step": self.known_step,
            "fastest": self.fastest,
        }

    def load_state_dict(self, state: TokenState | None) -> None:
        """Take back :meth:`state_dict`."""
        self.__init__()
        if state is not None:
            vars(self).update(state, is_counted=True)
            if self.total == int(self.total):
                self.total = int(self.total)
