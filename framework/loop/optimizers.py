"""What ``configure_optimizers`` returned: optimizers, as the user's module gets them, and when schedulers step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..engine.wrapper import Wrapper

if TYPE_CHECKING:
    from .step import Step


@dataclass
class LRSchedulerConfig:
    """A scheduler and when it steps.

    Attributes:
        scheduler: anything with ``step()``, ``state_dict()`` and ``load_state_dict()``.
        name: under which a learning-rate monitor logs it.
        interval: ``"epoch"`` or ``"step"`` (an optimizer window).
        frequency: step every so many intervals.
        reduce_on_plateau: whether it steps on the monitored value.
        monitor: name of that value, as logged.
        strict: raise if it was not logged; else leave the scheduler alone.
    """

    scheduler: Any
    name: str | None = None
    interval: str = "epoch"
    frequency: int = 1
    reduce_on_plateau: bool = False
    monitor: str | None = None
    strict: bool = True

    def __post_init__(self) -> None:
        if self.interval not in ("epoch", "step"):
            raise ValueError(
                f'lr_scheduler: interval must be "epoch" or "step"; got {self.interval!r}'
            )
        if not isinstance(self.frequency, int) or self.frequency < 1:
            raise ValueError(
                f"lr_scheduler: frequency must be an integer from 1; got {self.frequency!r}"
            )
        for method in ("step", "state_dict", "load_state_dict"):
            if not callable(getattr(self.scheduler, method, None)):
                raise TypeError(
                    f"lr_scheduler: a scheduler must have {method}(); got {self.scheduler!r}"
                )

    def require_monitor(self) -> None:
        """Raise if the loop could not step it, for want of a value."""
        if self.reduce_on_plateau and self.monitor is None:
            raise ValueError(
                f'configure_optimizers: {type(self.scheduler).__name__} needs "monitor" in its dict: '
                '{"scheduler": scheduler, "monitor": "val_loss"}'
            )


def check_schedulers(
    optimizers: list[Optimizer], schedulers: list[LRSchedulerConfig]
) -> None:
    """Raise for a scheduler that would change nothing.

    Raises:
        ValueError: if it belongs to an optimizer that is not stepped.
    """
    # An optimizer may wrap another one, to which the scheduler belongs.
    inner = [getattr(optimizer, "optimizer", None) for optimizer in optimizers]
    for config in schedulers:
        owner = getattr(config.scheduler, "optimizer", None)
        if isinstance(owner, Optimizer) and not any(
            owner is known for known in (*optimizers, *inner)
        ):
            raise ValueError(
                f"configure_optimizers: the {type(config.scheduler).__name__} is for a {type(owner).__name__} that was "
                "not returned, so it would change nothing: return that optimizer, too"
            )


def parse_optimizers(returned: Any) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    """Sort out what ``configure_optimizers`` returned.

    Raises:
        TypeError, ValueError: if it is none of the documented forms.
    """
    if _is_list_of(returned, dict):
        parsed = [parse_optimizers(item) for item in returned]
        return list(chain(*(o for o, _ in parsed))), list(
            chain(*(s for _, s in parsed))
        )
    optimizers, schedulers = _split(returned)
    optimizers = [optimizer for optimizer in optimizers if optimizer is not None]
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "configure_optimizers must return an optimizer, a list of them, two lists (optimizers, schedulers), "
                f'a dict {{"optimizer": …, "lr_scheduler": …}}, a list of such dicts, or None; got {optimizer!r}'
            )
    schedulers = [scheduler for scheduler in schedulers if scheduler is not None]
    return optimizers, [_scheduler_config(scheduler) for scheduler in schedulers]


def _split(returned: Any) -> tuple[list[Any], list[Any]]:
    """Sort the forms apart: the optimizers and the schedulers, None or in their dicts, as they were given."""
    if isinstance(returned, dict):
        return _parse_dict(returned)
    if not isinstance(returned, (list, tuple)):
        return [returned], []
    if len(returned) == 2 and _is_list_of(returned[0], Optimizer, type(None)):
        optimizers, schedulers = returned
        if not isinstance(schedulers, (list, tuple)):
            schedulers = [schedulers]
        return list(optimizers), list(schedulers)
    return list(returned), []


def _is_list_of(value: Any, *kinds: type) -> bool:
    if not isinstance(value, (list, tuple)):
        return False
    return all(isinstance(item, kinds) for item in value)


def _parse_dict(returned: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The optimizer and the scheduler of one dict, as a list each."""
    if unknown := set(returned) - {"optimizer", "lr_scheduler", "monitor"}:
        raise ValueError(
            f"configure_optimizers: the dict has unknown keys {sorted(map(str, unknown))}; "
            "known are optimizer, lr_scheduler, monitor"
        )
    scheduler = _with_monitor(returned.get("lr_scheduler"), returned.get("monitor"))
    return [returned.get("optimizer")], [scheduler]


def _with_monitor(scheduler: Any, monitor: str | None) -> Any:
    """Put a ``monitor`` that stands beside a scheduler into the scheduler's own dict, unless that names one."""
    if monitor is None or scheduler is None:
        return scheduler
    return {
        "monitor": monitor,
        **(scheduler if isinstance(scheduler, dict) else {"scheduler": scheduler}),
    }


def _scheduler_config(scheduler: Any) -> LRSchedulerConfig:
    """Read a scheduler, or the dict in which it stands with its options."""
    options = (
        dict(scheduler) if isinstance(scheduler, dict) else {"scheduler": scheduler}
    )
    known = LRSchedulerConfig.__dataclass_fields__
    if unknown := set(options) - set(known):
        raise ValueError(
            f"lr_scheduler: unknown keys {sorted(map(str, unknown))}; known are {', '.join(known)}"
        )
    if options.get("scheduler") is None:
        raise ValueError('lr_scheduler: the dict has no "scheduler"')
    # A schedule may say itself that it counts steps.
    if getattr(options["scheduler"], "interval", None) == "step":
        options.setdefault("interval", "step")
    options.setdefault(
        "reduce_on_plateau", isinstance(options["scheduler"], ReduceLROnPlateau)
    )
    # A scheduler that steps on no value has none to monitor, whatever its dict says.
    if not options["reduce_on_plateau"]:
        options.pop("monitor", None)
    return LRSchedulerConfig(**options)


class ManualOptimizer(Wrapper):
    """What ``self.optimizers()`` gives: an optimizer whose steps honour hooks, precision and accumulation.

    Attributes of the optimizer itself can be read through it, and it passes for one of that class.

    Args:
        optimizer: the optimizer.
        owner: what trains in this fit, and does the work.

    Attributes:
        optimizer: as given.
        num_gathered: batches whose gradients wait for the window's end, by :meth:`update`.
        last_update: the batch of the last :meth:`update`, counted over the run.
    """

    _wraps = "optimizer"

    def __init__(self, optimizer: Optimizer, owner: Step) -> None:
        self.optimizer = optimizer
        self.num_gathered = 0
        self.last_update: int | None = None
        self._owner = owner

    @property
    def __class__(self) -> Any:  # type: ignore[override] # it is read by isinstance
        """The optimizer's, so that schedulers, say, take this in its place."""
        return type(self.optimizer)

    def count(self, batch: int) -> None:
        """Count the gradients of a batch, by its number in the run."""
        self.last_update = batch
        self.num_gathered += 1

    def begin_window(self) -> None:
        """Begin a window with no gradients."""
        self.num_gathered = 0

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step: unscale, hooks, optimizer.

        Args:
            closure: for ``Optimizer.step``.
            **kwargs: none are known.
        """
        if kwargs:
            raise TypeError(f"step takes a closure only; got {', '.join(kwargs)}")
        return self._owner.step(self.optimizer, closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Let only this optimizer's parameters require gradients; ``sync_grad=False`` keeps gradients local."""
        with nullcontext() if sync_grad else self._owner.engine.no_sync():
            self._owner.toggle(self)
            try:
                yield
            finally:
                self._owner.untoggle()

    def update(self, loss: Tensor) -> None:
        """Do for ``loss`` all that automatic optimization does.

        Clears the gradients at a window's first batch, divides the loss by the window's length
        (``accumulate_grad_batches``), computes gradients, and at the window's last batch clips and steps.
        """
        self._owner.update(self, loss)
