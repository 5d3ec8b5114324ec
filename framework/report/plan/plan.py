"""What a plan says: the memory of a process under each choice, and which of them fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_KINDS = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "communication",
    "step",
)


@dataclass(frozen=True)
class Estimate:
    """The memory that one choice takes of each process's device, in bytes.

    The kinds are the most that each of them takes at any moment of a step. The peak is the most that all of them take
    together, so it is at most their sum.

    Attributes:
        strategy: its name.
        devices: number of processes.
        precision: its name.
        micro_batch: samples that a process computes at a time.
        activation_checkpointing: names of the classes whose activations are computed again in the backward pass.
        parameters: parameters and buffers, as far as this process keeps them.
        gradients: gradients that wait for the optimizer's step.
        optimizer: the optimizer's states; under DeepSpeed with the parameters in full precision.
        activations: what the forward pass keeps for the backward pass, the batch, and what operations make for a
            moment; None where the step could not be followed.
        communication: gathered parameters, buckets, and copies that collectives make.
        step: what the optimizer's step makes for a moment.
        peak: the most of all together; without the activations, if they are not known.
        moment: when that is: ``"forward"``, ``"backward"`` or ``"step"``.
        fits: whether the device has so much; None if that is not known.
        refused: why the strategy does not take such a module, or None.
        arguments: those of the Trainer, as they are typed.
        remarks: what else has to be changed for it.
    """

    strategy: str
    devices: int
    precision: str
    micro_batch: int
    activation_checkpointing: tuple[str, ...]
    parameters: int
    gradients: int
    optimizer: int
    activations: int | None
    communication: int
    step: int
    peak: int
    moment: str
    fits: bool | None
    refused: str | None
    arguments: str
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The memory that training a module takes, under several choices. ``print(plan)`` shows it as a table.

    Attributes:
        module: name of the module's class.
        num_parameters: how many numbers its parameters have, each counted once.
        num_trained: how many of them are trained.
        device: ``"cpu"`` or ``"cuda"``, or another kind of accelerator.
        memory: bytes that each process has; None if that is not known.
        usable: as many of them as the plan reckons with; the rest is left to what it does not count.
        estimates: one for each choice.
        notes: what was assumed, and what could not be found out.
    """

    module: str
    num_parameters: int
    num_trained: int
    device: str
    memory: int | None
    usable: int | None
    estimates: tuple[Estimate, ...]
    notes: tuple[str, ...]

    def __iter__(self) -> Iterator[Estimate]:
        return iter(self.estimates)

    @property
    def best(self) -> Estimate | None:
        """The first one that fits: they stand in the order of what they cost in speed, as the rows of the table do."""
        return next((each for each in self.estimates if each.fits), None)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as what JSON can hold."""
        best = self.best
        found = asdict(self)
        found["best"] = None if best is None else self.estimates.index(best)
        for each in found["estimates"]:
            for name in ("activation_checkpointing", "remarks"):
                each[name] = list(each[name])
        found["estimates"] = list(found["estimates"])
        found["notes"] = list(self.notes)
        return found

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title=self._title(), title_justify="left")
        header, rows = self._rows()
        for number, name in enumerate(header):
            table.add_column(name, justify="left" if number < 4 else "right")
        for row in rows:
            table.add_row(*row, style="bold green" if row[-1] == "yes" else None)
        return table

    def __str__(self) -> str:
        header, rows = self._rows()
        widths = [
            max(len(row[i]) for row in (header, *rows)) for i in range(len(header))
        ]
        lines = [self._title(), ""]
        for row in (header, ["-" * width for width in widths], *rows):
            cells = [
                cell.ljust(width) if number < 4 else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, "", *self.advice()])

    def advice(self) -> list[str]:
        """Return the lines below the table: what to type, and the notes."""
        lines = []
        best = self.best
        if best is not None:
            lines.append(f"Trainer({best.arguments})")
            lines += [f"  {remark}" for remark in best.remarks]
        elif self.usable is not None and any(each.fits is None for each in self):
            lines.append("Whether any of these fits is not known.")
        elif self.usable is not None:
            lines.append(
                f"None of these fits into {readable(self.usable)}: plan for more devices, a smaller micro-batch "
                "(micro_batches=[…]), or activation checkpointing."
            )
        return [*lines, *(f"- {note}" for note in self.notes)]

    def _title(self) -> str:
        text = f"{self.module}: {self.num_parameters:,} parameters"
        if self.num_trained != self.num_parameters:
            text += f", {self.num_trained:,} of them trained"
        if self.memory is None or self.usable is None:
            return f"{text}; memory of each process ({self.device})"
        return (
            f"{text}; memory of each process ({self.device}, {readable(self.usable)} of {readable(self.memory)} "
            "reckoned with)"
        )

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        header = [
            "strategy",
            "precision",
            "batch",
            "checkpointing",
            *_KINDS,
            "peak",
            "in",
            "fits",
        ]
        rows = []
        for each in self.estimates:
            kinds = [getattr(each, kind) for kind in _KINDS]
            rows.append(
                [
                    each.strategy
                    if each.devices == 1
                    else f"{each.strategy} × {each.devices}",
                    each.precision,
                    str(each.micro_batch),
                    ", ".join(each.activation_checkpointing) or "none",
                    *("unknown" if size is None else readable(size) for size in kinds),
                    readable(each.peak)
                    if each.activations is not None
                    else f"> {readable(each.peak)}",
                    each.moment,
                    _answer(each),
                ]
            )
        return header, rows


def _answer(estimate: Estimate) -> str:
    if estimate.refused is not None:
        return "refused"
    if estimate.fits is None:
        return "?"
    return "yes" if estimate.fits else "no"


def readable(size: float) -> str:
    """Return a number of bytes as people read it, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
