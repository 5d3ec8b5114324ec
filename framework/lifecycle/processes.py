"""A run in processes that are started for it, and how what came of it gets back."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cloudpickle
import torch
from torch import nn
from torch.optim import Optimizer

from ...strategies.launch.environment import detect_environment
from ...strategies.launch.launcher import call_in_processes, can_rerun, rerun_script
from ...strategies.tensor_shards import full_state
from ..arguments import check_count
from ..data.device_input import move_batch
from ..datamodule import DataHooks
from ..engine.engine import Engine
from ..loop import weight_sets
from ..loop.run import FitState, Run, RunRequest
from ..messages import configure
from ..seed import rng_state, set_rng_state
from .signals import Signals

if TYPE_CHECKING:
    from ..checkpoint.schema import RunState
    from ..metrics.values import Results
    from ..trainer import Trainer


def launch(
    function: Callable[..., Any],
    args: tuple[Any, ...] = (),
    num_processes: int | None = None,
) -> Any:
    """Call a function that makes an :class:`~loopwright.framework.Engine` in several processes, as from a notebook.

    In a process that a launcher has started already, the function is just called.

    Args:
        function: may be defined in a notebook; it and its arguments are sent by cloudpickle.
        args: its arguments.
        num_processes: how many (default: the accelerators of this machine, or 1).

    Returns:
        What it returned in the main process.

    Raises:
        TypeError: if something cannot be pickled.
        RuntimeError: if a process died or hung; with the rank that did first, and what is known of it.
        BaseException: what the process that failed first has raised, caused by such a RuntimeError with its traceback.
    """
    check_count("num_processes", num_processes, 1, (None,))
    count = num_processes or max(1, torch.accelerator.device_count())
    if detect_environment() is not None or count == 1:
        return function(*args)
    return call_in_processes(_portable_result, (function, args), count)


def _portable_result(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return move_batch(function(*args), torch.device("cpu"))


def run_in_processes(
    trainer: Trainer, request: RunRequest, execute: Callable[..., Any]
) -> Any:
    """Run in one process for each device, either by running this program again in each, or in fresh ones.

    In a notebook, say, the program cannot be run again. Then Trainer and request are sent to fresh processes, and what
    the run has changed there is sent back.

    Args:
        trainer: whose run it is.
        request: what was asked of it.
        execute: runs it there, given the Trainer and the request.

    Returns:
        What the main process's run returned.
    """
    num_processes = trainer.world_size
    # This does not return: it leaves with the exit code of the job.
    max_restarts = trainer.strategy.group.max_restarts
    if can_rerun():
        rerun_script(num_processes, max_restarts)
    # Drawn here, in the process that the user has seeded.
    trainer.state.draw_seed()
    trainer.use_callbacks_of(request.module)
    arguments = (execute, trainer, request, rng_state())
    result: RunResult = call_in_processes(
        _run_here, arguments, num_processes, max_restarts
    )
    result.apply(trainer, request)
    return result.returned


def _run_here(
    execute: Callable[..., Any],
    trainer: Trainer,
    request: RunRequest,
    rng: dict[str, Any],
) -> RunResult | None:
    """Do the run in a fresh process; what is returned goes back to the user's, and is None but on the main rank."""
    configure()
    set_rng_state(rng)
    trainer.engine.detect_environment()
    returned = execute(trainer, request)
    return RunResult.of(trainer, returned)


@dataclass
class RunResult:
    """What a run has changed, in another process.

    Attributes:
        returned: what it returned.
        weights: the module's state.
        buffers: all of its buffers, those too that are no part of the state.
        modules: attributes of its submodules, pickled, by the submodules' names.
        callbacks: each callback's class and attributes, pickled.
        loggers: each logger's attributes, pickled.
        state: the counters.
        results: what was logged last.
        fit: what the next fit goes on from: what was configured, states and gathered values; None without a fit.
        ckpt_path: the checkpoint that was read, if one was asked for.
        record: the folder of the run's record, if it keeps one.
        rng: the random generators.
    """

    returned: Any
    weights: dict[str, Any]
    buffers: dict[str, torch.Tensor]
    modules: dict[str, dict[str, bytes]]
    callbacks: list[tuple[type, dict[str, bytes]]]
    loggers: list[dict[str, bytes]]
    state: RunState
    results: Results
    fit: dict[str, Any] | None
    ckpt_path: str | None
    record: str | None
    rng: dict[str, Any]

    @classmethod
    def of(cls, trainer: Trainer, returned: Any) -> RunResult | None:
        """What the run has changed here, its tensors on the CPU; None but on the main rank. A collective."""
        strategy = trainer.strategy
        module = trainer.module
        weight_sets.gather(trainer.run)
        weights = full_state(strategy, strategy.model_state())
        fit = None
        last = trainer.last_fit
        if last is not None and last.step is not None:
            fit = {
                "configured": last.configured,
                "optimization": full_state(strategy, last.states()),
                "unfinished": last.unfinished,
            }
        if not trainer.is_global_zero:
            return None
        changed = {
            "returned": returned,
            "weights": weights,
            "buffers": dict(module.named_buffers()),
            "modules": {n: _portable(part) for n, part in module.named_modules()},
            "callbacks": [(type(c), _portable(c)) for c in trainer.callbacks],
            "loggers": [_portable(logger) for logger in trainer.loggers],
            "state": trainer.state,
            "results": trainer.metrics.results,
            "fit": fit,
            "ckpt_path": trainer.ckpt_path,
            "record": trainer.record_dir,
            "rng": rng_state(),
        }
        return cls(**move_batch(changed, torch.device("cpu")))

    def apply(self, trainer: Trainer, request: RunRequest) -> None:
        """Change the objects of this process as the run has changed its copies of them."""
        module = request.module
        engine = trainer.engine
        if module.state_dict().keys() != self.weights.keys():
            # The layers that it makes have been made in the other process only.
            with engine.precision.init_context():
                module.configure_model()
        engine.precision.convert_module(module)
        module.load_state_dict(self.weights)
        for name, buffer in module.named_buffers():
            buffer.data = self.buffers[name].to(buffer.device, copy=True)
        for name, part in module.named_modules():
            _set_attributes(part, self.modules.get(name, {}))
        for callback, saved in zip(trainer.callbacks, self.callbacks, strict=True):
            kind, attributes = saved
            if type(callback).__qualname__ == kind.__qualname__:
                _set_attributes(callback, attributes)
        for logger, attributes in zip(trainer.loggers, self.loggers, strict=True):
            _set_attributes(logger, attributes)
        trainer.run = run = Run(trainer, request, Signals(trainer))
        module.trainer = trainer
        trainer.state.take(self.state)
        trainer.metrics.begin_run(module, keeps_bar=True)
        trainer.metrics.take(self.results)
        trainer.record.take(self.record)
        if self.ckpt_path is not None:
            run.resume_from(self.ckpt_path)
        if self.fit is not None:
            trainer.last_fit = FitState(module, **self.fit)
        weight_sets.put_back(run)
        set_rng_state(self.rng)


# Never pickled as part of an attribute: what comes back would be a copy, and no longer the one that others hold.
_STAYS = (nn.Module, nn.Parameter, Optimizer, DataHooks, Engine)


class _AttributePickler(cloudpickle.Pickler):
    """Refuses modules, parameters and the like, and so whatever holds one, such as a Trainer."""

    def persistent_id(self, obj: Any) -> None:
        if isinstance(obj, _STAYS):
            raise pickle.PicklingError(f"{type(obj).__name__} stays where it is")


def _portable(obj: Any) -> dict[str, bytes]:
    """Pickle those attributes of an object that can be sent, such as what a callback has recorded, each by itself."""
    state = obj.__getstate__() if hasattr(obj, "__getstate__") else vars(obj)
    of_torch = vars(nn.Module()) if isinstance(obj, nn.Module) else {}
    pickled = {}
    for name, value in (state or {}).items():
        if name in of_torch:
            continue
        file = io.BytesIO()
        try:
            _AttributePickler(file).dump(value)
        except Exception:
            # An open file, a lock or a part of the module stays in the process that has it.
            continue
        pickled[name] = file.getvalue()
    return pickled


def _set_attributes(obj: Any, attributes: dict[str, bytes]) -> None:
    for name, value in attributes.items():
        vars(obj)[name] = pickle.loads(value)
