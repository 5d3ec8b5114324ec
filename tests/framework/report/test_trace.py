"""The first place at which two modules, or two training steps, compute something else."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from loopwright.framework.report.diff import FirstStep, find_in_replay
from loopwright.framework.report.trace import (
    Trace,
    compare_traces,
    first_difference,
    traced,
)


def parts(eps: float = 1e-5, slope: float = 0.01) -> list[nn.Module]:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8, eps=eps), nn.Dropout(0.5))
    return [body, nn.LeakyReLU(slope), nn.Linear(8, 1)]


def net(eps: float = 1e-5, slope: float = 0.01) -> nn.Sequential:
    return nn.Sequential(*parts(eps, slope))


def test_the_innermost_module_that_computes_something_else_is_named():
    inputs = torch.randn(5, 4)
    assert first_difference(net(), net(), inputs) is None
    found = first_difference(net(), net(eps=1e-3), inputs)
    assert found is not None
    assert (found.what, found.name, found.inputs_differ) == ("outputs", "0.1", False)
    assert "'0.1' (LayerNorm)" in str(found)
    assert "inputs and its parameters are the same" in str(found)


def test_other_parameters_and_buffers_are_named_before_what_they_lead_to():
    other = net()
    with torch.no_grad():
        other.get_parameter("0.1.bias")[3] += 1e-6
        other.get_parameter("2.bias").add_(1)
    found = first_difference(net(), other, torch.randn(5, 4))
    assert found is not None
    assert (found.what, found.name, found.also) == ("state", "0.1.bias", 1)


def test_after_a_refactoring_that_has_changed_names_the_order_tells():
    def renamed(slope: float) -> nn.Module:
        body, act, head = parts(slope=slope)
        inner = OrderedDict(zip("abc", body.children(), strict=True))
        body = nn.Sequential(inner)
        return nn.Sequential(OrderedDict(body=body, act=act, head=head))

    inputs = torch.randn(5, 4)
    assert first_difference(net(), renamed(0.01), inputs) is None
    found = first_difference(net(), renamed(0.02), inputs)
    assert found is not None
    assert (found.name, found.other_name) == ("1", "act")


class Step:
    """Plain training; a step of it can be traced, as a replay does."""

    def __init__(
        self, lr: float = 0.1, factor: float = 1.0, changes_at: int = 0
    ) -> None:
        self.lr, self.factor, self.changes_at = lr, factor, changes_at

    def trace(self, number: int) -> Trace:
        module = net()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for step in range(1, number):
            self.train(module, optimizer, step)
        with traced(module) as trace:
            self.train(module, optimizer, number)
        return trace

    def train(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, step: int
    ) -> None:
        is_changed = step >= self.changes_at
        optimizer.param_groups[0]["lr"] = self.lr if is_changed else 0.1
        optimizer.zero_grad()
        loss: Tensor = module(torch.randn(6, 4)).square().mean()
        (loss * self.factor if is_changed else loss).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("other", "what", "name"),
    [
        (Step(), None, ""),
        (Step(factor=2.0), "gradients", "2.bias"),
        (Step(lr=0.2), "update", "0.0.weight"),
    ],
)
def test_gradients_and_the_update_are_compared_where_all_modules_agree(
    other: Step, what: str | None, name: str, tmp_path: Path
):
    trace = Step().trace(1)
    trace.write(tmp_path / "trace.json")
    assert Trace.read(tmp_path / "trace.json") == trace
    found = compare_traces(trace, other.trace(1))
    assert (found and found.what) == what
    assert found is None or found.name == name


def test_replays_find_the_first_step_between_two_that_have_fingerprints():
    asked = []
    first, second = Path("first"), Path("second")
    runs = {first: Step(), second: Step(factor=2.0, changes_at=6)}

    def replay(record: Path, step: int) -> Trace:
        asked.append(step)
        return runs[record].trace(step)

    difference = FirstStep(10, ["loss"], (0.1, 0.2), before=0)
    where = find_in_replay(first, second, difference, replay)
    assert where is not None
    assert where[0] == 6
    assert where[1].what == "gradients"
    assert asked == [5, 5, 7, 7, 6, 6], "it halves"
    runs[second] = deepcopy(runs[first])
    assert find_in_replay(first, second, difference, replay) is None
