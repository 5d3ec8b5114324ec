"""What ``Engine.save_state`` writes, and how it is taken back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...strategies.tensor_shards import full_state
from ..checkpoint.find import resolve
from ..checkpoint.manifest import naming_damage
from ..checkpoint.saver import Save
from ..checkpoint.schema import load_checked, run_states
from ..checkpoint.serialization import unseal
from ..checkpoint.storage import join
from ..checkpoint.weights import export_weights
from ..data.sharding import LoaderState
from ..errors import CheckpointError, on_main_rank
from ..from_checkpoint import load_weights
from ..metrics.values import Results, merge_logged
from ..seed import rng_state, set_rng_state
from .prepared import unwrapped

if TYPE_CHECKING:
    from torch import nn

    from .engine import Engine


def read_checkpoint(path: str, weights_only: bool | None) -> dict[str, Any]:
    """Read a checkpoint that is to be taken up: its state, and what was logged, have the shape that this needs.

    Raises:
        CheckpointError: if they have not.
    """
    checkpoint = load_checked(path, weights_only)
    with naming_damage(path, "its state is not as it should be"):
        for state in run_states(checkpoint):
            Results(**merge_logged([state["metrics"]], keep=True)["results"])
    return checkpoint


def is_whole(engine: Engine) -> bool:
    """Whether each process has all of the models' and optimizers' states."""
    return not any(
        strategy.capabilities.shards_state
        for strategy in (engine.strategy, *engine.prepared.strategies)
    )


def can_save_alone(engine: Engine) -> bool:
    """Whether this process can write a checkpoint without the others: it has all that differs beside random states."""
    stateful = any(loader.stateful for loader in engine.prepared.loaders)
    return engine.is_main_process and is_whole(engine) and not stateful


def save_state(engine: Engine, path: str, wait: bool, alone: bool = False) -> Save:
    """``Engine.save_state``; ``alone``: by this process, without the others."""
    engine.end_stepped_window()  # its loss scale belongs to the state
    strategies = engine.prepared.strategies
    loaders = [loader.state_dict() for loader in engine.prepared.loaders]
    states = [strategy.model_state() for strategy in strategies]
    checkpoint: dict[str, Any] = {
        "epoch": engine.prepared.loaders[0].epoch if engine.prepared.loaders else 0,
        "global_step": engine.global_step,
        "models": len(states),
        "state_dict": states[0] if states else {},
        "more_state_dicts": states[1:],
        "optimizer_states": [
            engine.optimizer_state(optimizer)
            for optimizer in engine.prepared.optimizers
        ],
        "lr_schedulers": [
            scheduler.state_dict() for scheduler in engine.prepared.schedulers
        ],
        "loaders": [loaders] * engine.num_processes
        if alone
        else engine.strategy.gather_objects(loaders),
        "data_seed": engine.prepared.data_seed,
        "registered": [item.state_dict() for item in engine.prepared.registered],
    }
    if engine.scaler is not None:
        checkpoint["scaler"] = engine.scaler.state_dict()
    facts = {
        "epoch": checkpoint["epoch"],
        "global_step": engine.global_step,
        "precision": engine.precision.name,
        "module": type(strategies[0].module).__qualname__ if strategies else "none",
        "metrics": {},
        "resumable": False,  # by a Trainer
    }
    own = rng_state(engine.device)
    rng = [own] if alone else engine.strategy.gather_objects(own)
    return engine.saver.save(
        engine.strategy, checkpoint, path, facts, rng, wait, alone=alone
    )


def load_state(engine: Engine, path: str, weights_only: bool | None) -> None:
    """``Engine.load_state``."""
    path = resolve(path)
    checkpoint = read_checkpoint(path, weights_only)
    _check_counts(engine, checkpoint, path)
    engine.end_window()
    engine.accumulation.abandon()
    for optimizer in engine.prepared.optimizers:
        optimizer.optimizer.zero_grad()
    states = [checkpoint["state_dict"], *checkpoint.get("more_state_dicts", [])]
    for strategy, state in zip(engine.prepared.strategies, states, strict=False):
        load_weights(
            strategy.load_model_state,
            strategy.module,
            {**checkpoint, "state_dict": state},
            path,
            strict=True,
        )
    try:
        for optimizer, state in zip(
            engine.prepared.optimizers,
            checkpoint.get("optimizer_states", []),
            strict=True,
        ):
            engine.load_optimizer_state(optimizer, state)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path!r} does not fit: {error}") from error
    for scheduler, state in zip(
        engine.prepared.schedulers, checkpoint.get("lr_schedulers", []), strict=True
    ):
        scheduler.load_state_dict(unseal(state, scheduler.scheduler))
    for item, state in zip(
        engine.prepared.registered, checkpoint.get("registered", []), strict=True
    ):
        item.load_state_dict(unseal(state, item))
    if engine.scaler is not None and "scaler" in checkpoint:
        engine.scaler.load_state_dict(checkpoint["scaler"])
    engine.global_step = checkpoint["global_step"]
    _place_loaders(engine, checkpoint, path)
    if rng := checkpoint["rng"]:
        set_rng_state(rng[engine.process_index % len(rng)], engine.device)


def _check_counts(engine: Engine, checkpoint: dict[str, Any], path: str) -> None:
    """Raise before anything is loaded if other things were prepared than the checkpoint holds."""
    models = checkpoint.get("models", 1)  # the Trainer's have one
    for name, saved, now in (
        ("models", models, engine.prepared.strategies),
        (
            "optimizers",
            len(checkpoint.get("optimizer_states", ())),
            engine.prepared.optimizers,
        ),
        (
            "schedulers",
            len(checkpoint.get("lr_schedulers", ())),
            engine.prepared.schedulers,
        ),
        (
            "registered objects",
            len(checkpoint.get("registered", ())),
            engine.prepared.registered,
        ),
    ):
        if saved != len(now):
            raise CheckpointError(
                f"checkpoint {path!r} holds {saved} {name}, and this engine has {len(now)}: prepare and register the "
                "same, in the same order, before load_state"
            )


def _place_loaders(engine: Engine, checkpoint: dict[str, Any], path: str) -> None:
    places = _places(checkpoint)
    if places is None:
        return
    if "run" in checkpoint:
        engine.prepared.set_data_seed(checkpoint["run"]["state"]["seed"])
        places = [
            own[: len(engine.prepared.loaders)] for own in places
        ]  # the first loader's; others are at their beginning
    elif len(places[0]) != len(engine.prepared.loaders):
        raise CheckpointError(
            f"checkpoint {path!r} holds the places of {len(places[0])} loaders, and this engine has prepared "
            f"{len(engine.prepared.loaders)}: prepare the same before load_state"
        )
    if (seed := checkpoint.get("data_seed")) is not None:
        engine.prepared.set_data_seed(seed)
    # With another number of processes, the last one's places: it has read furthest.
    own = places[engine.process_index if len(places) == engine.num_processes else -1]
    for loader, place in zip(engine.prepared.loaders, own, strict=False):
        loader.load_state_dict(place, saved_by=len(places))


def _places(checkpoint: dict[str, Any]) -> list[list[LoaderState]] | None:
    """Where each process's loaders were; of a Trainer's checkpoint, its training loader."""
    if "loaders" in checkpoint and "registered" in checkpoint:
        return checkpoint["loaders"]
    if "run" not in checkpoint:
        return None
    run, state = checkpoint["run"], checkpoint["run"]["state"]
    epoch, batches = (
        (state["epoch"] + 1, 0)
        if state["epoch_done"]
        else (state["epoch"], state["batch_idx"])
    )
    part = None if state["epoch_done"] else state["part"]
    return [
        [
            {
                "epoch": epoch,
                "batches": batches,
                "loader": own["loader"],
                "part": part,
                "cursor": own["cursor"],
            }
        ]
        for own in (run, *run.get("peers", ()))
    ]


def save_model(engine: Engine, model: nn.Module, directory: str, together: bool) -> str:
    """``Engine.save_model``; ``together``: by all processes, so that all hear how it went."""
    module = unwrapped(model)
    strategy = next(
        (own for own in engine.prepared.strategies if own.module is module), None
    )
    state = (
        module.state_dict()
        if strategy is None
        else full_state(strategy, strategy.model_state())
    )
    path = join(directory, "model.safetensors")
    on_main_rank(
        engine.strategy, path, lambda: export_weights(state, path, share=True), together
    )
    return path
