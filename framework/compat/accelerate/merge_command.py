"""Accelerate's command ``merge-weights``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from .fsdp_weights import merge_fsdp_weights

_DESCRIPTION = "Make one file of weights that FSDP wrote in parts (SHARDED_STATE_DICT). All of them must fit in memory."


def merge_command_parser(subparsers: Any = None) -> ArgumentParser:
    """The command's arguments.

    Args:
        subparsers: those of a program of which it is a command; else a parser of its own is made.
    """
    if subparsers is None:
        parser = ArgumentParser(description=_DESCRIPTION)
    else:
        parser = subparsers.add_parser("merge-weights", description=_DESCRIPTION)
        parser.set_defaults(func=merge_command)
    parser.add_argument("checkpoint_directory", help="The folder of the parts.")
    parser.add_argument("output_path", help="The folder of the merged weights.")
    parser.add_argument(
        "--unsafe_serialization",
        action="store_true",
        help="Write pytorch_model.bin, and not model.safetensors.",
    )
    parser.add_argument(
        "--remove_checkpoint_dir",
        action="store_true",
        help="Remove the parts afterwards.",
    )
    return parser


def merge_command(args: Namespace) -> None:
    """Run the command.

    Args:
        args: as :func:`merge_command_parser` has read them.
    """
    merge_fsdp_weights(
        args.checkpoint_directory,
        args.output_path,
        not args.unsafe_serialization,
        args.remove_checkpoint_dir,
    )


def main() -> None:
    """Run the command with this process's arguments."""
    merge_command(merge_command_parser().parse_args())
