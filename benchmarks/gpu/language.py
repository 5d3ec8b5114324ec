"""A step of a language model in the shape of GPT-2 small: as it is, and compiled."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from loopwright.callbacks.peak_flops import available_flops

from ..report import Table
from .device import DEVICE, IS_REHEARSAL
from .loops import Plain
from .models import LANGUAGE, LanguageModel, token_loader
from .part import Part
from .rounds import (
    EVERYBODY,
    Clock,
    Contender,
    Found,
    Plan,
    gigabytes,
    median,
    mixed,
    notes,
    peers,
    ratio,
    shown,
    take_turns,
    train,
)

FIRST, EVERY, WINDOWS = (2, 1, 2) if IS_REHEARSAL else (10, 10, 5)
PRECISION = "bf16-mixed"
HOW = {
    ("raw", "network"): "the network",
    ("raw", "step"): "the loss, and the optimizer's step",
    ("loopwright", "network"): "compile=True",
    ("loopwright", "step"): 'compile="step"',
    ("lightning", "network"): "the network",
    ("accelerate", "network"): "the network",
}


def contenders(is_compiled: bool) -> list[Contender]:
    if not is_compiled:
        return [Contender(name) for name in peers(*EVERYBODY)]
    ours = ("raw", "loopwright")
    # Those of the Trainer come first, in case the time is up before all of them have been compiled.
    rows = [Contender(name, how) for how in ("network", "step") for name in ours]
    return rows + [Contender(name, "network") for name in peers("lightning", "accelerate")]  # fmt: skip


def count_flops() -> float:
    """Of a step, as torch counts them: attention counts as if it looked ahead, too."""
    module = mixed(LanguageModel)(Plain, lambda batch_idx: None, False).to(DEVICE)
    batch = [part.to(DEVICE) for part in next(iter(token_loader(1)))]
    with FlopCounterMode(display=False) as counter:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = module.loss(batch)
        loss.backward()
    return float(counter.get_total_flops())


def measure_one(contender: Contender) -> Found:
    clock = Clock(FIRST, EVERY, WINDOWS)
    data = partial(token_loader, clock.steps)
    said = train(contender, mixed(LanguageModel), data, clock, PRECISION)
    return {**clock.found(), **said}


def measure(is_compiled: bool, plan: Plan) -> Iterator[Found]:
    if IS_REHEARSAL:
        # Compiling takes minutes on a small CPU: here it is asked for, and not done.
        torch.compiler.set_stance("force_eager")
    yield {
        "flops": count_flops(),
        "available": available_flops(DEVICE, torch.bfloat16),
    }
    yield from take_turns(contenders(is_compiled), measure_one, plan)


def tabulate(is_compiled: bool, found: list[Found]) -> Table:
    rows = contenders(is_compiled)
    counted = next((each for each in found if "flops" in each), {})
    available = counted.get("available")
    cells = []
    for row in rows:
        by_hand = Contender("raw", row.compiled)
        seconds = median(found, row, "step_s")
        rate = 1 / seconds if seconds else None
        share = None
        if rate and available:
            share = rate * counted["flops"] / available
        cells.append([
            row.title, HOW.get((row.name, row.compiled), "nothing"), shown(seconds, ".2f", 1e3),
            ratio(found, row, by_hand), shown(rate, ",.0f", LANGUAGE.tokens), shown(share, ".1%"),
            gigabytes(median(found, row, "peak")), shown(median(found, row, "start_s"), ".1f"),
        ])  # fmt: skip
    kind = "compiled" if is_compiled else "not compiled"
    if available:
        flops, possible = counted["flops"] / 1e12, available / 1e12
        about_peak = f"MFU: a step has {flops:.2f} · 10¹² operations, of {possible:g} · 10¹² a second at most."
    else:
        about_peak = (
            "What this device could do at most is not known, so there is no MFU."
        )
    about_compiling = ""
    if is_compiled:
        about_compiling = "What one has compiled, torch may find in its cache for the next, which then starts sooner."
    if is_compiled and IS_REHEARSAL:
        about_compiling = "Nothing was compiled in this rehearsal."
    header = (
        "", "compiled", "ms a step", "ratio", "tokens/s", "MFU", "peak, GB", f"to step {FIRST}, s",
    )  # fmt: skip
    return Table(
        f"GPU: a step of a model in the shape of GPT-2 small, bf16-mixed, {kind}",
        header,
        cells,
        {"found": found},
        [
            f"{LANGUAGE}. The ratio is that to the raw loop which compiles the same. The Trainers log, draw a bar and "
            "save; Accelerate logs and draws one; the raw loop does none of it.",
            *filter(None, (about_peak, about_compiling)),
            *notes(found, rows),
        ],
    )


EAGER = Part("language", 50, partial(measure, False), partial(tabulate, False))
COMPILED = Part(
    "language_compiled", 215, partial(measure, True), partial(tabulate, True)
)
