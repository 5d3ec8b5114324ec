"""``python -m loopwright.accelerate.commands.merge``: one file of weights that FSDP wrote in parts."""

from __future__ import annotations

from ...framework.compat.accelerate.merge_command import (
    main,
    merge_command,
    merge_command_parser,
)

__all__ = ["main", "merge_command", "merge_command_parser"]

if __name__ == "__main__":
    main()
