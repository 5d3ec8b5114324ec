"""The Engine beside Hugging Face's Accelerator: the same calls in two processes, and where the two differ."""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from loopwright.framework import Engine, find_executable_batch_size
from tests.strategies.distributed import in_processes

CASES: dict[str, Callable[[Any, str], Any]] = {}


def case(function: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """Let a function of what makes an engine (or accelerator) and of a folder be called with both."""
    CASES[function.__name__] = function
    return function


def engine(steps: int = 1, precision: str = "32-true") -> Engine:
    return Engine(
        accelerator="cpu", gradient_accumulation_steps=steps, precision=precision
    )


def accelerator(steps: int = 1, precision: str = "32-true") -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()  # all accelerators of a process share their precision and their window
    GradientState._reset_state()
    named = {"32-true": "no", "bf16-mixed": "bf16", "16-mixed": "fp16"}[precision]
    return Accelerator(
        cpu=True, gradient_accumulation_steps=steps, mixed_precision=named
    )


def plain(value: Any) -> Any:
    """A value with lists in the place of tensors, to be compared with ``==``."""
    if isinstance(value, Tensor):
        return str(value.dtype).removeprefix("torch."), value.detach().tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return type(value)(map(plain, value)) if isinstance(value, (list, tuple)) else value


def run_cases(make: Callable[..., Any], folder: str) -> dict[str, list[Any]]:
    """What each case gives, in the order of the processes."""
    found = {}
    made = make()  # kept, as the process group is its
    for name, function in CASES.items():
        torch.manual_seed(0)
        made.wait_for_everyone()
        own = Path(folder, name)
        own.mkdir(exist_ok=True)
        each: list[Any] = [None, None]
        torch.distributed.all_gather_object(each, plain(function(make, str(own))))
        found[name] = each
    made.end_training()
    return found


def loader_of(samples: int, **arguments: Any) -> DataLoader:
    return DataLoader(
        TensorDataset(torch.arange(float(samples))[:, None]), batch_size=4, **arguments
    )


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))


def weights_of(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


# -- processes --------------------------------------------------------------------------------------------------------


@case
def place(make: Any, folder: str) -> Any:
    made = make()
    return (
        made.process_index,
        made.local_process_index,
        made.num_processes,
        made.is_main_process,
        made.is_local_main_process,
        made.is_last_process,
        made.device.type,
        made.sync_gradients,
    )


@case
def decorators(make: Any, folder: str) -> Any:
    made = make()

    def name(greeting: str, end: str = "!") -> str:
        """Say it."""
        return f"{greeting} {made.process_index}{end}"

    wrapped = (
        made.on_main_process(name),
        made.on_local_main_process(name),
        made.on_last_process(name),
    )
    wrapped += (
        made.on_process(name, process_index=1),
        made.on_process(process_index=0)(name),
    )
    return [function("hello", end=".") for function in wrapped]


def in_turn(made: Any, first: Any, path: Path) -> list[str]:
    with first():
        if made.is_main_process:
            time.sleep(0.3)
        with path.open("a") as file:
            file.write(f"{made.process_index}\n")
    made.wait_for_everyone()
    return path.read_text().split()


@case
def main_process_first(make: Any, folder: str) -> Any:
    made = make()
    return in_turn(made, made.main_process_first, Path(folder, "global")), in_turn(
        made, made.local_main_process_first, Path(folder, "local")
    )


@case
def print_once(make: Any, folder: str) -> Any:
    with redirect_stdout(io.StringIO()) as out:
        make().print("a", 1, sep="-", end=";")
    return out.getvalue()


@case
def wait_for_everyone(make: Any, folder: str) -> Any:
    made, path = make(), Path(folder, "late")
    if made.is_last_process:
        time.sleep(0.3)
        path.touch()
    return made.wait_for_everyone(), path.exists()


@case
def triggers(make: Any, folder: str) -> Any:
    made = make()
    found = [made.check_trigger()]
    if made.is_last_process:
        made.set_trigger()
    return [*found, made.check_trigger(), made.check_trigger()]


# -- peers ------------------------------------------------------------------------------------------------------------


@case
def gather(make: Any, folder: str) -> Any:
    made = make()
    rank = made.process_index
    one, two = torch.arange(3) + 10 * rank, torch.arange(4.0).reshape(2, 2) + rank
    return (
        made.gather(one),
        made.gather(two),
        made.gather(torch.tensor(0.5 + rank)),
        made.gather(torch.tensor([rank == 0])),
        made.gather({"one": one, "more": {"two": two}}),
        made.gather((one, [two, one])),
    )


@case
def gather_objects(make: Any, folder: str) -> Any:
    made = make()
    mine = [
        f"{made.process_index}{letter}" for letter in "ab"[: made.process_index + 1]
    ]
    if isinstance(made, Engine):
        return made.gather_object(mine)
    from accelerate.utils import gather_object

    return gather_object(mine)


@case
def reduce(make: Any, folder: str) -> Any:
    made = make()
    value = torch.tensor([1.0, 2.0]) * (made.process_index + 1)
    nested = made.reduce({"a": value, "b": (value[0], [value])}, "mean")
    return (
        made.reduce(value),
        made.reduce(value, reduction="mean"),
        made.reduce(value, "max"),
        nested,
        value,
    )


@case
def reduce_with_scale(make: Any, folder: str) -> Any:
    return make().reduce(torch.tensor([1.0, 2.0]), "sum", scale=0.5).tolist()


@case
def reduce_none(make: Any, folder: str) -> Any:
    made = make()
    return made.reduce(torch.tensor([1.0 + made.process_index]), "none").tolist()


@case
def reduce_min(make: Any, folder: str) -> Any:
    made = make()
    return made.reduce(torch.tensor([1.0 + made.process_index]), "min").tolist()


@case
def reduce_mean_of_integers(make: Any, folder: str) -> Any:
    made = make()
    try:
        return made.reduce(torch.tensor([made.process_index]), "mean").tolist()
    except RuntimeError:
        return "RuntimeError"


@case
def pad_across_processes(make: Any, folder: str) -> Any:
    made = make()
    size = made.process_index + 1
    square = torch.ones(size, 2 * size)
    return (
        made.pad_across_processes(torch.arange(size) + 1),
        made.pad_across_processes(square, pad_index=-1),
        made.pad_across_processes(square, dim=1, pad_index=7),
        made.pad_across_processes(square, dim=-1, pad_first=True),
        made.pad_across_processes(square, pad_first=True, pad_index=3),
        made.pad_across_processes(square, dim=2),
        made.pad_across_processes({"a": (square, [torch.zeros(size)])}, pad_index=5),
        made.pad_across_processes(torch.tensor(1.0)),
    )


def split(make: Any, inputs: Any, **arguments: Any) -> Any:
    with make().split_between_processes(inputs, **arguments) as mine:
        return mine


@case
def split_between_processes(make: Any, folder: str) -> Any:
    numbers = torch.arange(5)
    table = torch.arange(10.0).reshape(5, 2)
    return [
        split(make, list("abcde")),
        split(make, list("abcd")),
        split(make, tuple("abcde")),
        split(make, numbers),
        split(make, {"text": list("abcde"), "table": table}),
        split(make, list("abcde"), apply_padding=True),
        split(make, numbers, apply_padding=True),
        split(make, table, apply_padding=True),
        split(make, {"text": list("abcde"), "table": table}, apply_padding=True),
    ]


@case
def split_fewer_than_processes(make: Any, folder: str) -> Any:
    return [
        split(make, ["a"]),
        split(make, torch.ones(1, 2)),
        split(make, ["a"], apply_padding=True),
        split(make, torch.ones(1, 2), apply_padding=True),
        split(make, []),
    ]


@case
def split_a_tuple_with_padding(make: Any, folder: str) -> Any:
    try:
        return split(make, ("a", "b", "c"), apply_padding=True)
    except TypeError:
        return "TypeError"


@case
def split_nothing_with_padding(make: Any, folder: str) -> Any:
    try:
        return split(make, [], apply_padding=True)
    except IndexError:
        return "IndexError"


@case
def split_a_string(make: Any, folder: str) -> Any:
    try:
        return split(make, "abc")
    except TypeError:
        return "TypeError"


@case
def split_a_dataset(make: Any, folder: str) -> Any:
    return len(split(make, TensorDataset(torch.arange(5))))


@case
def split_leaves_a_dict(make: Any, folder: str) -> Any:
    inputs = {"a": [1, 2, 3]}
    split(make, inputs)
    return inputs


@case
def split_values_of_different_lengths(make: Any, folder: str) -> Any:
    with pytest.raises(ValueError, match="length"):
        split(make, {"a": [1, 2], "b": [1]})


@case
def broadcast_into_a_tensor(make: Any, folder: str) -> Any:
    made = make()
    mine = torch.tensor([made.process_index])
    if isinstance(made, Engine):
        return made.broadcast(mine).tolist(), mine.tolist()
    from accelerate.utils import broadcast

    return broadcast(mine).tolist(), mine.tolist()


@case
def broadcast(make: Any, folder: str) -> Any:
    made = make()
    rank = made.process_index
    value = {"a": torch.tensor([rank, 7]), "b": [torch.full((2, 2), rank + 0.5)]}
    objects = [rank, {"name": f"rank {rank}"}, None]
    if isinstance(made, Engine):
        return (
            made.broadcast(value),
            made.broadcast(value, 1),
            made.broadcast(objects),
            made.broadcast(objects, 1),
        )
    from accelerate.utils import broadcast, broadcast_object_list

    copies = [
        {"a": value["a"].clone(), "b": [value["b"][0].clone()]} for _ in range(2)
    ]  # it writes into them
    return (
        broadcast(copies[0]),
        broadcast(copies[1], from_process=1),
        broadcast_object_list(list(objects)),
        broadcast_object_list(list(objects), from_process=1),
    )


# -- loaders ----------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        return iter(torch.arange(float(self.samples))[:, None])


def batches_of(loader: Any) -> list[list[float]]:
    return [
        (batch if isinstance(batch, Tensor) else batch[0]).flatten().tolist()
        for batch in loader
    ]


@case
def loader(make: Any, folder: str) -> Any:
    prepared = make().prepare(loader_of(56))
    return (
        len(prepared),
        len(prepared.dataset),
        batches_of(prepared),
        batches_of(prepared),
    )


@case
def loader_that_shuffles(make: Any, folder: str) -> Any:
    """Each sample once an epoch, and not in the same order."""
    made = make()
    loader = made.prepare(loader_of(56, shuffle=True))
    epochs = [
        torch.cat([made.gather(x) for (x,) in loader]).flatten().tolist()
        for _ in range(2)
    ]
    return (
        [sorted(epoch) for epoch in epochs],
        epochs[0] != epochs[1],
        epochs[0] != sorted(epochs[0]),
    )


@case
def loader_with_drop_last(make: Any, folder: str) -> Any:
    prepared = make().prepare(loader_of(101, drop_last=True))
    return len(prepared), batches_of(prepared)


@case
def loader_of_a_stream(make: Any, folder: str) -> Any:
    return batches_of(make().prepare(DataLoader(Stream(56), batch_size=4)))


@case
def loader_with_a_short_last_batch(make: Any, folder: str) -> Any:
    prepared = make().prepare(loader_of(101))
    return len(prepared), batches_of(prepared)[-1]


@case
def loader_with_an_incomplete_round(make: Any, folder: str) -> Any:
    prepared = make().prepare(loader_of(100))
    return len(prepared), batches_of(prepared)[-1]


@case
def loader_of_less_than_a_batch(make: Any, folder: str) -> Any:
    return batches_of(make().prepare(loader_of(3)))


@case
def anything_else_is_not_prepared(make: Any, folder: str) -> Any:
    made, thing = make(), object()
    return [item is thing for item in made.prepare(thing, thing)], made.prepare(
        thing
    ) is thing


@case
def skip_first_batches(make: Any, folder: str) -> Any:
    made = make(3)
    model, loader = made.prepare(nn.Linear(1, 1), loader_of(56))
    skipped = made.skip_first_batches(loader, 2)
    contents, flags = [], []
    for (x,) in skipped:
        with made.accumulate(model):
            contents.append(x.flatten().tolist())
            flags.append(made.sync_gradients)
    return (
        len(skipped),
        contents,
        flags,
        batches_of(loader),
        batches_of(made.skip_first_batches(loader_of(20), 3)),
        batches_of(made.skip_first_batches(loader, 0)),
        batches_of(made.skip_first_batches(loader, 9)),
    )


def gathered(
    make: Any, samples: int, function: Any, objects: bool = False, **arguments: Any
) -> list[Any]:
    made = make()
    loader = made.prepare(loader_of(samples, **arguments))
    return [
        made.gather_for_metrics(function(x), use_gather_object=objects)
        for (x,) in loader
    ]


@case
def gather_for_metrics(make: Any, folder: str) -> Any:
    found = [
        torch.cat(gathered(make, samples, lambda x: x)).flatten().tolist()
        for samples in (101, 100, 97, 96, 56, 3, 1)
    ]
    assert found[0] == [float(i) for i in range(101)]
    nested = gathered(make, 101, lambda x: {"x": x, "more": (x[:, 0].long(), [x > 50])})
    return found, nested, torch.cat(gathered(make, 101, lambda x: x, drop_last=True))


@case
def gather_for_metrics_of_objects(make: Any, folder: str) -> Any:
    def texts(x: Tensor) -> list[str]:
        return [f"sample {i:g}" for i in x.flatten().tolist()]

    made = make()
    with made.split_between_processes([f"prompt {i}" for i in range(5)]) as mine:
        prompts = made.gather_for_metrics(mine, use_gather_object=True)
    found = [
        [text for own in gathered(make, 101, texts, objects) for text in own]
        for objects in (False, True)
    ]
    assert found[0] == [f"sample {i}" for i in range(101)]
    return found, prompts


@case
def gather_for_metrics_of_numbers(make: Any, folder: str) -> Any:
    found = torch.cat(gathered(make, 104, lambda x: x.mean()))
    assert found.tolist() == [4 * batch + 1.5 for batch in range(26)]
    return found


@case
def gather_for_metrics_of_numbers_from_a_short_batch(make: Any, folder: str) -> Any:
    return torch.cat(gathered(make, 13, lambda x: x.mean())).tolist()


@case
def gather_for_metrics_of_numbers_in_an_incomplete_round(make: Any, folder: str) -> Any:
    return torch.cat(gathered(make, 12, lambda x: x.mean())).tolist()


@case
def gather_for_metrics_of_a_stream(make: Any, folder: str) -> Any:
    made = make()
    loader = made.prepare(DataLoader(Stream(101), batch_size=4))
    return torch.cat([made.gather_for_metrics(x) for x in loader]).flatten().tolist()


@case
def gather_for_metrics_of_the_batch(make: Any, folder: str) -> Any:
    made = make()
    return [made.gather_for_metrics(batch) for batch in made.prepare(loader_of(56))]


@case
def gather_for_metrics_of_a_pair_of_lists(make: Any, folder: str) -> Any:
    return gathered(
        make, 8, lambda x: ([f"{i:g}" for i in x[:, 0].tolist()], ["a"] * len(x))
    )


@case
def gather_for_metrics_of_boxes(make: Any, folder: str) -> Any:
    """A dict for each sample; here all have one box, as Accelerate would otherwise hang or fail."""
    return gathered(make, 8, lambda x: [{"boxes": row} for row in x[:2]])


@case
def reduce_numbers(make: Any, folder: str) -> Any:
    made = make()
    try:
        return made.reduce(made.process_index + 0.5), made.gather(
            made.process_index
        ).tolist()
    except TypeError:
        return "TypeError"


@case
def gather_for_metrics_of_dicts_as_objects(make: Any, folder: str) -> Any:
    made = make()
    return made.gather_for_metrics(
        {"rank": made.process_index, "text": "a"}, use_gather_object=True
    )


@case
def gather_for_metrics_of_tensors_as_objects(make: Any, folder: str) -> Any:
    made = make()
    found = made.gather_for_metrics(
        torch.arange(made.process_index + 1), use_gather_object=True
    )
    return [tensor.tolist() for tensor in found]


# -- windows ----------------------------------------------------------------------------------------------------------


def flags_of(made: Any, model: Any, loader: Any, stop: int | None = None) -> list[bool]:
    flags = []
    for _ in loader:
        with made.accumulate(model):
            flags.append(made.sync_gradients)
        if len(flags) == stop:
            break
    return flags


@case
def windows(make: Any, folder: str) -> Any:
    made = make(3)
    model, loader = made.prepare(nn.Linear(1, 1), loader_of(56))
    flags = flags_of(made, model, loader)
    assert flags == [False, False, True, False, False, True, True]
    return flags, flags_of(made, model, loader), made.gradient_accumulation_steps


@case
def windows_after_a_break(make: Any, folder: str) -> Any:
    made = make(3)
    model, loader = made.prepare(nn.Linear(1, 1), loader_of(56))
    return (
        flags_of(made, model, loader, stop=4),
        flags_of(made, model, loader),
        flags_of(made, model, loader),
    )


@case
def windows_of_a_stream(make: Any, folder: str) -> Any:
    made = make(3)
    model, loader = made.prepare(nn.Linear(1, 1), DataLoader(Stream(56), batch_size=4))
    return [flags_of(made, model, loader) for _ in range(2)]


@case
def windows_without_a_loader(make: Any, folder: str) -> Any:
    made = make(3)
    return flags_of(made, made.prepare(nn.Linear(1, 1)), range(8))


@case
def windows_around_an_evaluation(make: Any, folder: str) -> Any:
    made = make(2)
    model, train, val = made.prepare(nn.Linear(1, 1), loader_of(40), loader_of(24))
    flags = []
    for batch_idx, _ in enumerate(train):
        with made.accumulate(model):
            flags.append(made.sync_gradients)
        if batch_idx == 2:
            flags.append(len([made.gather_for_metrics(x) for (x,) in val]))
    return flags


@case
def windows_of_another_length_later(make: Any, folder: str) -> Any:
    made = make(1)
    model, loader = made.prepare(nn.Linear(1, 1), loader_of(56))
    first = flags_of(made, model, loader)
    made.gradient_accumulation_steps = 4
    return first, flags_of(made, model, loader), made.gradient_accumulation_steps


def follow_windows(make: Any, samples: int) -> Any:
    """Windows of three: the gradient before the step and whether it is gone, and the learning rate as two tell it."""
    made = make(3)
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model, optimizer, scheduler, loader = made.prepare(
        model, optimizer, scheduler, loader_of(samples)
    )
    gradients, rates = [], []
    for (x,) in loader:
        with made.accumulate(model):
            made.backward(model(torch.ones_like(x)).mean())
            gradients.append(next(model.parameters()).grad.item())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        gradients.append(next(model.parameters()).grad is None)
        rates.append((optimizer.param_groups[0]["lr"], *scheduler.get_last_lr()))
    return gradients, rates


@case
def gradients_of_windows(make: Any, folder: str) -> Any:
    return follow_windows(make, 48)[0]


@case
def learning_rates(make: Any, folder: str) -> Any:
    rates = follow_windows(make, 48)[1]
    assert all(
        of_the_optimizer == of_the_scheduler
        for of_the_optimizer, of_the_scheduler in rates
    )
    return [rate for rate, _ in rates]


def follow_weights(make: Any, samples: int) -> list[float]:
    """A weight after each micro-batch of three to a window, whose gradient is always 1."""
    made = make(3)
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    model, optimizer, loader = made.prepare(
        model, torch.optim.SGD(model.parameters(), lr=1.0), loader_of(samples)
    )
    weights = []
    for (x,) in loader:
        with made.accumulate(model):
            made.backward(model(torch.ones_like(x)).mean())
            optimizer.step()
            optimizer.zero_grad()
        weights.append(round(next(model.parameters()).item(), 5))
    return weights


@case
def weights_of_windows(make: Any, folder: str) -> Any:
    return follow_weights(make, 48)


@case
def weights_with_a_shorter_window(make: Any, folder: str) -> Any:
    return follow_weights(make, 56)


@case
def weights_with_an_incomplete_round(make: Any, folder: str) -> Any:
    """One step, on three batches: the last round has one for two processes."""
    made = make()
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    model, optimizer, loader = made.prepare(
        model, torch.optim.SGD(model.parameters(), lr=1.0), loader_of(12)
    )
    for (x,) in loader:
        made.backward(model(x).mean())
        optimizer.step()
        optimizer.zero_grad()
    return next(model.parameters()).item()


# -- steps ------------------------------------------------------------------------------------------------------------


def train(
    make: Any, steps: int = 1, precision: str = "32-true", clip: float | None = None
) -> Any:
    made = make(steps, precision)
    model = network()
    model, optimizer, loader = made.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=0.05), loader_of(64)
    )
    losses, norms, skipped = [], [], []
    for _ in range(2):
        for (x,) in loader:
            with made.accumulate(model):
                loss = nn.functional.mse_loss(model(x / 64), (x / 10).sin())
                made.backward(loss)
                if clip is not None and made.sync_gradients:
                    norms.append(made.clip_grad_norm_(model.parameters(), clip))
                optimizer.step()
                skipped.append(optimizer.step_was_skipped)
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses, norms, skipped, weights_of(model)


@case
def training(make: Any, folder: str) -> Any:
    return train(make)


@case
def training_with_accumulation(make: Any, folder: str) -> Any:
    return train(make, steps=4)


@case
def training_with_clipping(make: Any, folder: str) -> Any:
    return train(make, steps=2, clip=0.1)


@case
def training_in_bfloat16(make: Any, folder: str) -> Any:
    return train(make, steps=2, precision="bf16-mixed", clip=0.1)


@case
def clip_gradients(make: Any, folder: str) -> Any:
    made = make()
    model = network()
    model, optimizer = made.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    found = []
    for clip in (
        lambda: made.clip_grad_norm_(model.parameters(), 0.25),
        lambda: made.clip_grad_norm_(
            list(model.parameters()), max_norm=0.25, norm_type=1
        ),
        lambda: made.clip_grad_norm_(model.parameters(), 1e9, norm_type=float("inf")),
        lambda: made.clip_grad_value_(model.parameters(), 0.05),
    ):
        made.backward(model(torch.full((2, 1), 1.0 + made.process_index)).sum())
        found.append(
            (clip(), [parameter.grad.clone() for parameter in model.parameters()])
        )
        optimizer.zero_grad()
    return found


@case
def clip_the_gradient_of_one_parameter(make: Any, folder: str) -> Any:
    made = make()
    model = made.prepare(nn.Linear(1, 2, bias=False))
    made.backward(model(torch.full((1, 1), 4.0)).sum())
    weight = next(model.parameters())
    return made.clip_grad_norm_(weight, 2.0**0.5).item() > 0, round(
        weight.grad.norm().item(), 3
    )


@case
def clip_gradients_inside_a_window(make: Any, folder: str) -> Any:
    made = make(2)
    model = nn.Linear(1, 1, bias=False)
    model, optimizer = made.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    found = []
    for _ in range(2):
        with made.accumulate(model):
            made.backward(model(torch.full((2, 1), 4.0)).mean())
            norm = made.clip_grad_norm_(model.parameters(), 1.0)
            found.append(
                (
                    None if norm is None else norm.item(),
                    round(next(model.parameters()).grad.item(), 4),
                )
            )
            made.clip_grad_value_(model.parameters(), 0.5)
            found.append(next(model.parameters()).grad.item())
            optimizer.step()
            optimizer.zero_grad()
    return found


@case
def no_sync(make: Any, folder: str) -> Any:
    made = make()
    model = made.prepare(network())
    x = torch.full((2, 1), 1.0 + made.process_index)
    gradients = []
    with made.no_sync(model):
        made.backward(model(x).sum())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    made.backward(model(x).sum())
    gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    return gradients


@case
def batch_norm(make: Any, folder: str) -> Any:
    """What a model with running statistics gives in evaluation, after it has been trained on different batches."""
    made = make()
    model = nn.Sequential(network(), nn.BatchNorm1d(1))
    model, optimizer, loader = made.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loader_of(56)
    )
    for (x,) in loader:
        made.backward(model(x / 56).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return torch.cat(
            [made.gather_for_metrics(model(x)) for (x,) in made.prepare(loader_of(8))]
        )


@case
def backward_twice(make: Any, folder: str) -> Any:
    made = make()
    model = made.prepare(network())
    loss = model(torch.ones(2, 1)).sum()
    made.backward(loss, retain_graph=True)
    made.backward(loss)
    return [parameter.grad for parameter in model.parameters()]


@case
def two_models(make: Any, folder: str) -> Any:
    made = make(2)
    first, second = network(), network()
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.1) for model in (first, second)
    ]
    first, second, one, two = made.prepare(first, second, *optimizers)
    for step in range(4):
        with made.accumulate(first, second):
            x = torch.full((2, 1), 1.0 + made.process_index + step)
            made.backward(first(x).mean())
            one.step()
            one.zero_grad()
            made.backward(second(first(x)).mean())
            two.step()
            two.zero_grad()
            one.zero_grad()
    return weights_of(first), weights_of(second)


@case
def unwrap_model(make: Any, folder: str) -> Any:
    made, model = make(precision="bf16-mixed"), network()
    prepared = made.prepare(model)
    return (
        made.unwrap_model(prepared) is model,
        made.unwrap_model(model) is model,
        prepared.training,
    )


@case
def names_in_a_prepared_model(make: Any, folder: str) -> Any:
    return list(make().prepare(nn.Linear(1, 1)).state_dict())


@case
def class_of_a_prepared_model(make: Any, folder: str) -> Any:
    return isinstance(make().prepare(nn.Linear(1, 1)), nn.Linear)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.seen: list[str] = []

    def forward(self, x: Tensor) -> Any:
        output = self.layer(x)
        self.seen.append(str(output.dtype))
        return {"output": output, "more": (output, [output.argmax(1)]), "name": "a"}


@case
def precision(make: Any, folder: str) -> Any:
    made = make(precision="bf16-mixed")
    x = torch.ones(2, 2) + made.process_index
    torch.manual_seed(1)
    model = Several()
    prepared = made.prepare(model)
    output = prepared(x)
    made.backward(output["output"].sum())
    gradients = [parameter.grad for parameter in model.parameters()]
    with torch.no_grad():
        evaluated = prepared(x)
    with made.autocast():
        inside = x @ x
    return inside, x @ x, output, evaluated, gradients, model.seen


@case
def precision_of_32_bits(make: Any, folder: str) -> Any:
    made = make()
    x = torch.ones(2, 2)
    with made.autocast():
        return x @ x, made.prepare(Several())(x)["output"].dtype == torch.float32


@case
def half_precision_on_the_cpu(make: Any, folder: str) -> Any:
    made = make(precision="16-mixed")
    model = Several()
    model, optimizer = made.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = weights_of(model)
    made.backward(model(torch.ones(2, 2))["output"].sum() * float("inf"))
    optimizer.step()
    seen = made.unwrap_model(model).seen
    return (
        seen,
        optimizer.step_was_skipped,
        all(map(torch.equal, before, weights_of(model))),
    )


# -- state ------------------------------------------------------------------------------------------------------------


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


@case
def save_and_load_state(make: Any, folder: str) -> Any:
    made, counter = make(), Counter()
    made.register_for_checkpointing(counter)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=100)
    model, optimizer, scheduler = made.prepare(model, optimizer, scheduler)

    def step() -> None:
        made.backward(
            model(torch.full((2, 1), 1.0 + made.process_index)).square().mean()
        )
        optimizer.step()
        optimizer.zero_grad()
        counter.count += 1

    def everything() -> Any:
        state = optimizer.state_dict()
        return plain(
            [
                weights_of(model),
                state["state"],
                counter.count,
                scheduler.scheduler.last_epoch,
            ]
        )

    def draws() -> Any:
        return torch.rand(2).tolist(), random.random()

    torch.manual_seed(made.process_index)
    random.seed(made.process_index)
    step()
    made.save_state(os.path.join(folder, "state"))
    saved, drawn = everything(), draws()
    step()
    scheduler.step()
    changed = everything()
    assert changed != saved
    assert draws() != drawn
    made.load_state(os.path.join(folder, "state"))
    assert everything() == saved
    assert draws() == drawn
    step()
    return saved, drawn, everything()


@case
def loader_after_load_state(make: Any, folder: str) -> Any:
    made = make()
    loader = made.prepare(loader_of(56))
    for batch_idx, _ in enumerate(loader):
        if batch_idx == 1:
            made.save_state(os.path.join(folder, "state"))
            break
    made.load_state(os.path.join(folder, "state"))
    return [[batch[0] for batch in batches_of(loader)] for _ in range(2)]


@case
def register_what_has_no_state(make: Any, folder: str) -> Any:
    with pytest.raises(ValueError, match="state_dict"):
        make().register_for_checkpointing(object())


def saved_model(make: Any, folder: str, model: nn.Module) -> Any:
    from safetensors import safe_open
    from safetensors.torch import load_file

    made = make()
    made.save_model(made.prepare(model), folder)
    made.wait_for_everyone()
    path = os.path.join(folder, "model.safetensors")
    with safe_open(path, "pt") as file:
        return os.listdir(folder), load_file(path), file.metadata()


@case
def save_model(make: Any, folder: str) -> Any:
    return saved_model(make, folder, nn.Sequential(network(), nn.BatchNorm1d(1)))[:2]


@case
def save_model_names_its_format(make: Any, folder: str) -> Any:
    return (saved_model(make, folder, network())[2] or {}).get("format")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x))


@case
def save_model_with_tied_weights(make: Any, folder: str) -> Any:
    return saved_model(make, folder, Tied())[:2]


@case
def free_memory(make: Any, folder: str) -> Any:
    made = make()
    model = network()
    model, optimizer, loader = made.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loader_of(8)
    )
    return made.free_memory(model, optimizer), made.clear(loader), made.free_memory()


# -- memory -----------------------------------------------------------------------------------------------------------


def finder(made: Any) -> Any:
    if isinstance(made, Engine):
        return find_executable_batch_size
    from accelerate.utils import find_executable_batch_size as other

    return other


def sizes_tried(
    make: Any,
    message: str = "CUDA out of memory. Tried to allocate 2 GiB.",
    **arguments: Any,
) -> Any:
    made, sizes = make(), []

    @finder(made)(starting_batch_size=16, **arguments)
    def run(batch_size: int, scale: int) -> int:
        sizes.append(batch_size)
        if batch_size > 4:
            raise torch.OutOfMemoryError(message)
        return batch_size * scale

    return run(10), sizes


@case
def batch_size(make: Any, folder: str) -> Any:
    return sizes_tried(make)


@case
def batch_size_by_a_function_of_its_own(make: Any, folder: str) -> Any:
    given = []

    def reduce(*size: int) -> int:
        given.append(size)
        return 12 - 8 * (len(given) - 1)

    return sizes_tried(make, reduce_batch_size_fn=reduce), given


@case
def batch_size_after_an_error_in_other_words(make: Any, folder: str) -> Any:
    try:
        return sizes_tried(make, "no memory left")[1]
    except RuntimeError:
        return "RuntimeError"


@case
def batch_size_given_by_the_caller(make: Any, folder: str) -> Any:
    function = finder(make())(lambda batch_size: batch_size)
    with pytest.raises(TypeError, match=r"[Bb]atch.size"):
        function(3)


# -- the comparison ---------------------------------------------------------------------------------------------------


def both(value: Any) -> list[Any]:
    """The same in each of the two processes."""
    return [value, value]


# Of each case that differs: why, what the engine gives in the two processes, and what Accelerate 1.15 gives.
DIFFERENT: dict[str, tuple[str, list[Any], list[Any]]] = {
    "reduce_with_scale": (
        "Accelerate scales on XLA only",
        both([1.0, 2.0]),
        both([2.0, 4.0]),
    ),
    "reduce_none": (
        "nothing is to be reduced; Accelerate sums",
        [[1.0], [2.0]],
        both([3.0]),
    ),
    "reduce_min": (
        "Accelerate takes any word that it does not know for a sum",
        both([1.0]),
        both([3.0]),
    ),
    "reduce_mean_of_integers": (
        "a mean need not be an integer",
        both([0.5]),
        both("RuntimeError"),
    ),
    "gather_objects": (
        "a list is a process's value as any other is; Accelerate takes lists only, and joins them",
        both([["0a"], ["1a", "1b"]]),
        both(["0a", "1a", "1b"]),
    ),
    "broadcast_into_a_tensor": (
        "what is received is a new object, as it may be of another size; Accelerate writes into the tensor",
        [([0], [0]), ([0], [1])],
        both(([0], [0])),
    ),
    "split_a_tuple_with_padding": (
        "Accelerate appends a list to what it was given",
        [("a", "b"), ("c", "c")],
        both("TypeError"),
    ),
    "split_nothing_with_padding": (
        "all have as many; Accelerate looks for one to repeat",
        both([]),
        both("IndexError"),
    ),
    "split_a_string": (
        "what cannot be divided is an error; Accelerate gives all of it to each",
        both("TypeError"),
        both("abc"),
    ),
    "split_a_dataset": (
        "any dataset is divided; Accelerate gives all of it to each, unless it is of Hugging Face's package",
        [3, 2],
        both(5),
    ),
    "split_leaves_a_dict": (
        "what the caller has is left alone; Accelerate puts the parts into the caller's dict",
        both({"a": [1, 2, 3]}),
        [{"a": [1, 2]}, {"a": [3]}],
    ),
    "loader_with_a_short_last_batch": (
        "each sample once; Accelerate fills up with the first samples",
        [(13, [96.0, 97.0, 98.0, 99.0]), (13, [100.0])],
        [(13, [96.0, 97.0, 98.0, 99.0]), (13, [100.0, 0.0, 1.0, 2.0])],
    ),
    "loader_with_an_incomplete_round": (
        "a process without a batch runs its last one again, which counts nothing; Accelerate begins from the start",
        [(13, [96.0, 97.0, 98.0, 99.0]), (13, [92.0, 93.0, 94.0, 95.0])],
        [(13, [96.0, 97.0, 98.0, 99.0]), (13, [0.0, 1.0, 2.0, 3.0])],
    ),
    "loader_of_less_than_a_batch": (
        "a process that never had a batch runs another's, which counts nothing",
        both([[0.0, 1.0, 2.0]]),
        [[[0.0, 1.0, 2.0, 0.0]], [[1.0, 2.0, 0.0, 1.0]]],
    ),
    "loader_after_load_state": (
        "the data go on at the next batch; Accelerate's begin again",
        [
            [[16.0, 24.0, 32.0, 40.0, 48.0], [0.0, 8.0, 16.0, 24.0, 32.0, 40.0, 48.0]],
            [[20.0, 28.0, 36.0, 44.0, 52.0], [4.0, 12.0, 20.0, 28.0, 36.0, 44.0, 52.0]],
        ],
        [
            both([0.0, 8.0, 16.0, 24.0, 32.0, 40.0, 48.0]),
            both([4.0, 12.0, 20.0, 28.0, 36.0, 44.0, 52.0]),
        ],
    ),
    "gather_for_metrics_of_numbers_from_a_short_batch": (
        "the last batch is one sample, 12; Accelerate's mean has three of the first samples in it",
        both([1.5, 5.5, 9.5, 12.0]),
        both([1.5, 5.5, 9.5, 3.75]),
    ),
    "gather_for_metrics_of_numbers_in_an_incomplete_round": (
        "three batches give three numbers; Accelerate leaves out samples, and here keeps the first batch's mean again",
        both([1.5, 5.5, 9.5]),
        both([1.5, 5.5, 9.5, 1.5]),
    ),
    "gather_for_metrics_of_a_pair_of_lists": (
        "two lists, of all samples; Accelerate gives the processes' lists one after the other",
        both([([f"{i}" for i in range(8)], ["a"] * 8)]),
        both([[list("0123"), ["a"] * 4, list("4567"), ["a"] * 4]]),
    ),
    "gather_for_metrics_of_boxes": (
        "a list of all samples; Accelerate puts boxes of different samples together",
        both(plain([[{"boxes": torch.tensor([i])} for i in (0.0, 1.0, 4.0, 5.0)]])),
        both(
            plain(
                [
                    [
                        {"boxes": torch.tensor([0.0, 4.0])},
                        {"boxes": torch.tensor([1.0, 5.0])},
                    ]
                ]
            )
        ),
    ),
    "reduce_numbers": (
        "numbers are reduced and gathered as tensors are; Accelerate takes tensors only",
        both((2.0, [0, 1])),
        both("TypeError"),
    ),
    "gather_for_metrics_of_dicts_as_objects": (
        "the dicts of the processes; of a dict, Accelerate gives the keys",
        both([{"rank": 0, "text": "a"}, {"rank": 1, "text": "a"}]),
        both(["rank", "text", "rank", "text"]),
    ),
    "gather_for_metrics_of_tensors_as_objects": (
        "the tensors of the processes; Accelerate takes them apart",
        both([[0], [0, 1]]),
        both([0, 0, 1]),
    ),
    "learning_rates": (
        "a schedule counts optimizer steps; Accelerate steps it once for each process",
        both([0.5, 0.5, 0.25, 0.25, 0.25, 0.125]),
        both([0.5, 0.5, 0.125, 0.125, 0.125, 0.03125]),
    ),
    "weights_with_a_shorter_window": (
        "the last window holds one batch and is divided by one; Accelerate divides by three",
        both([0.0, 0.0, -1.0, -1.0, -1.0, -2.0, -3.0]),
        both([0.0, 0.0, -1.0, -1.0, -1.0, -2.0, -2.33333]),
    ),
    "weights_with_an_incomplete_round": (
        "its gradient is that of the one batch, 9.5; Accelerate's is the mean of that and of the first batch's, 1.5",
        both(-3.5 - 9.5),
        both(-3.5 - 5.5),
    ),
    "clip_the_gradient_of_one_parameter": (
        "a tensor is one parameter; Accelerate takes its rows for parameters, which have no gradients",
        both((True, 1.414)),
        both((False, 5.657)),
    ),
    "clip_gradients_inside_a_window": (
        "only the window's gradient is clipped; Accelerate clips what has gathered so far",
        both([(None, 2.0), 2.0, (4.0, 1.0), 0.5]),
        both([(2.0, 1.0), 0.5, (2.5, 1.0), 0.5]),
    ),
    "names_in_a_prepared_model": (
        "a prepared model has the model's names; Accelerate's is a wrapper",
        both(["weight", "bias"]),
        both(["module.weight", "module.bias"]),
    ),
    "class_of_a_prepared_model": (
        "a prepared model has the model's class; Accelerate's is a wrapper",
        both(True),
        both(False),
    ),
    "half_precision_on_the_cpu": (
        "half precision and its loss scale work on any device; Accelerate computes in single precision on the CPU",
        both((["torch.float16"], True, True)),
        both((["torch.float32"], False, False)),
    ),
    "batch_size": (
        "halved, which takes fewer attempts; Accelerate takes nine tenths",
        both((40, [16, 8, 4])),
        both((40, [16, 14, 12, 10, 9, 8, 7, 6, 5, 4])),
    ),
    "batch_size_by_a_function_of_its_own": (
        "the function is given the size that was too large; Accelerate gives it nothing",
        both(((40, [16, 12, 4]), [(16,), (12,)])),
        both(((40, [16, 12, 4]), [(), ()])),
    ),
    "batch_size_after_an_error_in_other_words": (
        "torch's error is known by its class; Accelerate reads its words",
        both([16, 8, 4]),
        both("RuntimeError"),
    ),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    pytest.importorskip("accelerate")
    return in_processes(
        2, run_cases, accelerator, str(tmp_path_factory.mktemp("theirs"))
    )


@pytest.fixture(scope="module")
def ours(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return in_processes(2, run_cases, engine, str(tmp_path_factory.mktemp("ours")))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in DIFFERENT])
def test_the_engine_gives_what_accelerate_gives(
    name: str, ours: dict[str, list[Any]], theirs: dict[str, list[Any]]
):
    assert ours[name] == theirs[name]


@pytest.mark.slow
def test_gradients_stay_local_in_no_sync_until_the_next_backward(
    ours: dict[str, list[Any]],
):
    (local, together), (other_local, other_together) = ours["no_sync"]
    assert local != other_local
    assert together == other_together


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENT)
def test_where_the_two_differ(
    name: str, ours: dict[str, list[Any]], theirs: dict[str, list[Any]]
):
    why, own, other = DIFFERENT[name]
    assert ours[name] == own, why
    assert theirs[name] == other, why
