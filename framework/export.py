"""Weights in one safetensors file, for other programs: ``python -m loopwright.framework.export CHECKPOINT FILE``."""

from __future__ import annotations

import argparse
import sys

import torch

from .checkpoint.reader import load_checkpoint
from .checkpoint.weights import export_weights
from .errors import CheckpointError
from .from_checkpoint import with_weight_set
from .messages import configure

_DTYPES = {
    name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")
}


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, and export."""
    parser = argparse.ArgumentParser(
        prog="python -m loopwright.framework.export",
        description="Write the weights of a checkpoint to one safetensors file. Nothing in it can run code.",
    )
    parser.add_argument(
        "checkpoint",
        help="a checkpoint, a pointer such as last.ckpt, or a Lightning .ckpt; or its URL",
    )
    parser.add_argument("file", help="the safetensors file to write, or its URL")
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="convert floating-point tensors"
    )
    parser.add_argument(
        "--weight-set", help='write other weights that it holds, such as "ema"'
    )
    options = parser.parse_args(arguments)
    configure()
    try:
        checkpoint = load_checkpoint(options.checkpoint)
        state = with_weight_set(checkpoint, options.weight_set, options.checkpoint)
        count = export_weights(state, options.file, _DTYPES.get(options.dtype))
    except (CheckpointError, OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(f"{options.file}: {len(state)} tensors, {count / 1e6:,.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
