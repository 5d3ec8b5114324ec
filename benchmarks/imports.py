"""How long an import takes in a fresh interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys

from .contenders import installed, title
from .report import Table, verdict

MODULES = {
    "raw": "torch",
    "loopwright": "loopwright.framework",
    "lightning": "lightning.pytorch",
    "accelerate": "accelerate",
    "ignite": "ignite.engine",
}
TARGET = 0.15  # seconds over torch's own

SCRIPT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def seconds(module: str) -> float:
    command = (sys.executable, "-c", SCRIPT.format(module))
    return float(
        subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout.split()[-1]
    )


def compare(rounds: int) -> Table:
    names = installed()
    for name in names:
        seconds(
            MODULES[name]
        )  # compiles what has not been compiled yet, and fills the disk's cache
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            found[name].append(seconds(MODULES[name]))
    rows, figures = [], {}
    for name in names:
        total = statistics.median(found[name])
        added = statistics.median(
            own - torch for own, torch in zip(found[name], found["raw"], strict=True)
        )
        target = TARGET if name == "loopwright" else None
        rows.append([
            f"`{MODULES[name]}`", f"{total:.2f}", "" if name == "raw" else f"{added:.2f}", *verdict(added, target, " s")
        ])  # fmt: skip
        figures[name] = {"seconds": found[name], "added_s": added, "target_s": target}
    versions = ", ".join(
        title(name) for name in names if name not in ("raw", "loopwright")
    )
    notes = [
        f"Medians over {rounds} rounds of fresh interpreters{f'; {versions}' if versions else ''}."
    ]
    return Table(
        "Import", ("", "s", "over torch's, s", "target", ""), rows, figures, notes
    )
