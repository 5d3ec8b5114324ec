"""Folders of runs as the record writes them, with curves that nobody has to train for."""

from __future__ import annotations

import json
import math
import random
import struct
import zlib
from pathlib import Path
from typing import Any

START = 1_790_000_000.0
PHASES = {
    "data_wait": 0.06,
    "transfer": 0.01,
    "step": 0.62,
    "callbacks": 0.05,
    "validation": 0.18,
    "checkpoint": 0.05,
    "other": 0.03,
}


def write_run(
    folder: Path,
    *,
    seed: int = 0,
    epochs: int = 8,
    steps_an_epoch: int = 120,
    every: int = 10,
    learning_rate: float = 3e-3,
    ended: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a run's record.

    Args:
        folder: of the run.
        seed: of its curves' noise.
        epochs: how many.
        steps_an_epoch: how many.
        every: a row for so many steps.
        learning_rate: which bends its curves.
        ended: how it ended; None for a run that has no ending.
        **changes: to ``run.json``.
    """
    record = folder / "record"
    record.mkdir(parents=True)
    lines = list(rows(seed, epochs, steps_an_epoch, every, learning_rate))
    (record / "metrics.jsonl").write_text(
        "".join(f"{json.dumps(line)}\n" for line in lines)
    )
    total = epochs * steps_an_epoch * 0.05
    times = {name: part * total for name, part in PHASES.items()}
    content = {
        "schema": 1,
        "command": ["python", "train.py", "--lr", str(learning_rate)],
        "git": {"commit": "3f2a91c", "branch": "main", "dirty": False},
        "config": {
            "hyperparameters": {"learning_rate": learning_rate, "channels": 32, "seed": seed},
            "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": epochs, "gradient_clip_val": 1.0},
            "module": "train.ConvNet",
        },
        "packages": {"torch": "2.13.0", "numpy": "2.4.0", "loopwright": "0.1.0"},
        "hardware": {"cpu": "AMD EPYC", "cores": 2, "memory": "24 GiB"},
        "launcher": {"kind": "none"},
        "seeds": {"seed_everything": seed, "data": 11},
        "batch": {"per_device": 64, "processes": 1, "accumulate": 1, "effective": 64},
        "strategy": {"name": "single_device", "processes": 1},
        "precision": {"name": "32-true", "parameters": "float32"},
        "model": {"class": "ConvNet", "parameters": 30_250, "flops_per_sample": 2_345_678,
                  "layers": [{"name": "net", "type": "Sequential", "parameters": 30_250}]},
        "timings": {
            "start": {"model": 0.4, "data": 0.2},
            "run": times,
            "epochs": [
                {"epoch": epoch, **{name: value / epochs for name, value in times.items()}}
                for epoch in range(epochs)
            ],
        },
        "checkpoints": [
            {"path": f"/runs/digits/epoch={epoch}.ckpt", "step": (epoch + 1) * steps_an_epoch, "epoch": epoch,
             "scores": {"val_loss": 0.9 / (epoch + 1), "val_acc": 1 - 0.4 / (epoch + 2)}, "time": START + 60 * epoch}
            for epoch in range(0, epochs, 3)
        ],
        "warnings": ["The loop waits for its data for 12 % of its time: try num_workers=2."],
        "attempts": [],
        "ended": ended,
        **changes,
    }  # fmt: skip
    (record / "run.json").write_text(json.dumps(content))
    return folder


FINISHED = {"how": "finished", "why": "max_epochs=8", "exit_code": 0}


def rows(
    seed: int, epochs: int, steps_an_epoch: int, every: int, learning_rate: float
) -> Any:
    """Rows of a training that goes well."""
    noise = random.Random(seed)
    speed = learning_rate * 3
    row: dict[str, Any] = {}
    for step in range(1, epochs * steps_an_epoch + 1):
        epoch = (step - 1) // steps_an_epoch
        row = {"step": step, "epoch": epoch, "time": START + step * 0.05}
        loss = 2.3 * math.exp(-speed * step) + 0.05
        if step % every == 0:
            values = {
                "train_loss": loss * math.exp(noise.gauss(0, 0.18)),
                "monitor/lr-AdamW": learning_rate * math.sin(math.pi * step / (epochs * steps_an_epoch + 1)),
                "monitor/grad_norm": 3 * loss * math.exp(noise.gauss(0, 0.3)),
                "monitor/samples_per_second": 1280 + noise.gauss(0, 60),
                "monitor/memory": 410e6 + 5e6 * (step > 50),
                **{f"monitor/{name}": part + noise.random() * 0.01 for name, part in PHASES.items()},
            }  # fmt: skip
            yield {**row, "values": values}
        if step % steps_an_epoch == 0:
            values = {
                "val_loss": loss * 1.1 + noise.gauss(0, 0.02),
                "val_acc": 0.99 - 0.9 * math.exp(-speed * step),
                "train_acc": 0.97 - 0.9 * math.exp(-speed * step),
            }
            yield {**row, "values": values}
    yield {**row, "values": {"test_acc": 0.9741 - noise.random() * 0.02}}


def add_rows(folder: Path, lines: list[dict[str, Any]]) -> None:
    """Add lines to a run's metrics."""
    with (folder / "record" / "metrics.jsonl").open("a") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in lines)


def png(width: int, height: int, seed: int = 0) -> bytes:
    """A small grey picture."""
    noise = random.Random(seed)
    pixels = b"".join(
        b"\0" + bytes(noise.randrange(256) for _ in range(width)) for _ in range(height)
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (
        chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(pixels))
        + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + parts


def add_media(folder: Path) -> None:
    """Add pictures, a text, a table and a histogram to a run's record."""
    record = folder / "record"
    (record / "media").mkdir()
    lines: list[dict[str, Any]] = []
    for step in (120, 240, 360):
        for number in range(3):
            name = f"media/digits-{step}-{number}.png"
            (record / name).write_bytes(png(8, 8, step + number))
            lines.append(
                {
                    "step": step,
                    "name": "digits",
                    "kind": "image",
                    "file": name,
                    "caption": f"label {number}",
                }
            )
        lines.append(
            {
                "step": step,
                "name": "weights",
                "kind": "histogram",
                "value": {
                    "counts": [1, 4, 9, 14, 8, 3, 1],
                    "edges": [-3, -2, -1, 0, 1, 2, 3, 4],
                },
            }
        )
    lines.append(
        {
            "step": 120,
            "name": "sample",
            "kind": "text",
            "value": "Once upon a time </script><b>there</b> was a loss.",
        }
    )
    lines.append(
        {
            "step": 120,
            "name": "confusion",
            "kind": "table",
            "value": {
                "columns": ["digit", "right", "wrong"],
                "rows": [[0, 27, 0], [1, 28, 1.5]],
            },
        }
    )
    (record / "media.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))  # fmt: skip
