from __future__ import annotations

from typing import Any

import pytest

from loopwright.callbacks import Callback, LambdaCallback
from tests.callbacks.scripted import fit


def test_functions_are_called_like_methods():
    called: list[tuple[str, Any]] = []
    fit(
        LambdaCallback(
            setup=lambda trainer, module, stage: called.append(("setup", stage)),
            on_train_batch_end=lambda trainer, module, outputs, batch, batch_idx: (
                called.append(("batch", batch_idx))
            ),
            teardown=lambda trainer, module, stage: called.append(("teardown", stage)),
        ),
        max_epochs=1,
        validate=False,
    )
    assert called == [
        ("setup", "fit"),
        *(("batch", index) for index in range(4)),
        ("teardown", "fit"),
    ]


def test_every_hook_of_the_contract_is_taken():
    hooks = [name for name in vars(Callback) if name.startswith("on_")]
    assert len(hooks) > 30
    LambdaCallback(**{name: print for name in [*hooks, "setup", "teardown"]})


def test_two_of_them_share_a_trainer():
    fit(
        LambdaCallback(on_fit_start=lambda *_: None),
        LambdaCallback(on_fit_end=lambda *_: None),
        max_epochs=1,
    )


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("on_train_epoch_ends", "on_train_epoch_end"), ("set_up", "setup")],
)
def test_an_unknown_hook_is_an_error_that_names_the_nearest(name: str, nearest: str):
    with pytest.raises(
        TypeError, match=f"no hook '{name}'; the nearest is '{nearest}'"
    ):
        LambdaCallback(**{name: print})


def test_a_value_that_is_no_function_is_an_error():
    with pytest.raises(
        TypeError, match=r"on_fit_end=\.\.\.\) must be a function; got 3"
    ):
        LambdaCallback(on_fit_end=3)  # type: ignore[arg-type] # that is the point
