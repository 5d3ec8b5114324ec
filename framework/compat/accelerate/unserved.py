"""What stands for those names of Accelerate's that nothing serves here."""

from __future__ import annotations

from functools import partial

from ..imports import unserved as unserved_by

unserved = partial(
    unserved_by, problem="of Accelerate is not served by loopwright.accelerate"
)
