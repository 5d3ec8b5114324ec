"""The model, its steps and its hooks: what a user subclasses."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .datamodule import DataHooks
from .hparams import HyperparametersMixin
from .metrics.context import LogOptions

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..callbacks.base import Callback
    from ..loggers.base import Logger
    from .loop.step import Step
    from .trainer import Trainer


class Module(DataHooks, HyperparametersMixin, nn.Module):
    """A ``torch.nn.Module`` with the steps and hooks of a training run.

    Override :meth:`training_step` and :meth:`configure_optimizers` to train, the other steps to evaluate, and any
    hook by its name; a hook that is not overridden is never called. The order of all hooks stands in the
    documentation under "The loop and its hooks, in order".

    Attributes:
        automatic_optimization: whether the loop runs backward and the optimizer. Set it to False in ``__init__`` to
            do so in :meth:`training_step`, with :meth:`optimizers` and :meth:`manual_backward`.
        example_input_array: an example of what :meth:`forward` takes (a tensor; a tuple or dict of arguments),
            for the model summary and the loggers' graphs.
        strict_loading: whether checkpoints must hold exactly this module's parameters and buffers.
    """

    # In the class, so that a subclass may set them there, or make properties of them.
    automatic_optimization: bool = True
    example_input_array: Tensor | tuple[Any, ...] | dict[str, Any] | None = None
    strict_loading: bool = True

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make a module that is complete even if a subclass's ``__init__`` forgets ``super().__init__()``."""
        make = super().__new__
        if make is object.__new__:
            module = make(cls)
        else:
            # A mixin has a __new__ of its own.
            module = make(cls, *args, **kwargs)
        nn.Module.__init__(module)
        return module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        init = super().__init__
        is_torchs = getattr(init, "__func__", None) is nn.Module.__init__
        # __new__ has called torch's: a second call would drop what was assigned since, as by a dataclass's constructor.
        is_done = is_torchs and "_parameters" in vars(self)
        if args or kwargs or not is_done:
            init(*args, **kwargs)

    @property
    def trainer(self) -> Trainer:
        """The Trainer that runs this module, or the module that it is a part of.

        Raises:
            RuntimeError: if none does.
        """
        trainer = self.__dict__.get("_trainer")
        if trainer is None:
            reader = sys._getframe(1).f_globals.get("__name__", "")
            if reader.startswith(("torch.jit", "torch._jit")):
                # TorchScript reads all attributes, also those that it leaves alone.
                return None  # type: ignore[return-value]
            raise RuntimeError(
                f"{type(self).__name__} is not attached to a `Trainer`: pass it to fit, test, … first"
            )
        return trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        for module in self.modules():
            if isinstance(module, Module):
                module.__dict__["_trainer"] = trainer

    def _of_trainer(self, name: str, default: Any) -> Any:
        trainer = self.__dict__.get("_trainer")
        return default if trainer is None else getattr(trainer, name)

    @property
    def device(self) -> torch.device:
        """The device of the module's first parameter or buffer (the CPU if it has none)."""
        return _first_tensor(self).device

    @property
    def device_mesh(self) -> Any:
        """The strategy's ``DeviceMesh`` of processes, for ``configure_model``; None if it has none."""
        strategy = self._of_trainer("strategy", None)
        return None if strategy is None else strategy.device_mesh

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the module's first floating-point parameter or buffer."""
        return _first_tensor(self, floating=True).dtype

    @property
    def current_epoch(self) -> int:
        """Index of the running epoch; 0 without a Trainer."""
        return self._of_trainer("current_epoch", 0)

    @property
    def global_step(self) -> int:
        """Completed accumulation windows, whatever the number of optimizers; 0 without a Trainer."""
        return self._of_trainer("global_step", 0)

    @property
    def global_rank(self) -> int:
        """This process's index among all."""
        return self._of_trainer("global_rank", 0)

    @property
    def local_rank(self) -> int:
        """This process's index on its machine."""
        return self._of_trainer("local_rank", 0)

    @property
    def logger(self) -> Logger | None:
        """The first logger."""
        return self._of_trainer("logger", None)

    @property
    def loggers(self) -> list[Logger]:
        """All loggers."""
        return self._of_trainer("loggers", [])

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print in the main process only."""
        if self.global_rank == 0:
            print(*args, **kwargs)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Gather tensors from all processes.

        Args:
            data: a tensor, or a nesting of dicts, lists and tuples of tensors, of one shape on all processes.
            group: accepted for familiarity; must be None.
            sync_grads: let gradients flow back through the gathering.

        Returns:
            With several processes, each tensor with a new first dimension ``(world_size, ...)``; else ``data``.

        Raises:
            ValueError: if ``group`` is given.
            RuntimeError: in an evaluation step that other processes may not take.
        """
        if group is not None:
            raise ValueError(
                f"all_gather: group must be None (all processes); got {group!r}"
            )
        run = self.trainer.run
        if run is not None and run.loaders.others_have_ended:
            raise RuntimeError(
                "all_gather in an evaluation step for whose batch other processes may have no counterpart, as the "
                "loader's batches cannot be dealt out evenly: keep the values, and gather them when the epoch ends"
            )
        return self.trainer.engine.all_gather(data, sync_grads=sync_grads)

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool | None = None,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log a number. It is kept as a tensor on its device and read only when a logger or the bar needs it.

        Args:
            name: under which it appears. With both ``on_step`` and ``on_epoch``, as ``<name>_step``, ``<name>_epoch``.
            value: a number, a tensor of one element, or a torchmetrics ``Metric``, which is computed at the epoch's
                end and then reset.
            prog_bar: show it in the progress bar.
            logger: send it to the loggers (default: yes).
            on_step: log the value of this step (default: in training batches).
            on_epoch: log the reduction over the epoch (default: everywhere else).
            reduce_fx: that reduction: ``"mean"`` or ``"avg"`` (weighted by ``batch_size``), ``"sum"``, ``"min"``,
                ``"max"``, or a function, such as ``torch.median``, of a tensor with all values of the epoch, those of
                all processes, which are kept until then.
            enable_graph: keep the value's autograd graph in ``trainer.callback_metrics``.
            sync_dist: reduce step values over processes too (a collective per call). Epoch values always are.
            sync_dist_group: accepted for familiarity; must be None.
            add_dataloader_idx: append ``/dataloader_idx_<i>`` with several evaluation loaders.
            batch_size: weight of this value in an epoch's mean (default: the first dimension of the batch's tensors).
            metric_attribute: accepted for familiarity; metrics are found without it.
            rank_zero_only: log the main process's value only.

        Raises:
            ValueError: for an argument that is none of these.
            TypeError: for a value that is none of these.
            RuntimeError: where nothing can be logged, such as in ``predict_step`` or ``setup``.
        """
        trainer = self.__dict__.get("_trainer")
        if trainer is None:
            warnings.warn(
                f"log({name!r}, …) without a Trainer has no effect", stacklevel=2
            )
            return
        if sync_dist_group is not None:
            raise ValueError(
                f"log({name!r}): sync_dist_group must be None (all processes); got {sync_dist_group!r}"
            )
        options = LogOptions(
            prog_bar,
            logger,
            on_step,
            on_epoch,
            reduce_fx,
            enable_graph,
            sync_dist,
            add_dataloader_idx,
            batch_size,
            rank_zero_only,
        )
        trainer.metrics.log(name, value, options)

    def log_dict(self, dictionary: Mapping[str, Any], **kwargs: Any) -> None:
        """Log several values at once; arguments as for :meth:`log`.

        Args:
            dictionary: values by name, or a torchmetrics ``MetricCollection``.
            **kwargs: arguments of :meth:`log`.
        """
        options = {}
        if isinstance(dictionary, nn.Module):
            # A MetricCollection gives copies of its metrics otherwise, which could not be reset.
            options = {"keep_base": False, "copy_state": False}
        for name, value in dictionary.items(**options):
            self.log(name, value, **kwargs)

    # What loggers show besides numbers. They get it with the global step; the main process writes it.

    def log_image(self, name: str, value: Any, caption: Any = None) -> None:
        """Log an image, or a list of them; a logger that cannot show it leaves it out, and says so once.

        Args:
            name: under which it appears.
            value: a tensor or array (channels, height, width), (height, width, channels) or (height, width), of floats
                from 0 to 1 or of bytes, or a batch of such; a PIL image; a figure of matplotlib; the path of a file; a
                list of these.
            caption: a text, or one for each image.

        Raises:
            TypeError, ValueError: if it is none of these.
        """
        self._log_media("image", name, value, caption=caption)

    def log_text(self, name: str, value: str) -> None:
        """Log a text, as :meth:`log_image` does images.

        Args:
            name: under which it appears.
            value: the text.
        """
        self._log_media("text", name, value)

    def log_table(self, name: str, value: Any, columns: Any = None) -> None:
        """Log a table, as :meth:`log_image` does images.

        Args:
            name: under which it appears.
            value: a dict of columns, a list of dicts, a data frame, or a list of rows.
            columns: names of the columns, where ``value`` has none.

        Raises:
            TypeError, ValueError: if it is none of these, or has rows of different lengths.
        """
        self._log_media("table", name, value, columns=columns)

    def log_histogram(self, name: str, value: Any, bins: int = 64) -> None:
        """Log how numbers are distributed, as :meth:`log_image` does images.

        Args:
            name: under which it appears.
            value: a tensor or array; what is not finite is left out.
            bins: number of intervals.
        """
        self._log_media("histogram", name, value, bins=bins)

    def log_audio(self, name: str, value: Any, sample_rate: int = 44100) -> None:
        """Log a sound, as :meth:`log_image` does images.

        Args:
            name: under which it appears.
            value: a tensor or array (samples,) or (channels, samples), of floats from -1 to 1 or of 16-bit integers; or
                the path of a WAV file.
            sample_rate: samples a second.

        Raises:
            TypeError, ValueError: if it is none of these.
        """
        self._log_media("audio", name, value, sample_rate=sample_rate)

    def _log_media(self, kind: str, name: str, value: Any, **options: Any) -> None:
        trainer = self.__dict__.get("_trainer")
        if trainer is None:
            warnings.warn(
                f"log_{kind}({name!r}, …) without a Trainer has no effect", stacklevel=3
            )
            return
        trainer.log_media(kind, name, value, **options)

    def configure_optimizers(self) -> Any:
        """Return the optimizers, and their schedulers.

        One of: an optimizer; a list of optimizers; ``(optimizers, schedulers)``, two lists; a dict
        ``{"optimizer": …, "lr_scheduler": …}``; a list of such dicts; None for no optimizer. A scheduler is given as
        such or as a dict ``{"scheduler": …, "interval": "epoch" | "step", "frequency": 1, "monitor": name, "strict":
        True, "name": name}``. In automatic optimization, several optimizers step on the same loss, each with its own
        parameters.
        """
        return None

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimizer, or the list of several, for manual optimization.

        Args:
            use_pl_optimizer: False gives torch's own optimizers, past hooks, precision and strategy.

        Returns:
            A ``ManualOptimizer``, or a list of them. Only the run knows how many, so type checkers are told nothing.

        Raises:
            RuntimeError: before ``fit`` has called ``configure_optimizers``.
        """
        step = self._step_of_fit()
        return _one_or_all(step.manual if use_pl_optimizer else step.optimizers)

    def _step_of_fit(self) -> Step:
        run = self.trainer.run
        step = None if run is None else run.live_step
        if step is None:
            raise RuntimeError(
                "there are no optimizers before fit has called configure_optimizers"
            )
        return step

    def lr_schedulers(self) -> Any:
        """None, the scheduler, or the list of several, for manual optimization."""
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return _one_or_all(schedulers) if schedulers else None

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients in manual optimization: ``loss.backward()`` with the precision's scaling and the hooks.

        Args:
            loss: a tensor of one element.
            *args: for :meth:`backward`.
            **kwargs: for :meth:`backward`.

        Raises:
            RuntimeError: with automatic optimization.
        """
        if self.automatic_optimization:
            raise RuntimeError(
                "manual_backward is for manual optimization; set self.automatic_optimization = False in __init__, "
                "or return the loss from training_step"
            )
        self._step_of_fit().backward(loss, *args, **kwargs)

    def toggle_optimizer(self, optimizer: Any) -> None:
        """Let only this optimizer's parameters require gradients, until :meth:`untoggle_optimizer`."""
        self._step_of_fit().toggle(optimizer)

    def untoggle_optimizer(self, optimizer: Any) -> None:
        """Undo :meth:`toggle_optimizer`."""
        self._step_of_fit().untoggle()

    @contextmanager
    def toggled_optimizer(self, optimizer: Any) -> Iterator[None]:
        """:meth:`toggle_optimizer` for the length of a ``with`` block."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def clip_gradients(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of an optimizer's parameters.

        Args:
            optimizer: the optimizer.
            gradient_clip_val: the bound; nothing is clipped if it is None or 0.
            gradient_clip_algorithm: ``"norm"`` (default: the global norm of all of them) or ``"value"``.
        """
        self.trainer.engine.clip_gradients(
            optimizer,
            gradient_clip_val,
            gradient_clip_algorithm or "norm",
        )

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run ``loss.backward()``; override to change how."""
        self.trainer.strategy.backward(loss, *args, **kwargs)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients as the Trainer's arguments say; override to clip otherwise.

        Args:
            optimizer: whose parameters' gradients.
            gradient_clip_val: the Trainer's argument.
            gradient_clip_algorithm: the Trainer's argument.
        """
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step ``optimizer``; override to step otherwise.

        An override of three arguments is called when forward and backward have run, gradients are clipped, and
        ``optimizer.step()`` is all that is left. One that takes ``optimizer_closure``, too, is called before them, and
        has to call ``optimizer.step(closure=optimizer_closure)``, or ``optimizer_closure()`` by itself.

        Args:
            epoch: index of the running epoch.
            batch_idx: index of the batch in it.
            optimizer: as :meth:`optimizers` gives it; its ``step`` calls the hook before the step, and clips.
            optimizer_closure: runs ``training_step``, clears gradients, computes them, and returns the loss.
        """
        if optimizer_closure is None:
            optimizer.step()
        else:
            optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer,
    ) -> None:
        """Clear the gradients; override to clear otherwise.

        Args:
            epoch: index of the running epoch.
            batch_idx: index of the batch in it.
            optimizer: whose parameters' gradients.
        """
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step ``scheduler``; ``metric`` is the monitored value, or None where none is monitored."""
        scheduler.step() if metric is None else scheduler.step(metric)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """``training_step(batch, batch_idx)``: compute the loss of a batch.

        Returns:
            The loss; or a dict with ``"loss"``, the mean over the batch, optionally ``"weight"`` (say, tokens: the
            window's gradient is then the weighted mean over its micro-batches) and anything else; or None, which
            skips the batch. With manual optimization, anything.
        """
        raise NotImplementedError

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """``validation_step(batch, batch_idx, dataloader_idx=0)``: validate on a batch."""
        raise NotImplementedError

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """``test_step(batch, batch_idx, dataloader_idx=0)``: test on a batch."""
        raise NotImplementedError

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """``predict_step(batch, batch_idx, dataloader_idx=0)``: predict a batch; by default, call the module on it."""
        return self(args[0])

    def configure_model(self) -> None:
        """Create large submodules here, in the run's precision; under ZeRO-3 they are divided among processes at once.

        It is called before each run, and must not create again what is there.
        """

    def configure_callbacks(self) -> Callback | list[Callback]:
        """Return callbacks that belong to the module; one of a type replaces the Trainer's of that type."""
        return []

    def on_fit_start(self) -> None:
        """The model is on its device, and optimizers are made.

        In a resumed run, the checkpoint is loaded except for the states of optimizers and schedulers, which come next:
        a module that has added parameter groups adds them again here.
        """

    def on_fit_end(self) -> None:
        """Fitting ended normally."""

    def on_train_start(self) -> None:
        """Training is about to begin, or to go on from a checkpoint."""

    def on_train_end(self) -> None:
        """The last epoch ended."""

    def on_train_epoch_start(self) -> None:
        """An epoch begins."""

    def on_train_epoch_end(self) -> None:
        """An epoch ended; its validation, if due, has run."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Before a training step. Returning -1 skips the rest of the epoch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a training step. ``outputs`` is ``{"loss": detached loss, ...}`` or None."""

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """The gradients of the last accumulation window are about to be cleared."""

    def on_before_backward(self, loss: Tensor) -> None:
        """Before the backward pass; ``loss`` is already divided for accumulation, not yet scaled."""

    def on_after_backward(self) -> None:
        """After the backward pass; under ``"16-mixed"`` the gradients are still scaled."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The window's gradients are complete and unscaled, not yet clipped."""

    def on_validation_start(self) -> None:
        """Validation, testing or prediction begins."""

    def on_validation_end(self) -> None:
        """Validation, testing or prediction ended; its metrics are in ``trainer.callback_metrics``."""

    def on_validation_epoch_start(self) -> None:
        """Before the first batch."""

    def on_validation_epoch_end(self) -> None:
        """After the last batch; values may still be logged (not in prediction)."""

    def on_validation_batch_start(
        self,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Before a validation, test or predict step."""

    def on_validation_batch_end(
        self,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """After a validation, test or predict step; ``outputs`` is what it returned."""

    def on_validation_model_zero_grad(self) -> None:
        """Free gradients before validation; by default they are kept (they live until the next window)."""

    def on_validation_model_eval(self) -> None:
        """Put the module into evaluation mode for validation, testing or prediction."""
        self.eval()

    def on_validation_model_train(self) -> None:
        """Put the module back as it was before validation, testing or prediction."""
        self.trainer.run.restore_training_mode()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end
    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_model_eval = on_predict_model_eval = on_validation_model_eval
    on_test_model_train = on_predict_model_train = on_validation_model_train

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is about to be written; keys may be added to it."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint was read and is about to be applied."""

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        weight_set: str | None = None,
        **overrides: Any,
    ) -> Self:
        """Construct the module from a checkpoint's hyperparameters and load its weights.

        Args:
            checkpoint_path: a checkpoint directory or a pointer to one, local or any fsspec URL.
            map_location: the device to load onto (default: the CPU), or a dict or function as of ``torch.load``.
            hparams_file: accepted for familiarity; must be None (a checkpoint holds its hyperparameters).
            strict: whether the parameters must be exactly the module's (default: its ``strict_loading``).
            weights_only: False lets the checkpoint's pickled objects be loaded, which can run code.
            weight_set: load other weights that the checkpoint holds by this name, such as ``"ema"``.
            **overrides: constructor arguments instead of the checkpoint's, or beside them.

        Raises:
            CheckpointError: if the checkpoint is damaged, needs ``weights_only=False``, is for another module, or holds
                no such ``weight_set``.
        """
        from .from_checkpoint import module_from_checkpoint

        if hparams_file is not None:
            raise ValueError(
                "hparams_file must be None: a checkpoint holds its hyperparameters; pass overrides"
            )
        return module_from_checkpoint(
            cls,
            checkpoint_path,
            map_location,
            strict,
            weights_only,
            weight_set,
            overrides,
        )

    def freeze(self) -> Self:
        """Switch gradients off for all parameters, and to evaluation mode; returns the module."""
        return self.requires_grad_(False).eval()

    def unfreeze(self) -> Self:
        """Switch gradients on for all parameters, and to training mode; returns the module."""
        return self.requires_grad_(True).train()


# What TorchScript leaves alone: properties that tell of the run, or have types that it does not know.
Module.__jit_unused_properties__ = [  # pyright: ignore[reportAttributeAccessIssue] # torch reads it from the class
    name for name in dir(Module) if isinstance(getattr(Module, name), property)
]


def _first_tensor(module: nn.Module, floating: bool = False) -> Tensor:
    """The first parameter or buffer, of a floating-point dtype if so wished; an empty tensor if there is none."""
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point() or not floating:
            return tensor
    return torch.empty(0)


def _one_or_all(items: Sequence[Any]) -> Any:
    """The item if there is one, else the list."""
    return items[0] if len(items) == 1 else list(items)
