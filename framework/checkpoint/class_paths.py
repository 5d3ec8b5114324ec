"""Objects of a configuration that a command line has read: plain values, in which classes are named by their paths."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from ..errors import CheckpointError

# Hyperparameters that say what makes the object again, and of which class, where a user could choose one.
INSTANTIATOR = "_instantiator"
CLASS_PATH = "_class_path"


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
            raise CheckpointError(
                f"to make the objects that hyperparameters in the checkpoint name would import {module}: import it "
                "before, if you trust the file"
            )
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
    parsed = parser.parse_object({"module": given})
    # jsonargparse calls it with the class, and the arguments by name.
    maker: Any = (partial(make_of, config), class_type, False)
    return parser.instantiate(parsed, instantiators=[maker]).module
