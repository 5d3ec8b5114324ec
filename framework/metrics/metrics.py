"""What ``self.log`` keeps: tensors on their device, reduced over steps and ranks, read only when needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.batches import map_tensors
from ..messages import log
from .context import LogContext, LogOptions
from .metric_state import State, is_metric
from .over_ranks import agree_on_entries, reduce_entries
from .values import (
    CUSTOM,
    REDUCTION_FUNCTIONS,
    REDUCTIONS,
    LoggedValue,
    Results,
    as_floats,
    as_number,
    as_tensors,
    describe,
    is_number,
    join_part,
)

if TYPE_CHECKING:
    from ...strategies.base import Strategy


class Metrics:
    """All that a run logs.

    The loop tells where it is: it enters a stage, such as training or validation, and begins and ends batches there.
    This sets what a call of ``log`` means.

    Args:
        strategy: knows the ranks.
        enabled: whether to keep what is logged.

    Attributes:
        module: the running module, whose torchmetrics may be logged.
        results: the epoch values of the stages that have ended, and their last step values.
        epoch_results: the epoch values of the running epoch or evaluation, as far as it has been reduced.
        stages: what was logged in each stage, by name and index of the evaluation loader.
        deferred: where the arguments of :meth:`log` are kept instead, while a compiled step runs; None outside of one.
    """

    def __init__(
        self,
        strategy: Strategy,
        enabled: bool = True,
    ) -> None:
        self.strategy = strategy
        self.enabled = enabled
        self.module: torch.nn.Module | None = None
        self.results = Results()
        self.epoch_results = Results()
        self.stages: dict[str, dict[Any, LoggedValue]] = {}
        self.deferred: list[tuple[str, Any, LogOptions]] | None = None
        self._context = LogContext()
        # Names of metrics' values of which a warning has said that they are no numbers.
        self._left_out: set[str] = set()
        # For each name of a checkpoint inside an epoch, its last value and how many waited with it.
        self._restored: dict[Any, tuple[Any, int]] = {}

    @property
    def is_dummy(self) -> bool:
        """Whether the batch in work only keeps this rank in step with the others."""
        return self._context.is_dummy

    def begin_run(
        self,
        module: torch.nn.Module,
        keeps_bar: bool,
    ) -> None:
        """Begin to log for another run.

        Args:
            module: what runs.
            keeps_bar: whether the progress bar goes on to show what the last run logged for it.
        """
        self.module = module
        if not keeps_bar:
            self.results.progress_bar.clear()

    def publish(self, values: dict[str, float]) -> None:
        """Show values that a callback has found among those that callbacks read, and nowhere else."""
        self.results.callback.update(values)

    def take(self, results: Results) -> None:
        """Take over what was logged in another process, as the results of the stages that have ended."""
        self.results = results

    def enter(
        self,
        stage: str | None,
        scope: str | None,
    ) -> None:
        """Begin to log for a stage.

        Args:
            stage: ``"train"``, ``"validation"`` or ``"test"``; None outside of these.
            scope: ``"batch"`` or ``"epoch"``, what values belong to by default; None where nothing can be logged.
        """
        values = {} if stage is None else self.stages.setdefault(stage, {})
        self._context = LogContext(stage, scope, values)

    @contextmanager
    def context(
        self,
        stage: str | None,
        scope: str | None,
    ) -> Iterator[None]:
        """Log for a stage within the block, as :meth:`enter` does, and for that of before afterwards.

        After an exception, the stage stays: hooks that are called because of it find the values of where it was raised.
        """
        outer = self._context
        self.enter(stage, scope)
        yield
        self._context = outer

    def begin_batches(self) -> None:
        """From now on, values belong to a batch by default."""
        self._context.enter_scope("batch")

    def begin_loader(self, index: int | None) -> None:
        """Go on to an evaluation loader; None if there is only one."""
        self._context.enter_loader(index)

    def begin_batch(
        self,
        batch: Any,
        is_dummy: bool = False,
    ) -> None:
        """Go on to a batch.

        Args:
            batch: its first dimension is the weight of what is logged, in an epoch's mean; None if there is no batch.
            is_dummy: it only keeps this rank in step with the others, and what is logged about it does not count.
        """
        self._context.enter_batch(batch, is_dummy)

    def begin_part(
        self,
        part: Any,
        share: tuple[float, bool] | None,
    ) -> None:
        """Go on to a part of the batch; ``share`` is its fraction of the samples, and whether it is the first.

        After the last part, the whole batch is passed, with None.
        """
        self._context.enter_batch(part, self.is_dummy, share)

    def note_empty_loader(self) -> None:
        """Take note that the evaluation loader gave this rank no batch: others may log what this one does not."""
        self._context.empty_loaders.add(self._context.dataloader_idx)

    def end_batches(self) -> None:
        """From now on, values belong to the epoch by default."""
        self.begin_batch(None)
        self._context.enter_loader(None)
        self._context.enter_scope("epoch")

    def log(
        self,
        name: str,
        value: Any,
        options: LogOptions,
    ) -> None:
        """Keep a value; arguments as of ``Module.log``."""
        if self.deferred is not None:
            value = _deferrable(name, value, options)
            self.deferred.append((name, value, options))
            return
        if options.rank_zero_only and not self._is_kept_here(name, value):
            return
        if not self.enabled:
            return
        context = self._context
        entry = self._entry(name, value, options)
        is_reduced_now = self._is_reduced_now(entry, options)
        if entry.metric is not None:
            if not context.is_dummy or entry.value is None:
                entry.show(value)
            return
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            value = as_number(name, value)
        if context.is_dummy:
            if is_reduced_now:
                # The others reduce here, too, and would wait for this rank.
                # collective
                self.strategy.reduce(torch.as_tensor(value).detach(), entry.reduction)
            return
        if isinstance(value, Tensor):
            value = self._tensor(entry, value, options.enable_graph)
        entry.show(self._step_value(entry, value, is_reduced_now))
        if entry.on_epoch:
            entry.add(value, context.weight_of(entry, options.batch_size))

    def defer(self) -> None:
        """Keep what is logged from now on, until :meth:`log_deferred`."""
        self.deferred = []

    def log_deferred(self) -> None:
        """Log what was kept, and keep no more."""
        deferred = self.deferred or []
        self.deferred = None
        for name, value, options in deferred:
            self.log(name, value, options)

    def forget_deferred(self) -> None:
        """Keep no more, and forget what was kept."""
        self.deferred = None

    def _is_kept_here(self, name: str, value: Any) -> bool:
        """Whether this is the main rank, which alone keeps a value with ``rank_zero_only``."""
        if is_metric(value) and self.strategy.world_size > 1:
            raise ValueError(
                f"log({name!r}, rank_zero_only=True): a torchmetrics Metric is computed by all processes"
            )
        return self.strategy.global_rank == 0

    def _is_reduced_now(self, entry: LoggedValue, options: LogOptions) -> bool:
        """Whether the value of a training step is reduced over the ranks at once, as was asked for."""
        if not options.sync_dist or options.rank_zero_only or not entry.on_step:
            return False
        return self._context.stage == "train" and self.strategy.world_size > 1

    def _step_value(self, entry: LoggedValue, value: Any, is_reduced_now: bool) -> Any:
        """The value of a step: with those of the batch's earlier parts, and of the other ranks, where asked for."""
        part = self._context.part
        if part is not None and entry.on_step:
            value = join_part(entry, value, *part)
        if is_reduced_now:
            # collective
            value = self.strategy.reduce(torch.as_tensor(value), entry.reduction)
        return value

    def _entry(
        self,
        name: str,
        value: Any,
        options: LogOptions,
    ) -> LoggedValue:
        """The entry of a name, which is made when the name is first logged in an epoch."""
        context = self._context
        index = context.dataloader_idx
        if index is not None and not options.add_dataloader_idx:
            context.loaders_by_name.setdefault(name, set()).add(index)
            index = None
        entry = context.values.get((name, index))
        if entry is None:
            entry = self._create(name, index, value, options)
            context.values[name, index] = entry
            return entry
        if entry.reduction == CUSTOM:
            entry.reduce_by(options.reduce_fx)
        on_step = options.on_step
        on_epoch = options.on_epoch
        if on_step not in (None, entry.on_step) or on_epoch not in (
            None,
            entry.on_epoch,
        ):
            raise ValueError(
                f"log({name!r}, on_step={on_step}, on_epoch={on_epoch}): it was logged with on_step={entry.on_step}, "
                f"on_epoch={entry.on_epoch} before in this epoch; use another name"
            )
        return entry

    def _create(
        self,
        name: str,
        index: int | None,
        value: Any,
        options: LogOptions,
    ) -> LoggedValue:
        scope = self._context.scope
        if not isinstance(name, str):
            raise TypeError(f"log: name must be a str; got {name!r}")
        if scope is None:
            raise RuntimeError(
                f"log({name!r}) here has no effect: values can be logged in training, validation and test steps and "
                "in the hooks from on_train_start (on_validation_start, on_test_start) to the end of an epoch"
            )
        is_train_step = scope == "batch" and self._context.stage == "train"
        on_step = is_train_step if options.on_step is None else options.on_step
        on_epoch = not is_train_step if options.on_epoch is None else options.on_epoch
        if on_step and scope != "batch":
            raise ValueError(
                f"log({name!r}, on_step=True): this is no step; use on_epoch=True"
            )
        if not on_step and not on_epoch:
            raise ValueError(
                f"log({name!r}, on_step=False, on_epoch=False) would keep nothing; set one of them"
            )
        reduction, function = _reduction_of(name, options, on_step)
        return LoggedValue(
            name,
            index,
            options.prog_bar,
            options.logger is not False,
            on_step,
            on_epoch,
            reduction,
            metric=self._find_metric(name, value) if is_metric(value) else None,
            rank_zero_only=options.rank_zero_only,
            function=function,
        )

    def _find_metric(
        self,
        name: str,
        metric: Any,
    ) -> str:
        """The name of a ``Metric`` among the module's submodules."""
        assert self.module is not None, "a run has a module"
        for path, module in self.module.named_modules():
            if module is metric:
                return path
        raise ValueError(
            f"log({name!r}): the {type(metric).__name__} must be an attribute of the module (in an nn.ModuleList or "
            "nn.ModuleDict if there are several), or a checkpoint would miss its state"
        )

    def _tensor(
        self,
        entry: LoggedValue,
        value: Tensor,
        keep_graph: bool,
    ) -> Tensor:
        """The tensor to keep: a copy, as the step may change its own tensor in place afterwards."""
        if value.numel() != 1:
            raise ValueError(
                f"log({entry.name!r}): the tensor must have one element; got shape {tuple(value.shape)}"
            )
        if not keep_graph:
            value = value.detach()
            last = entry.value
            is_read_later = entry.on_epoch or self._context.part is not None
            if (
                is_read_later
                or type(last) is not Tensor
                or last.dtype != value.dtype
                or value.dim()
            ):
                value = value.clone()
            else:
                # Nobody reads the last one any more: its memory is used again, and none allocated in each step.
                value = last.copy_(value)
        return value.squeeze() if value.dim() else value

    def copy_values(self) -> dict[Any, LoggedValue]:
        """The running stage's values as they are, for :meth:`restore_values`."""
        return {
            key: replace(
                entry,
                pending=[*entry.pending],
                pending_weights=[*entry.pending_weights],
            )
            for key, entry in self._context.values.items()
        }

    def restore_values(self, values: dict[Any, LoggedValue]) -> None:
        """Forget what was logged since :meth:`copy_values`."""
        self._context.values.clear()
        self._context.values.update(values)

    def step_results(self) -> Results:
        """The last values of the running stage's steps."""
        return self._last_values(self._context.values)

    def step_row(self) -> State:
        """Copies of what the running loader's steps have logged for the loggers."""
        index = self._context.dataloader_idx
        values = {
            key: entry
            for key, entry in self._context.values.items()
            if entry.on_step and entry.dataloader_idx == index
        }
        return as_tensors(self._last_values(values).logged) if values else {}

    def _last_values(self, values: dict[Any, LoggedValue]) -> Results:
        results = Results()
        for entry in values.values():
            value = entry.value
            if entry.metric is not None:
                value = getattr(value, "_forward_cache", None)
            if entry.on_step and value is not None:
                self._show(results, entry, value, of_step=True)
        return results

    def current(self) -> Results:
        """The newest value of each name that was logged in the run."""
        results = Results()
        results.update(self.results)
        if self._context.stage != "train":
            # It may be a validation inside a training epoch.
            results.update(self._last_values(self.stages.get("train", {})))
        results.update(self.step_results())
        return results

    def reduce_epoch(self) -> None:
        """Reduce the running stage's epoch values and show them. More can be logged afterwards. A collective."""
        results = self.epoch_results
        self.results.update(self.step_results())
        due = []
        for entry in self._context.values.values():
            if entry.on_epoch and not entry.reduced:
                due.append(entry)
        if self.strategy.world_size > 1:
            due = agree_on_entries(
                self.strategy, self.module, self._context, due, self._only_restored(due)
            )
        numbers = [entry for entry in due if entry.metric is None]
        for entry, value in reduce_entries(self.strategy, numbers):
            self._show(results, entry, value)
        for entry in due:
            if entry.metric is not None and entry.value is not None:
                self._show(results, entry, entry.value.compute())
            entry.mark_reduced()
        self.results.update(results)

    def _only_restored(self, due: list[LoggedValue]) -> set[Any]:
        """Which of these a checkpoint has brought, and this program has not logged since."""
        if self._context.stage != "train":
            return set()
        restored = self._restored
        self._restored = {}
        unchanged = set()
        for entry in due:
            value, num_pending = restored.get(entry.key, (entry, 0))
            if entry.value is value and len(entry.pending) == num_pending:
                unchanged.add(entry.key)
        return unchanged

    def end_epoch(self) -> Results:
        """Reduce what came since :meth:`reduce_epoch`, give all values of the epoch, and drop them. A collective."""
        self.reduce_epoch()
        results = self.epoch_results
        self.epoch_results = Results()
        self.discard()
        self._context.enter_scope(None)
        return results

    def discard(self) -> None:
        """Drop the running stage's values, and reset its torchmetrics."""
        values = self._context.values
        for entry in values.values():
            if entry.metric is not None and entry.value is not None:
                entry.value.reset()
        values.clear()

    def _show(
        self,
        results: Results,
        entry: LoggedValue,
        value: Any,
        of_step: bool = False,
    ) -> None:
        """Show an entry's value; where a metric computes a dict, each of its values under a name of its own."""
        if isinstance(value, dict):
            for key, part in value.items():
                self._show_part(results, entry, key, part, of_step)
            return
        if not is_number(value):
            raise ValueError(
                f"The `compute()` return of the metric logged as {entry.name!r} must be a tensor of one element; got "
                f"{describe(value)}: at the epoch's end, log what you want of it by self.log or self.log_dict"
            )
        step_name, epoch_name = entry.names()
        results.add(entry, step_name if of_step else epoch_name, value)
        if entry.on_step and entry.on_epoch:
            results.callback[entry.name] = value

    def _show_part(
        self,
        results: Results,
        entry: LoggedValue,
        key: str,
        part: Any,
        of_step: bool,
    ) -> None:
        name = f"{entry.name}_{key}"
        loaders_by_name = self._context.loaders_by_name
        if entry.name in loaders_by_name:
            loaders_by_name[name] = loaders_by_name[entry.name]
        if is_number(part) or isinstance(part, dict):
            self._show(results, replace(entry, name=name), part, of_step)
        elif name not in self._left_out and self.strategy.is_global_zero:
            self._left_out.add(name)
            log.warning(
                "log(%r): %r is left out, as it is no number: %s",
                entry.name,
                key,
                describe(part),
            )

    def by_loader(
        self,
        results: Results,
        count: int,
    ) -> list[dict[str, float]]:
        """An evaluation's values for each of ``count`` loaders; what belongs to no loader stands in each."""
        loaders_of = {}
        for name, loaders in self._context.loaders_by_name.items():
            for shown in (name, f"{name}_step", f"{name}_epoch"):
                loaders_of[shown] = loaders
        by_loader: list[dict[str, float]] = [{} for _ in range(count)]
        for name, value in as_floats(results.callback).items():
            for index in range(count):
                if "/dataloader_idx_" in name:
                    belongs = name.endswith(f"/dataloader_idx_{index}")
                else:
                    belongs = index in loaders_of.get(name, (index,))
                if belongs:
                    by_loader[index][name] = value
        return by_loader

    def forget(self) -> None:
        """Drop everything, as after a sanity check."""
        self.results = Results()
        self.epoch_results = Results()
        self.stages.clear()
        self.enter(None, None)

    def state_dict(self) -> State:
        """The values of the running training epoch, and the results of the stages that have ended."""
        values = []
        for entry in self.stages.get("train", {}).values():
            state = {
                **vars(entry),
                "pending": list(entry.pending),
                "pending_weights": list(entry.pending_weights),
                "function": None,
            }
            if entry.metric is not None:
                state["value"] = None
            values.append(state)
        results = {key: dict(value) for key, value in vars(self.results).items()}
        return {"train": values, "results": results}

    def load_state_dict(self, state: State) -> None:
        """Take back :meth:`state_dict`."""
        # The values to come will be there, too.
        device = self.strategy.device
        train = self.stages.setdefault("train", {})
        train.clear()
        self._restored.clear()
        for values in state["train"]:
            entry = LoggedValue(**map_tensors(values, lambda tensor: tensor.to(device)))
            entry.find_metric_in(self.module)
            train[entry.key] = entry
            if entry.metric is None:
                self._restored[entry.key] = entry.value, len(entry.pending)
        self.results = Results(
            **{key: dict(value) for key, value in state["results"].items()}
        )


def _reduction_of(name: str, options: LogOptions, on_step: bool) -> tuple[str, Any]:
    """How an epoch's values become one: the reduction's name and, if that is custom, its function.

    Raises:
        ValueError: if there is no such reduction, or it is none for values of steps.
    """
    reduction: Any = options.reduce_fx
    reduction = REDUCTION_FUNCTIONS.get(reduction, reduction)
    if reduction in REDUCTIONS:
        return reduction, None
    if not callable(reduction):
        raise ValueError(
            f"log({name!r}): reduce_fx must be one of {', '.join(REDUCTIONS)}, or a function of a tensor with the "
            f"values of the epoch; got {reduction!r}"
        )
    if options.sync_dist and on_step:
        raise ValueError(
            f"log({name!r}, sync_dist=True): values of steps are reduced by {', '.join(REDUCTIONS)} only, and "
            f"reduce_fx is {reduction!r}"
        )
    return CUSTOM, reduction


def _deferrable(name: str, value: Any, options: LogOptions) -> Any:
    """A copy of a value of a compiled step: the step's graph is gone when it is logged, and may change its own tensor.

    Raises:
        ValueError: for a value that cannot be logged then.
    """
    if options.enable_graph:
        raise ValueError(
            f"log({name!r}, enable_graph=True): a compiled step keeps no graph"
        )
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(f"log({name!r}): the tensor must have one element")
    return value.detach().clone()
