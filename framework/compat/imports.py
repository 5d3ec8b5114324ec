"""Answers imports of another package with modules of ours, for programs that were written for that package."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# The attribute of a class that nothing serves: what to use.
UNSERVED = "unserved_advice"

_MISSING = object()


class _Face(ModuleType):
    """A module under another package's name, whose names are those of a module of ours."""

    def __init__(
        self,
        name: str,
        target: ModuleType,
        is_part: Callable[[str], Any],
        find_other: Callable[[str], Any],
    ) -> None:
        super().__init__(name, target.__doc__)
        self.__target = target
        self.__find_other = find_other
        # What names had before a program has set them.
        self.__before: dict[str, Any] = {}
        self.__is_part = is_part
        # Python calls only modules with a path packages, and imports from nothing else.
        self.__path__ = []
        self.__file__ = target.__file__
        self.__all__ = target.__all__

    def __getattr__(self, name: str) -> Any:
        is_dunder = name.startswith("__") and name.endswith("__")
        is_part = self.__is_part(f"{self.__name__}.{name}")
        if name in self.__all__ or is_dunder:
            value = getattr(self.__target, name)
            # A part has parts of its own, which a module of ours has not.
            if not (is_part and isinstance(value, ModuleType)):
                return value
        # `import a` is enough to use `a.b.c`, as other packages import their parts themselves.
        if is_part:
            return import_module(f"{self.__name__}.{name}")
        other = self.__find_other(name)
        if other is not None:
            return other
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # What a program sets in the other package's module is to have an effect here; a part that is imported is not.
        if name in vars(self).get("__all__", ()) and not isinstance(value, ModuleType):
            self.__before.setdefault(name, vars(self.__target).get(name, _MISSING))
            setattr(self.__target, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name not in self.__before:
            super().__delattr__(name)
            return
        before = self.__before.pop(name)
        if before is _MISSING:
            delattr(self.__target, name)
        else:
            setattr(self.__target, name, before)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *dir(self.__target)})


class ImportedFaces(MetaPathFinder, Loader):
    """Imports a package's paths as faces of modules of ours; for ``sys.meta_path``.

    Args:
        faces: by path of the package, or the beginning of one, the module of ours that has its names. A longer path is
            looked up first: ``"a.b"`` answers ``import a.b.c``, unless there is ``"a.b.c"``.
        words: what the package's paths consist of; with another word in it, a path is not there.
        find_other: what each of the paths has by a name, beside those of its module; None if there is nothing.
    """

    def __init__(
        self,
        faces: Mapping[str, str],
        words: Collection[str],
        find_other: Callable[[str], Any] = lambda name: None,
    ) -> None:
        self._faces = dict(faces)
        self._words = words
        self._find_other = find_other

    def target_of(self, name: str) -> str | None:
        """The module of ours that answers an import, or None if it is none of the package's."""
        path = name
        while path:
            if path in self._faces:
                return self._faces[path]
            path, _, word = path.rpartition(".")
            if word not in self._words:
                return None
        return None

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Find a face, for Python's import."""
        answer = self.target_of(fullname)
        if answer is None:
            return None
        spec = ModuleSpec(fullname, self, is_package=True)
        spec.origin = import_module(answer).__file__
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Make the face that was found."""
        answer = self.target_of(spec.name)
        assert answer is not None
        return _Face(spec.name, import_module(answer), self.target_of, self._find_other)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing more: the module of ours was imported when the face was made."""

    def is_installed(self) -> bool:
        """Whether it answers imports already."""
        return self in sys.meta_path


def import_parts_of(package: str) -> Callable[[str], Any]:
    """Return a package's ``__getattr__`` that imports its parts: ``import a`` is enough to use ``a.b.c``.

    Args:
        package: its name.
    """

    def getattr_of_package(name: str) -> Any:
        path = f"{package}.{name}"
        try:
            return import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return getattr_of_package


def require_not_imported(packages: Sequence[str], by: str) -> None:
    """Raise if a package has been imported already, so that its objects and ours would meet in one program.

    Args:
        packages: names of packages.
        by: the call that answers their imports from now on.

    Raises:
        RuntimeError: naming the first one.
    """
    for package in packages:
        module = sys.modules.get(package)
        if module is not None and not isinstance(module, _Face):
            raise RuntimeError(
                f"{package} has been imported before (from {module.__file__}), and a program cannot have both: call "
                f"{by} before anything imports {package}"
            )


def unserved(
    name: str, advice: str, problem: str = "is not there in Loopwright"
) -> Any:
    """A class that stands for one of another package, so that programs can import it though nothing serves it here.

    Args:
        name: what it is called there.
        advice: what to use here.
        problem: what the error says of it.

    Returns:
        A class. No object is one of its instances, and it raises ``NotImplementedError`` where one is to be made.
    """

    def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name} {problem}: {advice}")

    return type(name, (), {"__new__": refuse, "__doc__": advice, UNSERVED: advice})
