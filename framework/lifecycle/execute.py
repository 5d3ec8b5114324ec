"""A run's beginning and end: it is set up, handed to its loop, and taken down, whatever has happened."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from ...callbacks.logging_module import logging_through
from ...loggers.dummy import DummyLogger, LoggerFolders
from ...strategies.launch import failures
from ...strategies.launch.heartbeat import Heartbeat
from ...strategies.launch.malloc import keep_freed_memory
from ...strategies.tensor_shards import full_state
from ..checkpoint.configs import portable
from ..checkpoint.folder_claims import release_folders
from ..data.workers import workers_ended
from ..datamodule import DataModule
from ..engine.compile import compile_submodules, read_compilation
from ..loop import weight_sets
from ..loop.announce import announce_start
from ..loop.automatic import AutomaticStep
from ..loop.closure import ClosureStep, takes_closure
from ..loop.evaluate import evaluate, predict
from ..loop.fit import fit
from ..loop.loaders import limit_name
from ..loop.manual import ManualStep
from ..loop.optimizers import check_schedulers, parse_optimizers
from ..loop.resume import ResumeEpoch
from ..loop.run import Run, RunRequest
from ..messages import log
from ..metrics.metric_state import keep_metrics_local
from ..module import Module
from ..subclasses import call_with_stage, overrides
from .attachment import attached
from .checks import check_optimizers
from .find import read_run
from .place import describe_place
from .processes import run_in_processes
from .rehearsal import NoSignals
from .restarted import (
    forget_loggers,
    keep_loggers,
    name_of_fit,
    numbered,
    read_earlier_attempt,
)
from .resume import Resume
from .signals import Signals

if TYPE_CHECKING:
    from ..trainer import Trainer


def execute(trainer: Trainer, request: RunRequest) -> Any:
    """Do a run: in this process, or in processes that are started for it.

    Args:
        trainer: whose run it is.
        request: what was asked of it.

    Returns:
        None for ``fit``; else what the loop gives, see :mod:`..loop.evaluate`.

    Raises:
        RuntimeError: if the Trainer is running already.
    """
    if trainer.is_running:
        raise RuntimeError(
            f"{request.fn} was called while this Trainer is running {trainer.state.fn}, as in a hook or a step: use "
            f"another Trainer there, such as Trainer(logger=False, enable_checkpointing=False).{request.fn}(module, …)"
        )
    request = trainer.record.take_up(trainer, numbered(request))
    if trainer.engine.must_launch:
        return run_in_processes(trainer, request, execute)
    changes_weights = request.fn == "fit" or request.ckpt_path is not None
    with attached(trainer, request.module, request.datamodule, changes_weights):
        run = begin_run(trainer, request)
        through_module = logging_through(run.module, trainer.callbacks)
        ended = workers_ended(lambda: run.signals.in_a_hurry)
        with ended, through_module, _heartbeat(run), lifecycle(run, request):
            if request.search is not None:
                return request.search(trainer, run.module)
            if request.fn == "fit":
                return fit(run)
            return _evaluate_or_predict(run, request.keep)


def begin_run(trainer: Trainer, request: RunRequest) -> Run:
    """Make the run, which is the Trainer's from now on."""
    trainer.state.begin(request.fn)
    trainer.consensus.begin()
    last_fit = trainer.last_fit
    is_fit = request.fn == "fit"
    if is_fit and last_fit is not None and last_fit.module is not request.module:
        # Another module begins at the beginning.
        trainer.state.forget()
        trainer.last_fit = None
    trainer.use_callbacks_of(request.module)
    name = name_of_fit(trainer, request.number)
    is_replay = trainer.record.is_replay
    signals = NoSignals() if is_replay else Signals(trainer)
    trainer.run = run = Run(trainer, request, signals, name)
    run.metrics.begin_run(request.module, keeps_bar=is_fit)
    if is_fit and request.search is None:
        run.signals.stand_by()
    if is_fit and request.ckpt_path is None and trainer.last_fit is not None:
        unfinished = trainer.last_fit.unfinished
        if unfinished is not None:
            # Go on inside the epoch in which the last fit stopped.
            run.take_up(ResumeEpoch(run, unfinished))
    return run


def _heartbeat(run: Run) -> AbstractContextManager[Any]:
    """Return the context in which it is noticed if the run stands still for too long."""
    if run.record.is_replay:
        # It may wait for whoever looks at it.
        return nullcontext()
    state = run.state
    strategy = run.engine.strategy

    def place(frames: list[FrameType]) -> tuple[str, str]:
        phase, text = describe_place(state, frames)
        # The first batch may take long: workers start, and code is compiled.
        is_first = phase == "train" and state.total_batches == run.first_batch
        return "setup" if is_first else phase, text

    return Heartbeat(
        run.engine.hang_timeout,
        place,
        lambda: (state.epoch, state.batch_idx, state.global_step),
        strategy.global_rank,
        strategy.world_size,
    )


@contextmanager
def lifecycle(run: Run, request: RunRequest) -> Iterator[None]:
    """Set a run up, hand over to its loop, and end it: normally, or with the hooks for an exception."""
    trainer = run.trainer
    state = run.state
    state.start()
    # A hook may have a run of its own, of another Trainer.
    outer = failures.begin_run(partial(describe_place, state))
    # Nobody may ask a logger for its folder yet.
    failures.note_folder(partial(_log_folder, trainer, False))
    try:
        with ExitStack() as contexts:
            _set_autograd(run, contexts)
            contexts.enter_context(keep_metrics_local(run.module, trainer.world_size))
            _set_up(run, request)
            yield
        if run.fn == "fit":
            run.hooks.call("on_fit_end")
        _take_down(run)
        forget_loggers(run)
        state.end("finished")
        state.enter(None)
        _finalize(run, "success")
    except BaseException as error:
        # First of all, while signals are only noted: later, one may end this process at once.
        if run.consensus.signal:
            failures.record_end_by_signal(run.consensus.signal)
        else:
            failures.record_failure(error)
        run.signals.end()
        _fail(run, error)
        run.signals.wait_for_main()
        raise
    finally:
        run.signals.end()
        failures.end_run(outer)
        release_folders(trainer)
        run.loaders.close()
        # It would keep the workers of an epoch that was left until the garbage collector comes, which then waits 5 s.
        run.engine.accumulation.let_go()
        state.enter(None)
        run.metrics.enter(None, None)
    # Signals that came too late for the loop still have to end the program.
    run.signals.send_again()


def _set_autograd(run: Run, contexts: ExitStack) -> None:
    """Set autograd's modes for a run, until ``contexts`` is left."""
    if run.trainer.detect_anomaly:
        contexts.enter_context(torch.autograd.set_detect_anomaly(True))
    # A fit may be called in a hook of an evaluation, which runs without gradients.
    if run.fn == "fit":
        contexts.enter_context(torch.inference_mode(False))
        contexts.enter_context(torch.enable_grad())


def _evaluate_or_predict(run: Run, keep: str) -> list[Any]:
    """Make the loaders, and run the loop of validation, test or prediction on them."""
    trainer = run.trainer
    fn = run.fn
    limit = getattr(trainer, limit_name(fn))
    if not run.loaders.load(fn, limit):
        if limit:
            _note_no_loader(run)
        return []
    most = run.loaders.max_batches[fn]
    if fn != "predict":
        results = evaluate(run, fn, most)
        # Only a validation inside of fit is left for a signal.
        assert results is not None
        return results
    outputs = predict(run, most, keep != "none")
    if keep == "all" and trainer.world_size > 1:
        return run.loaders.in_order("predict", outputs)
    return outputs


def _note_no_loader(run: Run) -> None:
    """Warn that there is nothing to predict; raise where there is nothing to validate or test on."""
    if run.fn == "predict":
        run.warn_once(
            "predict_dataloader returned no loader: there is nothing to predict"
        )
        return
    name = "val" if run.fn == "validate" else "test"
    raise ValueError(
        f"{name}_dataloader returned no loader: there is nothing to {run.fn} on"
    )


# The beginning.


def _set_up(run: Run, request: RunRequest) -> None:
    """Bring the processes together, and the module, its data and its optimizers to where the run begins."""
    trainer = run.trainer
    fn = run.fn
    _set_torch_flags(trainer.deterministic, trainer.benchmark)
    if run.engine.device.type == "cpu" and (
        why_not := keep_freed_memory(trainer.num_devices)
    ):
        run.warn_once(why_not)
    run.engine.connect()
    run.engine.all_call(fn)  # collective
    path = request.ckpt_path
    weights_only = request.weights_only
    checkpoint = read_earlier_attempt(run, path, weights_only)
    if checkpoint is None and path is not None:
        checkpoint = read_run(run, path, weights_only)
    if checkpoint is not None:
        run.take_up(Resume(run, checkpoint))
    if fn == "fit":
        # Before anybody asks a logger for its folder, or for the order of the data: a checkpoint may hold both.
        run.resume.apply_counters()
    _share_with_ranks(run)
    failures.note_folder(partial(_log_folder, trainer, True))
    run.record.begin(run, request.number)
    prepare_data(run)
    call_with_stage(fn, *run.hooks.setup)
    _configure_model(run)
    _detach_last_fit(run)
    if fn == "fit":
        weight_sets.begin(run)
    run.engine.strategy.setup(run.module, run.engine.precision)
    run.resume.apply_weights()
    if fn == "fit":
        _set_up_fit(run)


def _share_with_ranks(run: Run) -> None:
    """Let all ranks draw the data's order from one seed, and know the folders of the main rank's loggers."""
    trainer = run.trainer
    if run.fn == "fit" and trainer.is_global_zero:
        keep_loggers(run)
        for logger in trainer.loggers:
            logger.claim()
    if trainer.world_size == 1:
        return
    strategy = run.engine.strategy
    if run.state.seed is None:
        run.state.share_seed(strategy.broadcast(run.state.draw_seed()))
    # Only the main rank's loggers are asked for their folders, as asking may make a logger begin a run.
    loggers = trainer.loggers if trainer.is_global_zero else ()
    shared = strategy.broadcast([LoggerFolders.of(logger) for logger in loggers])
    if not trainer.is_global_zero:
        trainer.loggers = [DummyLogger(folders) for folders in shared]


def _log_folder(trainer: Trainer, has_begun: bool) -> str:
    """Return the folder for files that tell of a failure; empty if the run writes none."""
    if trainer.barebones or trainer.fast_dev_run or trainer.record.is_replay:
        return ""
    folder = (has_begun and trainer.log_dir) or trainer.default_root_dir
    return folder if "://" in folder else os.path.abspath(folder)


def prepare_data(run: Run) -> None:
    """Call ``prepare_data`` in one process of each machine, and then the data module's ``setup`` in all."""
    for owner, base in ((run.datamodule, DataModule), (run.module, Module)):
        if owner is not None and overrides(owner, "prepare_data", base):
            if run.trainer.local_rank == 0:
                owner.prepare_data()
            run.engine.strategy.barrier()  # collective
    if run.datamodule is not None:
        call_with_stage(run.fn, run.datamodule.setup)


def _configure_model(run: Run) -> None:
    """Let the module make its layers, under the precision and strategy, and compile them if the user says so."""
    trainer = run.trainer
    module = run.module
    precision = run.engine.precision
    with precision.init_context(), run.engine.strategy.init_context(precision):
        module.configure_model()
    # Once more, for submodules that were made just now.
    module.trainer = trainer
    scope, options = read_compilation(trainer.compile)
    if scope == "parts":
        compile_submodules(module, options)
    elif scope == "step" and run.fn == "fit":
        from ..loop.compiled_step import compile_parts, reason_against

        reason = reason_against(run)
        if reason:
            compile_parts(run, options, reason)
        else:
            run.compile_steps(options)


def _detach_last_fit(run: Run) -> None:
    """Take the states out of the last fit's optimizers, where this run takes their module or strategy.

    This comes before the strategy sets up a module, and takes whole tensors, as the new run may shard them otherwise.
    """
    last_fit = run.trainer.last_fit
    if last_fit is None or last_fit.step is None:
        return
    goes_on = run.fn == "fit" and not run.resume.is_from_checkpoint
    if goes_on or last_fit.module is not run.module:
        states = full_state(run.engine.strategy, last_fit.states())
        run.trainer.last_fit = last_fit.detached(states)


def _set_up_fit(run: Run) -> None:
    """Make the optimizers and schedulers, with the states that they go on with."""
    # This fit takes the last one's place at once, and goes on with its states below.
    last_fit = run.trainer.last_fit
    begin_step(run)
    announce_start(run)
    _log_hyperparameters(run)
    run.note_eval_mode()
    run.hooks.call("on_fit_start")
    run.resume.apply_optimizers()
    is_fresh = not run.resume.is_from_checkpoint
    if is_fresh and last_fit is not None and last_fit.configured == run.step.configured:
        run.step.load_state_dict(last_fit.states())


def begin_step(run: Run) -> None:
    """Call ``configure_optimizers``, and train with what it returns from now on."""
    trainer = run.trainer
    module = run.module
    optimizers, schedulers = parse_optimizers(_configure_optimizers(module))
    check_schedulers(optimizers, schedulers)
    check_optimizers(trainer, module, optimizers, schedulers)
    make_step = _choose_step(module, optimizers)
    # Named before the strategy sets them up, as it may replace them by objects of other classes.
    made = [*optimizers, *(config.scheduler for config in schedulers)]
    kinds = [type(item).__name__ for item in made]
    optimizers = run.engine.setup_optimizers(optimizers)
    if make_step is ClosureStep and run.compile_step is not None:
        from ..loop.compiled_step import compile_parts

        reason = "the optimizer, or the module's optimizer_step, takes a closure"
        compile_parts(run, run.compile_step, reason)
    run.begin_fit(make_step(run, optimizers, schedulers, kinds))


def _choose_step(module: Module, optimizers: list[Any]) -> type[Any]:
    """What trains on a batch with these optimizers."""
    if not module.automatic_optimization:
        return ManualStep
    # Several step without a closure, as was checked.
    by_closure = len(optimizers) == 1 and takes_closure(module, optimizers[0])
    return ClosureStep if by_closure else AutomaticStep


def _configure_optimizers(module: Module) -> Any:
    """What the module's hook returns.

    Raises:
        ValueError: if it has no parameters to give to an optimizer.
    """
    try:
        return module.configure_optimizers()
    except ValueError as error:
        if next(module.parameters(), None) is not None:
            raise
        raise ValueError(
            f"configure_optimizers: {type(module).__name__} has no parameters. Layers must be attributes of "
            "it; several of them in an nn.ModuleList or nn.ModuleDict, not in a plain list or dict"
        ) from error


def _log_hyperparameters(run: Run) -> None:
    """Give the loggers of the main rank the hyperparameters, and the module for a drawing of its graph."""
    trainer = run.trainer
    if not trainer.is_global_zero or not trainer.loggers:
        return
    merged: dict[str, Any] = {}
    for owner in (run.module, run.datamodule):
        if owner is not None and owner.logs_hparams:
            hparams = portable(owner.hparams_initial)
            _warn_of_two_values(run, merged, hparams)
            merged.update(hparams)
    # Drawing runs a forward on this rank alone, and under some strategies all ranks have to take part in each.
    draws_graph = (
        not run.engine.strategy.capabilities.needs_equal_forwards
        or trainer.world_size == 1
    )
    for logger in trainer.loggers:
        if merged:
            logger.log_hyperparams(merged)
        if draws_graph:
            logger.log_graph(run.module)


def _warn_of_two_values(
    run: Run, of_module: Mapping[str, Any], of_data: Mapping[str, Any]
) -> None:
    """Say which hyperparameters of the module and of the data have one name and two values."""
    for name in of_module.keys() & of_data.keys():
        # Objects may have no equality of their own.
        first = repr(of_module[name])
        second = repr(of_data[name])
        # A command line notes under names with an underscore how it has made each of the two.
        if first != second and not str(name).startswith("_"):
            run.warn_once(
                f"Loggers get the hyperparameter {name} of the data, {second}; the module's, {first}, has the same "
                "name: give one of them another, or leave it out by save_hyperparameters(ignore=…)"
            )


def _set_torch_flags(deterministic: bool | str | None, benchmark: bool | None) -> None:
    if deterministic is not None:
        warn_only = deterministic == "warn"
        torch.use_deterministic_algorithms(bool(deterministic), warn_only=warn_only)
        if deterministic:
            # Without it, cuBLAS refuses to compute deterministically.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if benchmark is not None:
        if benchmark and deterministic:
            warnings.warn(
                "benchmark=True may choose algorithms that are not deterministic",
                stacklevel=2,
            )
        torch.backends.cudnn.benchmark = benchmark


# The end.


def _take_down(run: Run) -> None:
    """End a run that has come to its end: its hooks, the save that is under way, and the strategy."""
    if run.datamodule is not None:
        call_with_stage(run.fn, run.datamodule.teardown)
    call_with_stage(run.fn, *run.hooks.teardown)
    run.engine.saver.wait()
    run.engine.strategy.teardown()
    if run.fn == "fit":
        weight_sets.end(run)
    # Whatever follows, on any rank, finds the last checkpoint complete. Also, gloo's threads must not hold the last
    # tensors of a run when the interpreter ends, as that aborts the process.
    run.engine.strategy.barrier()  # collective


def _fail(run: Run, error: BaseException) -> None:
    """End a run that an exception has ended: its hooks, and what must not be left behind."""
    strategy = run.engine.strategy
    is_interrupted = isinstance(error, KeyboardInterrupt) or run.consensus.signal
    run.state.end("interrupted" if is_interrupted else "failed")
    # It keeps hooks from collectives: the other processes may be in another one, or gone.
    strategy.group.failed = True
    if run.signals.in_a_hurry:
        run.engine.saver.abandon()
    try:
        run.hooks.call("on_exception", error)
        if run.datamodule is not None:
            run.datamodule.on_exception(error)
    except Exception:
        log.exception("A hook on_exception raised in turn; what ended the run follows")
    # Of an evaluation that did not come to its end.
    run.restore_training_mode()
    run.engine.saver.wait()
    strategy.teardown(interrupted=True)
    strategy.group.failed = False
    _finalize(run, run.state.status, error)


def _finalize(run: Run, status: str, error: BaseException | None = None) -> None:
    """Let all loggers end. What one of them raises ends neither the others nor a run that has come to its end."""
    run.record.end(run, error)
    for logger in run.trainer.loggers:
        try:
            logger.finalize(status)
        except Exception:
            log.exception(
                "%s could not finish (%s): what it had not written is lost",
                type(logger).__name__,
                status,
            )
