"""What ``Engine.save_state`` writes, and how it is taken back."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ...strategies.tensor_shards import full_state
from ..checkpoint.find import resolve
from ..checkpoint.format_1 import upgrade
from ..checkpoint.manifest import naming_damage
from ..checkpoint.reader import open_checkpoint
from ..checkpoint.saver import Save
from ..checkpoint.schema import Checkpoint, RunState, check_shape
from ..checkpoint.serialization import State, fill_unloaded
from ..checkpoint.storage import join
from ..checkpoint.weights import export_weights
from ..errors import CheckpointError, on_main_rank
from ..from_checkpoint import load_weights
from ..metrics.values import Results, merge_logged
from ..seed import isolated_rng, rng_state, set_rng_state
from .prepared import unwrapped

if TYPE_CHECKING:
    from torch import nn

    from .engine import Engine


def read_checkpoint(engine: Engine, path: str, weights_only: bool | None) -> State:
    """Read a checkpoint that is to be resumed, and see that it has the shape of :class:`.Checkpoint`. A collective.

    Raises:
        CheckpointError: if it has not. To load the weights alone, it need not.
    """
    checkpoint = open_checkpoint(
        path,
        weights_only,
        group=engine.strategy,
        keeps_parts=engine.num_processes > 1 and not is_whole(engine),
    )
    with naming_damage(path, "its state is not as it should be"):
        if checkpoint["manifest"].get("format") == 1:
            upgrade(checkpoint)
        check_shape(checkpoint, Checkpoint)
        if "run" in checkpoint:
            run = checkpoint["run"]
            RunState().load_state_dict(run["state"])
            for logged in run["logged"]:
                Results(**merge_logged([logged["metrics"]], keep=True)["results"])
            check_shape(checkpoint["manifest"]["world_size"], int, "world_size")
        with isolated_rng():
            for generators in checkpoint["rng"]:
                set_rng_state(generators)
    return checkpoint


def is_whole(engine: Engine) -> bool:
    """Whether each process has all of the models' and optimizers' states."""
    return not any(
        strategy.capabilities.shards_state
        for strategy in (engine.strategy, *engine.prepared.strategies)
    )


def can_save_alone(engine: Engine) -> bool:
    """Whether this process can write a checkpoint without the others: it has all that differs beside random states."""
    stateful = any(loader.stateful for loader in engine.prepared.positioned_loaders)
    return engine.is_main_process and is_whole(engine) and not stateful


def _model_states(engine: Engine, path: str) -> list[State]:
    """The models' states that the hooks before a save leave to it."""
    states = [strategy.model_state() for strategy in engine.prepared.strategies]
    if engine.save_state_pre_hooks:
        os.makedirs(path, exist_ok=True)
    for hook in list(engine.save_state_pre_hooks.values()):
        hook(list(engine.prepared.modules.values()), states, path)
    return states


def save_state(engine: Engine, path: str, wait: bool, alone: bool = False) -> Save:
    """Begin to write a checkpoint, as ``Engine.save_state``; with ``alone``, by this process without the others."""
    # The end of the window adapts the loss scale, which is part of the state.
    engine.end_stepped_window()
    prepared = engine.prepared
    strategies = prepared.strategies
    states = _model_states(engine, path)
    loader_states = [loader.state_dict() for loader in prepared.positioned_loaders]
    of_this_rank = loader_states, rng_state(engine.device)
    # Alone, a checkpoint says of all processes what it knows of this one.
    by_rank = [of_this_rank] * engine.num_processes
    if not alone:
        by_rank = engine.strategy.gather_objects(of_this_rank)  # collective
    checkpoint: State = {
        "epoch": prepared.loaders[0].epoch if prepared.loaders else 0,
        "global_step": engine.global_step,
        "models": len(states),
        "state_dict": states[0] if states else {},
        "more_state_dicts": states[1:],
        "optimizer_states": [
            engine.optimizer_state(optimizer) for optimizer in prepared.optimizers
        ],
        "lr_schedulers": [scheduler.state_dict() for scheduler in prepared.schedulers],
        "loader_states": [states for states, _ in by_rank],
        "data_seed": prepared.data_seed,
        "registered": [item.state_dict() for item in prepared.registered],
    }
    if engine.scaler is not None:
        checkpoint["scaler"] = engine.scaler.state_dict()
    facts = {
        "epoch": checkpoint["epoch"],
        "global_step": engine.global_step,
        "precision": engine.precision.name,
        "module": type(strategies[0].module).__qualname__ if strategies else "none",
        "metrics": {},
        # A Trainer cannot go on with it: it has no state of a run.
        "resumable": False,
    }
    generators = [generators for _, generators in by_rank]
    return engine.saver.save(
        engine.strategy,
        checkpoint,
        path,
        facts,
        generators,
        wait,
        alone=alone,
    )


def load_state(engine: Engine, path: str, weights_only: bool | None) -> None:
    """Load a checkpoint into what was prepared and registered, as ``Engine.load_state``."""
    prepared = engine.prepared
    path = resolve(path)
    strategies = _to_load(engine, path)
    checkpoint = read_checkpoint(engine, path, weights_only)
    _check_counts(engine, checkpoint, len(strategies), path)
    engine.end_window()
    engine.accumulation.abandon()
    for optimizer in prepared.optimizers:
        optimizer.optimizer.zero_grad()
    states = [checkpoint["state_dict"], *checkpoint.get("more_state_dicts", [])]
    for strategy, state in zip(strategies, states, strict=False):
        load_weights(
            strategy.load_model_state,
            strategy.module,
            {**checkpoint, "state_dict": state},
            path,
            strict=True,
        )
    try:
        for optimizer, state in zip(
            prepared.optimizers,
            checkpoint.get("optimizer_states", []),
            strict=True,
        ):
            engine.load_optimizer_state(optimizer, state)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path!r} does not fit: {error}") from error
    items = [*prepared.schedulers, *prepared.registered]
    states = [*checkpoint.get("lr_schedulers", []), *checkpoint.get("registered", [])]
    owners = [*(item.scheduler for item in prepared.schedulers), *prepared.registered]
    for item, owner, state in zip(items, owners, states, strict=True):
        item.load_state_dict(fill_unloaded(state, owner))
    if engine.scaler is not None and "scaler" in checkpoint:
        engine.scaler.load_state_dict(checkpoint["scaler"])
    engine.global_step = checkpoint["global_step"]
    _restore_loaders(engine, checkpoint, path)
    if rng := checkpoint["rng"]:
        set_rng_state(rng[engine.process_index % len(rng)], engine.device)


def _to_load(engine: Engine, path: str) -> list[Any]:
    """The strategies of those models that the hooks before a load leave to it."""
    models = list(engine.prepared.modules.values())
    left = list(models)
    for hook in list(engine.load_state_pre_hooks.values()):
        hook(left, path)
    return [
        strategy
        for strategy, model in zip(engine.prepared.strategies, models, strict=True)
        if any(model is other for other in left)
    ]


def _check_counts(
    engine: Engine, checkpoint: State, num_models: int, path: str
) -> None:
    """Raise before anything is loaded if other things were prepared than the checkpoint holds."""
    prepared = engine.prepared
    # A Trainer's checkpoint has one model, and does not count it.
    models = checkpoint.get("models", 1)
    for name, key, now in (
        ("models", "", num_models),
        ("optimizers", "optimizer_states", len(prepared.optimizers)),
        ("schedulers", "lr_schedulers", len(prepared.schedulers)),
        ("registered objects", "registered", len(prepared.registered)),
    ):
        saved = len(checkpoint.get(key, ())) if key else models
        if saved != now:
            raise CheckpointError(
                f"checkpoint {path!r} holds {saved} {name}, and this engine has {now}: prepare and register the "
                "same, in the same order, before load_state"
            )


def _restore_loaders(engine: Engine, checkpoint: State, path: str) -> None:
    """Let the prepared loaders go on where those of the checkpoint were.

    Raises:
        CheckpointError: if it holds those of another number of loaders.
    """
    prepared = engine.prepared
    by_rank = checkpoint.get("loader_states")
    if by_rank is None:
        return
    # A Trainer's checkpoint ("run" is in it) holds one loader's position; further loaders begin at their beginning.
    loaders = prepared.positioned_loaders
    if "run" not in checkpoint and len(by_rank[0]) != len(loaders):
        raise CheckpointError(
            f"checkpoint {path!r} holds the positions of {len(by_rank[0])} loaders, and this engine has prepared "
            f"{len(loaders)}: prepare the same before load_state"
        )
    seed = checkpoint.get("data_seed")
    if seed is not None:
        prepared.set_data_seed(seed)
    # With another number of ranks, the last one's: it has read furthest.
    rank = engine.process_index if len(by_rank) == engine.num_processes else -1
    for loader, state in zip(loaders, by_rank[rank], strict=False):
        loader.load_state_dict(state, saved_by=len(by_rank))


def whole_state(engine: Engine, model: nn.Module) -> State:
    """A model's parameters and buffers, as ``Engine.get_state_dict``."""
    module = unwrapped(model)
    strategy = next(
        (item for item in engine.prepared.strategies if item.module is module), None
    )
    if strategy is None:
        return module.state_dict()
    return full_state(strategy, strategy.model_state())


def save_model(engine: Engine, model: nn.Module, directory: str, together: bool) -> str:
    """Write a model's weights, as ``Engine.save_model``; ``together`` if all processes call it, and all raise."""
    state = whole_state(engine, model)
    path = join(directory, "model.safetensors")
    on_main_rank(
        engine.strategy,
        path,
        lambda: export_weights(state, path, share=True),
        together,
    )
    return path
