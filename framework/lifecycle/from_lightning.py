"""A checkpoint that Lightning has written, as one of ours: its run goes on here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..checkpoint.schema import RunState, loader_state
from ..checkpoint.serialization import State
from ..errors import CheckpointError
from ..loop.weight_sets import evaluated_name, weight_sets
from ..messages import log

if TYPE_CHECKING:
    from ..loop.run import Run


def is_of_lightning(checkpoint: State) -> bool:
    """Whether Lightning has written a checkpoint, with how far its run had come."""
    return "loops" in checkpoint and "run" not in checkpoint


def adopt(run: Run, checkpoint: State) -> None:
    """Add to a checkpoint of Lightning what resuming it needs, and say what it lacks.

    Args:
        run: the fit that goes on with it.
        checkpoint: as it was read.

    Raises:
        CheckpointError: if it is not as Lightning 2 writes it.
    """
    try:
        fit_loop = checkpoint["loops"]["fit_loop"]
        counters = _counters(fit_loop, checkpoint["global_step"], run)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {run.ckpt_path!r} does not tell its progress as Lightning 2 does ({error!r}): load its "
            "weights with Module.load_from_checkpoint"
        ) from error
    num_ranks = run.trainer.world_size
    # Its loaders' states are those of its main process.
    states = fit_loop.get("state_dict", {}).get("combined_loader", [])
    loader = states[0] if len(states) == 1 else None
    if loader is not None and not counters["batch_idx"]:
        # It had given all batches, and nobody had asked for one more: the loader is still inside the epoch.
        is_inside = not (isinstance(loader, dict) and loader.get("_iterator_finished"))
        loader = {"state": loader, "batches": 0, "left": is_inside}
    position = loader_state(counters, loader, None)
    logged = {"metrics": {"train": [], "results": {}}, "metric_states": {}}
    checkpoint["run"] = {
        "state": counters,
        "logged": [logged] * num_ranks,
        "saved_by": num_ranks,
    }
    checkpoint["loader_states"] = [[position]] * num_ranks
    checkpoint["manifest"]["world_size"] = num_ranks
    checkpoint.setdefault("callbacks", {})
    _adopt_callbacks(run, checkpoint["callbacks"], counters)
    _rename(checkpoint, "MixedPrecision", "scaler")
    _rename(checkpoint, type(run.datamodule).__qualname__, "datamodule")
    run.warn_once(
        "%s is Lightning's: weights, optimizers, schedulers, loss scale, counters and states of callbacks and data are "
        "taken over. It has no random states and no values that the running epoch has logged, and the order of "
        "shuffled data is drawn here; its own last.ckpt and the checkpoints that it kept are left alone%s",
        run.ckpt_path,
        "; of several loaders, the states are left out" if len(states) > 1 else "",
    )


def _counters(fit_loop: State, global_step: int, run: Run) -> State:
    """The counters of a :class:`.RunState`."""
    epochs = fit_loop["epoch_progress"]["current"]
    batches = fit_loop["epoch_loop.batch_progress"]
    current = batches["current"]
    counters = RunState().state_dict()
    # An epoch counts as processed right before the hooks of its end, and a batch before those of its own. Once its last
    # batch is processed, an epoch is over for a run that is resumed: what its end needs, such as values, is not saved.
    counters["epoch"] = epochs["processed"]
    counters["past_batches"] = batches["total"]["processed"]
    if epochs["started"] > epochs["processed"]:
        done = current["processed"]
        if batches["is_last_batch"] and done == current["ready"]:
            counters["epoch"] += 1
        else:
            counters["batch_idx"] = done
            counters["past_batches"] -= done
            # What is saved after a batch's own hooks is saved by a validation.
            counters["validated"] = done if current["completed"] == done else -1
    # Lightning counts the steps of each optimizer, and here a batch takes one step at most.
    counters["global_step"] = min(global_step, batches["total"]["processed"])
    if counters["global_step"] < global_step:
        log.info(
            "global_step is %d: Lightning counted the steps of each optimizer, which were %d",
            counters["global_step"],
            global_step,
        )
    return counters


def _adopt_callbacks(run: Run, states: State, counters: State) -> None:
    """Put the states of Lightning's own callbacks under the names that ours have, and leave out what is not ours."""
    for callback in run.trainer.callbacks:
        name = type(callback).__qualname__
        monitor = f"'monitor': {getattr(callback, 'monitor', None)!r}"
        for key in [*states]:
            is_meant = key.startswith(f"{name}{{") and monitor in key
            own = callback.state_key
            if is_meant and (own == key or own not in states):
                states[own] = state = dict(states.pop(key))
                if "best_model_path" in state:
                    state["last_global_step_saved"] = counters["global_step"]
                    # It may be a checkpoint, where ours is a pointer that the next save replaces.
                    state.pop("last_model_path", None)


def _rename(checkpoint: dict[str, Any], key: str, ours: str) -> None:
    if key in checkpoint:
        checkpoint.setdefault(ours, checkpoint.pop(key))


def adopt_average(run: Run, checkpoint: State) -> None:
    """Tell the weights that are trained from their average, which Lightning saves in their place, for a callback."""
    names = [weights.name for weights in weight_sets(run.trainer)]
    if not names or not {"current_model_state", "averaging_state"} <= set(checkpoint):
        return
    average = checkpoint["state_dict"]
    checkpoint["state_dict"] = checkpoint.pop("current_model_state")
    state = checkpoint.pop("averaging_state")
    name = evaluated_name(run.trainer) or names[0]
    checkpoint.setdefault("weight_sets", {})[name] = average
    for callback in run.trainer.callbacks:
        if callback.weight_set is not None and callback.weight_set.name == name:
            states = checkpoint.setdefault("callbacks", {})
            own = states.pop(type(callback).__qualname__, {})
            own = states.setdefault(callback.state_key, own)
            own["n_averaged"] = int(state.get("n_averaged", 0))
