"""Weights in one safetensors file, for other programs: ``python -m loopwright.framework.export CHECKPOINT FILE``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch
from torch import Tensor

from .checkpoint.reader import load_checkpoint
from .checkpoint.storage import join, replacing
from .checkpoint.tensors import StagedTensors, is_plain
from .errors import CheckpointError
from .messages import configure, log

_DTYPES = {
    name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")
}


def export_weights(
    state: dict[str, Any],
    path: str,
    dtype: torch.dtype | None = None,
    share: bool = False,
) -> int:
    """Write a module's ``state_dict`` to one safetensors file, all at once.

    Args:
        state: what is no tensor in it is left out, with a line that names it.
        path: the file, local or any fsspec URL; one that is there is replaced.
        dtype: to convert floating-point tensors to.
        share: write tied weights once, under the first of their names; otherwise under each, for any program to find.

    Returns:
        How many bytes the tensors take.

    Raises:
        ValueError: if ``path`` is a folder.
        OSError: if it cannot be written.
    """
    if os.path.isdir(path) or not os.path.basename(path):
        raise ValueError(
            f"the weights go into one file, such as {join(path, 'model.safetensors')!r}; got {path!r}"
        )
    tensors = {
        name: _converted(value, dtype)
        for name, value in state.items()
        if is_plain(value)
    }
    if left_out := state.keys() - tensors.keys():
        log.warning(
            "Export: left out %s, no tensors that safetensors can hold",
            ", ".join(sorted(left_out)),
        )
    staged = StagedTensors(tensors, copy=False, share=share)
    with replacing(path) as file:
        staged.write(file)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _converted(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return (
        tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    )


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
    options = parser.parse_args(arguments)
    configure()
    try:
        state = load_checkpoint(options.checkpoint)["state_dict"]
        count = export_weights(state, options.file, _DTYPES.get(options.dtype))
    except (CheckpointError, OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(f"{options.file}: {len(state)} tensors, {count / 1e6:,.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
