"""What ``self.log`` keeps: tensors on their device, reduced over steps and processes, read only when needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.batches import batch_size_of, map_tensors
from ..messages import log
from .metric_state import fill_list_states, is_metric
from .values import (
    REDUCTION_FUNCTIONS,
    REDUCTIONS,
    LoggedValue,
    Results,
    as_floats,
    as_number,
    described,
    is_number,
    join_values,
)

if TYPE_CHECKING:
    from ...strategies.base import Strategy


class Metrics:
    """All that a run logs.

    Attributes:
        results: the epoch values of the stages that have ended, and their last step values.
        moment: ``"batch"``, ``"epoch"`` or None: what the loop is in, which sets the defaults of ``log``.
        module: the running module, whose torchmetrics may be logged.
        batch: the batch in work, whose first dimension weights epoch means.
        dataloader_idx: index of the evaluation loader in work, if there are several.
        is_dummy: the batch in work is a dummy, which only keeps this rank in step: what is logged of it does not count.
        part: while a batch is run in parts, the running one's fraction of the samples, and whether it is the first.
        without_batch: the evaluation loaders that gave this process no batch, by index; None if there is only one.
        logged_in: for names that were logged with ``add_dataloader_idx=False``, the evaluation loaders they belong to.
        left_out: values of metrics that a line has said to be no numbers.
    """

    def __init__(self, strategy: Strategy, enabled: bool = True) -> None:
        self.strategy = strategy
        self.enabled = enabled
        self.module: torch.nn.Module | None = None
        self.results = Results()
        self.epoch_results = (
            Results()
        )  # of the running epoch or evaluation, once it is reduced
        self.stages: dict[str, dict[Any, LoggedValue]] = {}
        self.stage: str | None = None
        self.values: dict[Any, LoggedValue] = {}  # those of the stage
        self.moment: str | None = None
        self.batch: Any = None
        self._sized: Any = None  # the batch whose size was found last
        self._size = 1
        self.dataloader_idx: int | None = None
        self.is_dummy = False
        self.part: tuple[float, bool] | None = None
        self.without_batch: set[int | None] = set()
        self.logged_in: dict[str, set[int]] = {}
        self.left_out: set[str] = set()

    def begin_run(self, module: torch.nn.Module, keeps_bar: bool) -> None:
        """Log for another run.

        Args:
            module: what runs.
            keeps_bar: whether the progress bar goes on to show what the last run logged for it.
        """
        self.module = module
        if not keeps_bar:
            self.results.progress_bar.clear()

    def take(self, results: Results) -> None:
        """Show what was logged in another process."""
        self.results = results

    def begin_batch(self, batch: Any, is_dummy: bool = False) -> None:
        """Log for this batch from now on; of a dummy, nothing counts."""
        self.batch = batch
        self.is_dummy = is_dummy

    def begin_part(self, part: Any, place: tuple[float, bool] | None) -> None:
        """Log for a part of a batch; ``place`` is its fraction of the samples, and whether it is the first."""
        self.batch = part
        self.part = place

    def begin_loader(self, dataloader_idx: int | None) -> None:
        """Log for this evaluation loader from now on; None if there is only one."""
        self.dataloader_idx = dataloader_idx

    def forget_empty_loaders(self) -> None:
        """Begin with the first of the evaluation loaders."""
        self.without_batch = set()

    def note_empty_loader(self) -> None:
        """Note that the evaluation loader that has ended gave this rank no batch."""
        self.without_batch.add(self.dataloader_idx)

    def begin_batches(self) -> None:
        """What is logged from now on is of a step."""
        self.moment = "batch"

    def end_batches(self) -> None:
        """What is logged from now on is of the epoch."""
        self.moment = "epoch"

    def end_logging(self) -> None:
        """Nothing can be logged from now on."""
        self.moment = None

    def enter(
        self, stage: str | None, moment: str | None
    ) -> tuple[str | None, str | None]:
        """Begin to log for ``stage``; returns what to enter again afterwards."""
        before = self.stage, self.moment
        self.is_dummy = False
        self._sized = None
        if stage is None:
            self.without_batch = set()
        else:
            self.logged_in = {}
        self.stage, self.moment = stage, moment
        self.values = self.stages.setdefault(stage, {}) if stage is not None else {}
        return before

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool,
        logger: bool | None,
        on_step: bool | None,
        on_epoch: bool | None,
        reduce_fx: str | Callable[..., Any],
        enable_graph: bool,
        sync_dist: bool | None,
        add_dataloader_idx: bool,
        batch_size: int | None,
        rank_zero_only: bool,
    ) -> None:
        """Keep a value; arguments as of ``Module.log``."""
        if rank_zero_only and is_metric(value) and self.strategy.world_size > 1:
            raise ValueError(
                f"log({name!r}, rank_zero_only=True): a torchmetrics Metric is computed by all processes"
            )
        if not self.enabled or (rank_zero_only and self.strategy.global_rank != 0):
            return
        index = self.dataloader_idx
        if index is not None and not add_dataloader_idx:
            self.logged_in.setdefault(name, set()).add(index)
            index = None
        entry = self.values.get((name, index))
        if entry is None:
            entry = self._create(
                name, index, value, prog_bar, logger, on_step, on_epoch, reduce_fx
            )
            entry.rank_zero_only = rank_zero_only
        elif on_step not in (None, entry.on_step) or on_epoch not in (
            None,
            entry.on_epoch,
        ):
            raise ValueError(
                f"log({name!r}, on_step={on_step}, on_epoch={on_epoch}): it was logged with on_step={entry.on_step}, "
                f"on_epoch={entry.on_epoch} before in this epoch; use another name"
            )
        reduces_now = (
            sync_dist and not rank_zero_only and entry.on_step and self.stage == "train"
        )
        if self.is_dummy:
            self._take_part(entry, value, bool(reduces_now))
            return
        entry.reduced = False
        if isinstance(value, Tensor):
            value = self._tensor(entry, value, enable_graph)
        elif entry.metric is not None:
            entry.value = value
            return
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            value = as_number(name, value)
        self._keep_step(entry, value, bool(reduces_now))
        if entry.on_epoch:
            entry.add(
                value,
                1.0 if entry.reduction != "mean" else self._weight(name, batch_size),
            )

    def _take_part(self, entry: LoggedValue, value: Any, reduces_now: bool) -> None:
        """Log of a dummy batch: it counts nothing, and the others wait for it where they reduce."""
        if entry.metric is not None and entry.value is None:
            entry.value = value
        if reduces_now and self.strategy.world_size > 1:
            self.strategy.reduce(
                torch.as_tensor(value).detach(), entry.reduction
            )  # collective

    def _tensor(self, entry: LoggedValue, value: Tensor, keep_graph: bool) -> Tensor:
        """The tensor to keep: a copy, as what the step does to its own afterwards is not logged."""
        if value.numel() != 1:
            raise ValueError(
                f"log({entry.name!r}): the tensor must have one element; got shape {tuple(value.shape)}"
            )
        if not keep_graph:
            value, last = value.detach(), entry.value
            is_read_later = entry.on_epoch or self.part is not None
            if (
                is_read_later
                or type(last) is not Tensor
                or last.dtype != value.dtype
                or value.dim()
            ):
                value = value.clone()
            else:
                value = last.copy_(value)  # into the same memory
        return value.squeeze() if value.dim() else value

    def _keep_step(self, entry: LoggedValue, value: Any, reduces_now: bool) -> None:
        """Keep the value of a step: of a part of a batch together with those before."""
        if self.part is not None and entry.on_step:
            value = join_values(entry, value, *self.part)
        if reduces_now and self.strategy.world_size > 1:
            value = self.strategy.reduce(
                torch.as_tensor(value), entry.reduction
            )  # collective, asked for
        entry.value = value

    def _create(
        self, name: str, index: int | None, value: Any, prog_bar: bool, logger: bool | None, on_step: bool | None,
        on_epoch: bool | None, reduce_fx: Any,
    ) -> LoggedValue:  # fmt: skip
        if not isinstance(name, str):
            raise TypeError(f"log: name must be a str; got {name!r}")
        if self.moment is None:
            raise RuntimeError(
                f"log({name!r}) here has no effect: values can be logged in training, validation and test steps and "
                "in the hooks from on_train_start (on_validation_start, on_test_start) to the end of an epoch"
            )
        in_train_batch = self.moment == "batch" and self.stage == "train"
        on_step = in_train_batch if on_step is None else on_step
        on_epoch = not in_train_batch if on_epoch is None else on_epoch
        if on_step and self.moment != "batch":
            raise ValueError(
                f"log({name!r}, on_step=True): this is no step; use on_epoch=True"
            )
        if not on_step and not on_epoch:
            raise ValueError(
                f"log({name!r}, on_step=False, on_epoch=False) would keep nothing; set one of them"
            )
        reduction = (
            reduce_fx
            if isinstance(reduce_fx, str)
            else REDUCTION_FUNCTIONS.get(reduce_fx)
        )
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"log({name!r}): reduce_fx must be one of {', '.join(REDUCTIONS)}; got {reduce_fx!r}"
            )
        metric = self._find_metric(name, value) if is_metric(value) else None
        entry = LoggedValue(
            name,
            index,
            prog_bar,
            logger is not False,
            on_step,
            on_epoch,
            reduction,
            metric=metric,
        )
        self.values[name, index] = entry
        return entry

    def _find_metric(self, name: str, metric: Any) -> str:
        assert self.module is not None
        for path, module in self.module.named_modules():
            if module is metric:
                return path
        raise ValueError(
            f"log({name!r}): the {type(metric).__name__} must be an attribute of the module (in an nn.ModuleList or "
            "nn.ModuleDict if there are several), or a checkpoint would miss its state"
        )

    def _weight(self, name: str, batch_size: int | None) -> float:
        if batch_size is not None:
            return batch_size
        if self.moment != "batch" or self.batch is None:
            return 1
        if self._sized is not self.batch:
            try:
                self._size, self._sized = batch_size_of(self.batch), self.batch
            except ValueError as error:
                raise ValueError(
                    f"log({name!r}): an epoch's mean is weighted by batch size, and {error}; pass batch_size=… to log"
                ) from None
        return self._size

    def copies(self) -> dict[Any, LoggedValue]:
        """The running stage's values as they are, for :meth:`put_back`."""
        return {
            key: replace(
                entry,
                pending=[*entry.pending],
                pending_weights=[*entry.pending_weights],
            )
            for key, entry in self.values.items()
        }

    def put_back(self, copies: dict[Any, LoggedValue]) -> None:
        """Forget what was logged since :meth:`copies`."""
        self.values.clear()
        self.values.update(copies)

    # -- reading ----------------------------------------------------------------------------------------------

    def step_results(self, stage: str | None = None) -> Results:
        """The last values of a stage's steps; by default of the running one."""
        results = Results()
        values = self.values if stage is None else self.stages.get(stage, {})
        for entry in values.values():
            if entry.on_step and entry.value is not None:
                value = (
                    getattr(entry.value, "_forward_cache", None)
                    if entry.metric is not None
                    else entry.value
                )
                if value is not None:
                    self._show(results, entry, value, of_step=True)
        return results

    def current(self) -> Results:
        """Everything that is known now."""
        results = Results()
        results.update(self.results)
        if self.stage != "train":  # validation inside a training epoch
            results.update(self.step_results("train"))
        results.update(self.step_results())
        return results

    def reduce_epoch(self) -> None:
        """Reduce the running stage's epoch values and show them; they can still be added to."""
        results = self.epoch_results
        self.results.update(self.step_results())
        due = [
            entry
            for entry in self.values.values()
            if entry.on_epoch and not entry.reduced
        ]
        if self.strategy.world_size > 1:
            due = self._agree(due)
        for entry, total, weight in self._reduce(
            [(e, *e.folded()) for e in due if e.metric is None]
        ):
            self._show(
                results,
                entry,
                total / weight if entry.reduction == "mean" and weight else total,
            )
        for entry in due:
            if entry.metric is not None and entry.value is not None:
                self._show(results, entry, entry.value.compute())
            entry.reduced = True
        self.results.update(results)

    def end_epoch(self) -> Results:
        """Reduce what has come since :meth:`reduce_epoch`; return all values of the epoch, and begin anew."""
        self.reduce_epoch()
        results, self.epoch_results = self.epoch_results, Results()
        self.discard()
        return results

    def discard(self) -> None:
        """Drop the running stage's values, and reset its torchmetrics."""
        for entry in self.values.values():
            if entry.metric is not None and entry.value is not None:
                entry.value.reset()
        self.values.clear()

    def _agree(self, due: list[LoggedValue]) -> list[LoggedValue]:
        """The entries that all processes are about to reduce, in one order. A collective.

        A process that had no batch takes part in what the others logged, with nothing.

        Raises:
            RuntimeError: if a process that had batches did not log what another one did; on all of them.
        """
        own = {entry.key: entry for entry in due if not entry.rank_zero_only}
        entries = {
            key: (entry.facts(), entry.list_states()) for key, entry in own.items()
        }
        by_rank = self.strategy.gather_objects(
            (self.without_batch, entries, self.logged_in)
        )
        for _, _, logged_in in by_rank:
            for name, loaders in logged_in.items():
                self.logged_in[name] = self.logged_in.get(name, set()) | loaders
        logged = [entries for _, entries, _ in by_rank]
        known = {
            key: facts
            for entries in reversed(logged)
            for key, (facts, _) in entries.items()
        }
        for key in known:
            self._require_everywhere(
                key, logged, [without_batch for without_batch, _, _ in by_rank]
            )
        agreed = []
        for key in sorted(known, key=repr):
            entry = own.get(key) or self._entry_of_others(key, known[key])
            if entry.metric is not None:
                fill_list_states(
                    entry.value,
                    [entries[key][1] for entries in logged if key in entries],
                )
            agreed.append(entry)
        return [*agreed, *(entry for entry in due if entry.rank_zero_only)]

    def _require_everywhere(
        self, key: Any, logged: list[dict[Any, Any]], without_batch: list[Any]
    ) -> None:
        """Raise if a rank that had batches did not log what another one did."""
        lacking = [rank for rank, entries in enumerate(logged) if key not in entries]
        if all(without_batch[rank] for rank in lacking):
            return
        having = [rank for rank, entries in enumerate(logged) if key in entries]
        names = "; ".join(
            f"rank {rank} logged {_names(entries)}"
            for rank, entries in enumerate(logged)
        )
        raise RuntimeError(
            f"log({key[0]!r}) was called on rank {_listed(having)} and not on rank {_listed(lacking)} in this "
            f"{self.stage} epoch ({names}). Epoch values are reduced over all processes: log the same names on "
            "all of them, or pass rank_zero_only=True to keep rank 0's own"
        )

    def _entry_of_others(self, key: Any, facts: dict[str, Any]) -> LoggedValue:
        """An entry for what only other processes have logged."""
        entry = self.values[key] = LoggedValue(*key, **facts)
        if entry.metric is not None:
            assert self.module is not None
            entry.value = self.module.get_submodule(entry.metric)
        return entry

    def _reduce(self, totals: list[Any]) -> Iterable[Any]:
        """Reduce over processes, in one collective."""
        several = self.strategy.world_size > 1
        shared = [item for item in totals if several and not item[0].rank_zero_only]
        own = [item for item in totals if not several or item[0].rank_zero_only]
        yield from (item for item in own if item[1] is not None)
        if not shared:
            return
        device = self.strategy.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        nothing = {"min": torch.inf, "max": -torch.inf}
        rows = []
        for entry, total, weight in shared:
            total = nothing.get(entry.reduction, 0.0) if total is None else total
            rows.append(
                torch.stack(
                    [
                        torch.as_tensor(n, dtype=dtype, device=device)
                        for n in (total, weight)
                    ]
                )
            )
        everywhere = self.strategy.all_gather(
            torch.stack(rows)
        )  # (world_size, entries, 2)
        weights = everywhere[:, :, 1].sum(0).tolist()
        for (entry, _, _), column, weight in zip(
            shared, everywhere[:, :, 0].unbind(1), weights, strict=True
        ):
            yield (
                entry,
                {"min": column.amin, "max": column.amax}.get(
                    entry.reduction, column.sum
                )(),
                weight,
            )

    def _show(
        self, results: Results, entry: LoggedValue, value: Any, of_step: bool = False
    ) -> None:
        """Show an entry's value; the values of a metric that computes a dict each under a name of its own."""
        if isinstance(value, dict):
            for key, part in value.items():
                name = f"{entry.name}_{key}"
                if entry.name in self.logged_in:
                    self.logged_in[name] = self.logged_in[entry.name]
                if is_number(part) or isinstance(part, dict):
                    self._show(results, replace(entry, name=name), part, of_step)
                elif name not in self.left_out and self.strategy.is_global_zero:
                    self.left_out.add(name)
                    log.warning(
                        "log(%r): %r is left out, as it is no number: %s",
                        entry.name,
                        key,
                        described(part),
                    )
            return
        if not is_number(value):
            raise ValueError(
                f"log({entry.name!r}): the metric computed {described(value)}, which is no number: at the epoch's "
                "end, take what you want to log from metric.compute(), and log it by self.log or self.log_dict"
            )
        results.add(entry, entry.names()[0 if of_step else 1], value)
        if entry.on_step and entry.on_epoch:
            results.callback[entry.name] = value

    def by_loader(self, results: Results, count: int) -> list[dict[str, float]]:
        """An evaluation's values for each of ``count`` loaders; what was logged for no loader stands in each."""
        loaders_of = {
            shown: loaders
            for name, loaders in self.logged_in.items()
            for shown in (name, f"{name}_step", f"{name}_epoch")
        }

        def belongs(name: str, index: int) -> bool:
            if "/dataloader_idx_" in name:
                return name.endswith(f"/dataloader_idx_{index}")
            return index in loaders_of.get(name, (index,))

        values = as_floats(results.callback)
        return [
            {n: v for n, v in values.items() if belongs(n, i)} for i in range(count)
        ]

    def forget(self) -> None:
        """Drop everything, as after a sanity check."""
        self.results = Results()
        self.stages.clear()
        self.enter(None, None)

    # -- state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The running training epoch's values, and the results of the stages that ended."""
        values = [
            {
                **vars(entry),
                "value": None if entry.metric is not None else entry.value,
                "pending": list(entry.pending),
                "pending_weights": list(entry.pending_weights),
            }
            for entry in self.stages.get("train", {}).values()
        ]
        return {
            "train": values,
            "results": {key: dict(value) for key, value in vars(self.results).items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back :meth:`state_dict`."""
        device = self.strategy.device  # where the values to come will be
        entries = [
            LoggedValue(**map_tensors(values, lambda tensor: tensor.to(device)))
            for values in state["train"]
        ]
        for entry in entries:
            if entry.metric is not None:
                assert self.module is not None
                entry.value = self.module.get_submodule(entry.metric)
        train = self.stages.setdefault("train", {})
        train.clear()
        train.update({(entry.name, entry.dataloader_idx): entry for entry in entries})
        self.results = Results(
            **{key: dict(value) for key, value in state["results"].items()}
        )


def _names(entries: Iterable[tuple[str, int | None]]) -> str:
    return ", ".join(sorted({repr(name) for name, _ in entries})) or "nothing"


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
