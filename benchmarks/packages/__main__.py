"""Run published packages on Lightning and, by `python -m loopwright.lightning`, on Loopwright; compare part by part.

The packages are installed in an environment of their own, which takes some minutes and gigabytes the first time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).parent

# What pip calls each package, by its program.
PACKAGES = {
    "chemprop": "chemprop",
    "darts": "darts",
    "gluonts": "gluonts[torch]",
    "mlcolvar": "mlcolvar",
    "nequip": "nequip",
    "neuralforecast": "neuralforecast",
    "pina": "pina-mathlab",
    "pytorch_forecasting": "pytorch-forecasting",
    "rl4co": "rl4co",
    "scvi": "scvi-tools",
}
# Relative: sums may be made in another order.
TOLERANCE = 1e-5


class Part(NamedTuple):
    """A result that a program has reported.

    Attributes:
        values: numbers.
        drawn: whether random numbers, or the order of shuffled data, decide them: the trainers draw differently.
    """

    values: list[float]
    drawn: bool


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.packages", description=__doc__
    )
    parser.add_argument(
        "package", nargs="*", help=f"which ones of {', '.join(PACKAGES)} (default: all)"
    )
    parser.add_argument(
        "--environment",
        type=Path,
        default=ROOT / "build" / "packages",
        help="folder of the environment; one that is there already is used as it is",
    )
    arguments = parser.parse_args()
    unknown = set(arguments.package) - PACKAGES.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return arguments


def prepare(environment: Path) -> Path:
    """Make the environment if it is not there; returns its interpreter."""
    python = environment / "bin" / "python"
    if python.exists():
        return python
    venv.create(environment, with_pip=True)
    pip = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "-c",
        ROOT / "constraints.txt",
    ]
    subprocess.run([*pip, "-e", ROOT, "lightning", "pytorch-lightning"], check=True)
    for requirement in PACKAGES.values():
        installed = subprocess.run([*pip, requirement], check=False)
        if installed.returncode:
            print(f"{requirement} cannot be installed here", flush=True)
    return python


def run(python: Path, package: str, on_loopwright: bool) -> tuple[int, dict[str, Part]]:
    """Run a package's program; returns its exit status and the parts that it has reported."""
    program = str(PROGRAMS / f"{package}_program.py")
    command = [str(python), program]
    if on_loopwright:
        command = [str(python), "-m", "loopwright.lightning", program]
    environment = {**os.environ, "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        ended = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
    if ended.returncode:
        print("\n".join(ended.stderr.splitlines()[-5:]), file=sys.stderr)
    parts = {}
    for line in ended.stdout.splitlines():
        if line.startswith("RESULT "):
            name, values, drawn = json.loads(line.removeprefix("RESULT "))
            parts[name] = Part(list(numbers(values)), drawn)
    return ended.returncode, parts


def numbers(values: Any) -> Iterator[float]:
    """All numbers of nested lists."""
    if isinstance(values, list):
        for value in values:
            yield from numbers(value)
    elif isinstance(values, (int, float)):
        yield float(values)


def verdict(there: Part | None, here: Part | None) -> str:
    """How a part went here, compared with Lightning."""
    if there is None:
        return "fails on Lightning"
    if here is None:
        return "FAILS"
    if len(there.values) != len(here.values):
        return "FAILS: another number of values"
    if there.values == here.values:
        return "equal to the last bit"
    pairs = list(zip(there.values, here.values, strict=True))
    size = max(abs(value) for value in there.values)
    difference = max(abs(a - b) for a, b in pairs) / (size or 1)
    if not all(math.isfinite(value) for value in here.values):
        return "FAILS: not finite"
    if there.drawn:
        return f"runs; by its own draws {difference:.1%} off"
    if difference <= TOLERANCE:
        return f"equal to {difference:.0e}"
    return f"FAILS: {difference:.1e} off"


def main() -> None:
    arguments = parse()
    python = prepare(arguments.environment)
    failed = 0
    counted = 0
    for package in arguments.package or PACKAGES:
        status, there = run(python, package, on_loopwright=False)
        if status and not there:
            print(f"{package}: not run, as it does not run on Lightning here")
            continue
        _, here = run(python, package, on_loopwright=True)
        for part in there:
            text = verdict(there.get(part), here.get(part))
            counted += 1
            failed += text.startswith("FAILS")
            print(f"{package:20} {part:16} {text}", flush=True)
    print(f"{counted - failed} of {counted} parts as on Lightning")
    raise SystemExit(failed > 0)


main()
