"""Single features, each in a loop of a few lines."""

import contextlib

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    LoggerType,
    broadcast_object_list,
    find_executable_batch_size,
    gather_object,
    set_seed,
)
from torch.utils.data import DataLoader, TensorDataset


def get_parts(accelerator, batch_size=4, count=40):
    set_seed(5)
    x = torch.randn(count, 3)
    loader = DataLoader(TensorDataset(x, x.sum(1)), batch_size=batch_size, shuffle=True)
    model = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return accelerator.prepare(model, optimizer, loader)


def gradient_accumulation():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader = get_parts(accelerator)
    steps = 0
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = (model(x) - y).square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                steps += 1
            optimizer.step()
            optimizer.zero_grad()
    assert steps == -(-len(loader) // 2)


def early_stopping():
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = get_parts(accelerator)
    for step, (x, y) in enumerate(loader):
        loss = (model(x) - y).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 and accelerator.is_main_process:
            accelerator.set_trigger()
        if accelerator.check_trigger():
            break
    assert step == 1


def memory():
    accelerator = Accelerator(cpu=True)
    tried = []

    @find_executable_batch_size(starting_batch_size=16)
    def inner_training_loop(batch_size):
        accelerator.free_memory()
        tried.append(batch_size)
        if batch_size > 8:
            raise RuntimeError("CUDA out of memory.")
        get_parts(accelerator, batch_size)
        return batch_size

    assert inner_training_loop() <= 8
    assert tried[0] == 16


def multi_process_metrics():
    accelerator = Accelerator(cpu=True)
    model, _, _ = get_parts(accelerator)
    data = torch.arange(21.0)
    loader = accelerator.prepare(DataLoader(TensorDataset(data), batch_size=4))
    seen = []
    model.eval()
    for (values,) in loader:
        seen.append(accelerator.gather_for_metrics(values))
    assert torch.cat(seen).tolist() == data.tolist()


def distributed_inference():
    state = PartialState()
    with state.split_between_processes(["a", "b", "c"]) as prompts:
        results = [prompt.upper() for prompt in prompts]
    assert gather_object(results) == ["A", "B", "C"]
    shared = [state.process_index + 7]
    broadcast_object_list(shared)
    assert shared == [7]


def trackers():
    accelerator = Accelerator(
        cpu=True, log_with=[LoggerType.TENSORBOARD], project_dir="tracked"
    )
    accelerator.init_trackers("tracked", config={"lr": 0.1})
    accelerator.log({"loss": 1.0}, step=0)
    if accelerator.is_main_process:
        assert accelerator.get_tracker("tensorboard").name == "tensorboard"
    accelerator.end_training()


def ddp_options():
    handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[handler])
    model, optimizer, loader = get_parts(accelerator)
    no_sync = accelerator.no_sync if accelerator.num_processes > 1 else None
    for x, y in loader:
        with no_sync(model) if no_sync else contextlib.nullcontext():
            accelerator.backward((model(x) - y).square().mean())
        break
    optimizer.step()


if __name__ == "__main__":
    for feature in (
        gradient_accumulation,
        early_stopping,
        memory,
        multi_process_metrics,
        distributed_inference,
        trackers,
        ddp_options,
    ):
        AcceleratorState._reset_state(True)
        feature()
        print("done", feature.__name__)
