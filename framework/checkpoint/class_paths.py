"""Objects of a configuration that a command line has read: plain values, in which classes are named by their paths."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.abc import MetaPathFinder
from threading import get_ident
from typing import Any

from ..errors import CheckpointError

# Hyperparameters that say what makes the object again, and of which class, where a user could choose one.
INSTANTIATOR = "_instantiator"
CLASS_PATH = "_class_path"


# What jsonargparse may import of its own while it parses.
_ITS_OWN = {
    *sys.stdlib_module_names,
    "docstring_parser",
    "jsonargparse",
    "typeshed_client",
    "yaml",
}


class _Refusal(MetaPathFinder):
    """Refuses that this thread imports a package which the program has not imported itself."""

    def __init__(self) -> None:
        self._thread = get_ident()
        self.refused = ""

    def find_spec(self, fullname: str, *args: Any) -> None:
        """Raise for such a package; others are found elsewhere."""
        package = fullname.partition(".")[0]
        is_known = package in sys.modules or package in _ITS_OWN
        if get_ident() == self._thread and not is_known:
            self.refused = fullname
            raise _would_import(fullname)


@contextmanager
def _importing_no_packages() -> Iterator[None]:
    """A context in which no package is imported that is not imported yet.

    Raises:
        CheckpointError: if one was to be.
    """
    refusal = _Refusal()
    sys.meta_path.insert(0, refusal)
    try:
        yield
    except Exception as error:
        if not refusal.refused or isinstance(error, CheckpointError):
            raise
        # jsonargparse takes it for an argument that is wrong.
        raise _would_import(refusal.refused) from error
    finally:
        sys.meta_path.remove(refusal)


def _would_import(module: str) -> CheckpointError:
    return CheckpointError(
        f"to make the objects that hyperparameters in the checkpoint name would import {module}: import it "
        "before, if you trust the file"
    )


def make_of(
    config: Mapping[str, Any], kind: type[Any], *args: Any, **kwargs: Any
) -> Any:
    """Make an object whose hyperparameters are the values of a configuration, and not its constructor's arguments.

    Args:
        config: plain values by argument.
        kind: the object's class.
        *args: what was made of them.
        **kwargs: the same by name.
    """
    made = kind.__new__(kind, *args, **kwargs)
    made.__dict__["_hparams_config"] = config
    made.__init__(*args, **kwargs)
    return made


def instantiate_module(class_type: type[Any], config: Mapping[str, Any]) -> Any:
    """Make an object of the hyperparameters that a checkpoint holds of it.

    Args:
        class_type: its class, or a base of the one that the configuration names.
        config: its arguments by name; in them, ``{"class_path": …, "init_args": …}`` stands for an object.

    Returns:
        The object.

    Raises:
        CheckpointError: if that would run code of a module which the program has not imported itself.
    """
    from jsonargparse import ArgumentParser

    for module in re.findall(r"class_path': '([\w.]+)\.\w+'", str(config)):
        if module not in sys.modules:
            raise _would_import(module)
    parser = ArgumentParser(exit_on_error=False)
    given: Any = dict(config)
    given.pop(INSTANTIATOR, None)
    class_path = given.pop(CLASS_PATH, None)
    if class_path is None:
        parser.add_class_arguments(class_type, "module", fail_untyped=False)
    else:
        parser.add_subclass_arguments(class_type, "module", fail_untyped=False)
        given = {"class_path": class_path, "dict_kwargs": given}
        module, _, name = class_path.rpartition(".")
        class_type = getattr(sys.modules[module], name)
    # A class may also be named in a text, which is read only here.
    with _importing_no_packages():
        parsed = parser.parse_object({"module": given})
    # jsonargparse calls it with the class, and the arguments by name.
    maker: Any = (partial(make_of, config), class_type, False)
    return parser.instantiate(parsed, instantiators=[maker]).module
