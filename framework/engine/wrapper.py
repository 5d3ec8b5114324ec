"""The base of what the Engine returns in the place of a user's object, with the attributes of that."""

from __future__ import annotations

from typing import Any, ClassVar


class Wrapper:
    """Gives the attributes of the object that it wraps, beside its own.

    A subclass says in ``_wraps`` in which of its attributes it keeps that object.
    """

    _wraps: ClassVar[str]

    def __getattr__(self, name: str) -> Any:
        # While this is being unpickled or copied, the object is not there yet.
        if name == self._wraps:
            raise AttributeError(name)
        return getattr(getattr(self, self._wraps), name)
