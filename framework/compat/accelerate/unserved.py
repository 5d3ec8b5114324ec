"""What stands for those names of Accelerate's that nothing serves here."""

from __future__ import annotations

from typing import Any

from ..imports import UNSERVED


def unserved(name: str, advice: str) -> Any:
    """A class that stands for something of Accelerate's, so that programs can import it and maybe not use it.

    Args:
        name: what it is called there.
        advice: what to use here.

    Returns:
        A class that raises ``NotImplementedError`` when it is called.
    """

    def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{name} of Accelerate is not served by loopwright.accelerate: {advice}"
        )

    return type(name, (), {"__new__": refuse, "__doc__": advice, UNSERVED: advice})
