"""How long a save of 2 GB holds the loop up when the tensors are on the device, and how much memory it takes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..report import Table
from ..saving import LIMIT_MEMORY, LIMIT_STALL, Watch, in_fresh_process, state_of
from .device import DEVICE, IS_REHEARSAL, begin_peak, peak, wait
from .loops import Plain, Work, run_lightning, run_loopwright
from .models import Steps
from .part import Part
from .rounds import (
    Contender,
    Found,
    Plan,
    gigabytes,
    judge,
    median,
    notes,
    peers,
    shown,
    take_turns,
)

LAYERS, WIDTH = 16, 64 if IS_REHEARSAL else 3232
# Weights and AdamW's two states of them.
BYTES = 4 * 3 * LAYERS * WIDTH**2
COPY = Contender("raw", full=False, note="one copy to the host")
BY_HAND = Contender("raw", full=False, note="torch.save")

# Begins to save to a path; returns what waits until the save is complete, or None where it is.
Save = Callable[[Path], Callable[[], Any] | None]
Note = Callable[[Save], None]


class SavedModel(Steps):
    def __init__(self) -> None:
        super().__init__(lambda batch_idx: None, full=False)
        layers = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.network = nn.Sequential(*layers)

    def loss(self, batch: Any) -> torch.Tensor:
        return self.network(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters())


class SavedPlain(SavedModel, Plain):
    pass


def loader() -> DataLoader[Any]:
    """The first batch makes the optimizer's states; at the second one, all is saved."""
    data: Any = torch.ones(2, WIDTH)
    return DataLoader(data, 1)


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    module = SavedPlain().to(DEVICE)
    optimizer = module.configure_optimizers()
    module.loss(torch.ones(1, WIDTH, device=DEVICE)).backward()
    optimizer.step()
    return module, optimizer


# -- who saves ------------------------------------------------------------------------------------------------------


def copy(note: Note) -> None:
    state = state_of(*trained())
    kept: list[Any] = []

    def save(path: Path) -> None:
        kept.append([tensor.to("cpu", copy=True) for tensor in state])

    note(save)


def by_hand(note: Note) -> None:
    module, optimizer = trained()

    def save(path: Path) -> None:
        states = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(states, path)

    note(save)


def in_training(run: Callable[[Work], None], save_of: Callable[[Any], Save]) -> Any:
    """A saver that is called at the second batch of a training, as a Trainer moves all to the CPU at the end."""

    def saver(note: Note) -> None:
        class Saving(SavedModel):
            def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
                if batch_idx == 1:
                    module: Any = self
                    note(save_of(module.trainer))

        def module(base: type) -> Any:
            return type("Model", (Saving, base), {})()

        run(Work(module, loader, "32-true", full=False, compiled="", folder=""))

    return saver


def save_of_loopwright(trainer: Any) -> Save:
    return lambda path: trainer.checkpoints.save(str(path)).finish


def save_of_lightning(trainer: Any) -> Save:
    return trainer.save_checkpoint


def accelerate(note: Note) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=IS_REHEARSAL)
    plain = SavedPlain()
    module, optimizer = accelerator.prepare(plain, plain.configure_optimizers())
    accelerator.backward(module(torch.ones(1, WIDTH, device=DEVICE), 0))
    optimizer.step()

    def save(path: Path) -> None:
        accelerator.save_state(str(path))

    note(save)


SAVERS: dict[str, Callable[[Note], None]] = {
    COPY.key: copy,
    BY_HAND.key: by_hand,
    Contender("loopwright", full=False).key: in_training(run_loopwright, save_of_loopwright),
    Contender("lightning", full=False).key: in_training(run_lightning, save_of_lightning),
    Contender("accelerate", full=False).key: accelerate,
}  # fmt: skip

# -- how it is measured ---------------------------------------------------------------------------------------------


def time_save(save: Save, path: Path) -> Found:
    wait()
    begin_peak()
    before = peak()
    with Watch() as memory:
        began = time.perf_counter()
        finish = save(path)
        wait()
        stalled = time.perf_counter() - began
        if finish is not None:
            finish()
        complete = time.perf_counter() - began
    return {
        "stall_s": stalled,
        "complete_s": complete,
        "host": memory.taken,
        "device": peak() - before,
    }


def save_twice(key: str) -> Found:
    """The second save may use memory that the first one has asked for."""
    found: Found = {}

    def note(save: Save) -> None:
        with tempfile.TemporaryDirectory() as folder:
            found.update(time_save(save, Path(folder, "first.ckpt")))
            next_one = time_save(save, Path(folder, "next.ckpt"))
        found["next_stall_s"] = next_one["stall_s"]

    SAVERS[key](note)
    return found


def measure_one(contender: Contender) -> Found:
    return in_fresh_process(save_twice, contender.key)


def contenders() -> list[Contender]:
    others = peers("loopwright", "lightning", "accelerate")
    return [COPY, BY_HAND, *(Contender(name, full=False) for name in others)]


def measure(plan: Plan) -> Iterator[Found]:
    yield from take_turns(contenders(), measure_one, plan)


def tabulate(found: list[Found]) -> Table:
    copied = median(found, COPY, "stall_s")
    cells: list[Sequence[str]] = []
    for row in contenders():
        stalled = median(found, row, "stall_s")
        taken = median(found, row, "host")
        is_ours = row.name == "loopwright"
        stall_target = LIMIT_STALL if is_ours else None
        memory_target = LIMIT_MEMORY if is_ours else None
        copies = stalled / copied if stalled is not None and copied else None
        memory = None if taken is None else taken / BYTES
        cells.append([
            row.title, shown(stalled, ".3f"), shown(copies, ".2f"), *judge(copies, stall_target),
            shown(median(found, row, "next_stall_s"), ".3f"), shown(median(found, row, "complete_s"), ".2f"),
            shown(memory, ".2f"), *judge(memory, memory_target), gigabytes(median(found, row, "device")),
        ])  # fmt: skip
    header = (
        "", "stall, s", "in copies", "target", "", "stall of the next, s", "complete, s", "host memory, in copies",
        "target", "", "device memory, GB",
    )  # fmt: skip
    return Table(
        "GPU: saving 2 GB from the device while the training goes on",
        header,
        cells,
        {"found": found},
        [
            f"{BYTES / 1e9:.3g} GB of weights and AdamW's states. Each save is in a fresh process; memory is the "
            "highest during the save, over that before. The first save also imports what it needs.",
            *notes(found, contenders()),
        ],
    )


PART = Part("saves", 70, measure, tabulate)
