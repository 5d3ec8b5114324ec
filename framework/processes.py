"""A run in processes that are started for it, and how what came of it gets back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..strategies.launch import call_in_processes, can_rerun, rerun_script
from .batches import map_tensors
from .messages import configure
from .seed import rng_state, set_rng_state

if TYPE_CHECKING:
    from .datamodule import DataModule
    from .module import Module
    from .trainer import Trainer


@dataclass
class Run:
    """One call of ``fit``, ``validate``, ``test`` or ``predict``, its arguments checked.

    Attributes:
        fn: which of them.
        model, datamodule: what runs.
        given: the loaders passed, by stage.
        ckpt_path, weights_only: as passed.
        keep: which predictions to return: ``"own"``, ``"all"`` or ``"none"``.
    """

    fn: str
    model: Module
    datamodule: DataModule | None
    given: dict[str, Any]
    ckpt_path: Any
    weights_only: bool | None
    keep: str


@dataclass
class CarriedFit:
    """What another process left of a fit, for the next one to go on with."""

    module: Module
    configured: str
    state: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """The states of optimizers and schedulers."""
        return self.state


def run_in_processes(trainer: Trainer, run: Run) -> Any:
    """Run in one process for each device: this program again, or, where it cannot be run again, sent to fresh ones."""
    processes = trainer.world_size
    if can_rerun():
        rerun_script(processes, trainer.strategy.max_restarts)
    trainer.data_seed()  # drawn here, where the user has seeded
    trainer.callbacks = trainer.with_module_callbacks(run.model)
    left = call_in_processes(_run_here, (trainer, run, rng_state()), processes)
    _take_back(trainer, run, left)
    return left["returned"]


def _run_here(trainer: Trainer, run: Run, rng: dict[str, Any]) -> dict[str, Any]:
    """What each of the fresh processes does; the main one's result goes back."""
    configure()
    set_rng_state(rng)
    trainer.engine.find_place()
    returned = trainer.execute(run)
    if not trainer.is_global_zero:
        return {}
    left = {
        "returned": returned,
        "weights": trainer.strategy.model_state(),
        "module": _portable(run.model, vars(nn.Module())),
        "callbacks": [(type(callback), _portable(callback)) for callback in trainer.callbacks],
        "loggers": [_portable(logger) for logger in trainer.loggers],
        "state": trainer.state,
        "results": trainer.metrics.results,
        "unfinished": trainer.unfinished,
        "fit": (trainer.optimization.configured, trainer.optimization.state_dict()) if trainer.fitted else None,
        "ckpt_path": trainer.ckpt_path,
        "rng": rng_state(),
    }
    return map_tensors(left, lambda tensor: tensor.to("cpu"))


def _portable(obj: Any, without: Any = ()) -> dict[str, Any]:
    """The attributes of an object that can be pickled, such as what a callback has recorded."""
    import cloudpickle

    state = obj.__getstate__() if hasattr(obj, "__getstate__") else vars(obj)
    kept = {}
    for name, value in (state or {}).items():
        if name in without:
            continue
        try:
            cloudpickle.dumps(value)
        except Exception:  # an open file, a lock: it stays where it was made
            continue
        kept[name] = value
    return kept


def _take_back(trainer: Trainer, run: Run, left: dict[str, Any]) -> None:
    """Let the run have happened here."""
    module = run.model
    if module.state_dict().keys() != left["weights"].keys():
        with trainer.engine.precision.init_context():
            module.configure_model()  # what it makes was made there only
    trainer.engine.precision.convert_module(module)
    module.load_state_dict(left["weights"])
    vars(module).update(left["module"])
    for callback, (kind, attributes) in zip(trainer.callbacks, left["callbacks"], strict=True):
        if type(callback).__qualname__ == kind.__qualname__:
            vars(callback).update(attributes)
    for logger, attributes in zip(trainer.loggers, left["loggers"], strict=True):
        vars(logger).update(attributes)
    trainer.module, trainer.datamodule = module, run.datamodule
    module.trainer = trainer
    trainer.state, trainer.unfinished, trainer.ckpt_path = left["state"], left["unfinished"], left["ckpt_path"]
    trainer.metrics.module, trainer.metrics.results = module, left["results"]
    if left["fit"] is not None:
        trainer.carried = CarriedFit(module, *left["fit"])
    set_rng_state(left["rng"])
