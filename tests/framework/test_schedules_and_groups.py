"""Schedules of the learning rate and groups of parameters, for configure_optimizers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.optimization import (
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from loopwright.framework import (
    cosine_schedule,
    linear_schedule,
    parameter_groups,
    wsd_schedule,
)
from tests.framework.models import Linear, loader, quiet


def rates(scheduler: Any, steps: int = 25) -> list[float]:
    """The learning rates of so many steps."""
    found = []
    for _ in range(steps):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.5)


def test_rates_are_those_of_transformers() -> None:
    """Of which users know the formulas; and after the end, where the last rate stays."""
    pairs = [
        (
            linear_schedule(sgd(), 20, warmup=5),
            get_linear_schedule_with_warmup(sgd(), 5, 20),
        ),
        (
            cosine_schedule(sgd(), 20, warmup=0.25),
            get_cosine_schedule_with_warmup(sgd(), 5, 20),
        ),
        (
            wsd_schedule(sgd(), 20, warmup=3, decay=7, final=0.1, shape="1-sqrt"),
            get_wsd_schedule(
                sgd(),
                3,
                7,
                num_training_steps=20,
                min_lr_ratio=0.1,
                decay_type="1-sqrt",
            ),
        ),
    ]
    for index, (ours, theirs) in enumerate(pairs):
        expected = rates(theirs, 20)
        if index == 2:
            # There, the warm-up begins at the final rate.
            expected[:3] = [0.0, 0.5 / 3, 1.0 / 3]
        assert rates(ours, 20) == pytest.approx(expected, abs=1e-9)


def test_the_final_rate_is_reached_and_stays() -> None:
    made = [
        linear_schedule(sgd(), 20, warmup=4, final=0.2),
        cosine_schedule(sgd(), 20, warmup=4, final=0.2),
        wsd_schedule(sgd(), 20, warmup=4, decay=0.5, final=0.2, shape="linear"),
        wsd_schedule(sgd(), 20, warmup=4, decay=0.5, final=0.2, shape="cosine"),
    ]
    for schedule in made:
        found = rates(schedule)
        assert found[:5] == [0.0, 0.125, 0.25, 0.375, 0.5]
        assert max(found) == 0.5
        assert found[20:] == pytest.approx([0.1] * 5)
    assert rates(wsd_schedule(sgd(), 20, warmup=4, decay=0))[4:] == [0.5] * 21


def test_a_trainer_steps_them_by_steps_and_resumes_them(tmp_path: Path) -> None:
    """Without a word about it in configure_optimizers; and their state is plain numbers."""

    def configure(module: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        steps = module.trainer.estimated_stepping_batches
        return [optimizer], [linear_schedule(optimizer, steps, warmup=2)]

    class Keeps(Linear):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            found.append(optimizer.param_groups[0]["lr"])

    found: list[float] = []
    trainer = quiet(max_epochs=2, max_steps=-1)
    trainer.fit(Keeps(optimizers=configure), loader(5))
    whole = found.copy()
    assert len(whole) == 10
    assert whole == rates(linear_schedule(sgd(), 10, warmup=2), 10)
    json.dumps(trainer.lr_scheduler_configs[0].scheduler.state_dict())
    found.clear()
    for max_epochs, path in ((1, None), (2, tmp_path / "cut")):
        trainer = quiet(max_epochs=max_epochs)
        trainer.fit(
            Keeps(
                optimizers=lambda module: (
                    [o := torch.optim.SGD(module.parameters(), lr=0.5)],
                    [linear_schedule(o, 10, warmup=2)],
                )
            ),
            loader(5),
            ckpt_path=path,
        )
        trainer.save_checkpoint(tmp_path / "cut")
    assert found == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": math.inf}, "num_steps must be.*got inf.*without max_steps"),
        ({"num_steps": 0}, "got 0"),
        ({"num_steps": "10"}, "num_steps must be.*got '10'"),
        ({"num_steps": 10, "warmup": 11}, "warmup must be.*num_steps=10.*got 11"),
        ({"num_steps": 10, "warmup": 1.5}, "got 1.5"),
        ({"num_steps": 10, "final": 2}, "final must be a fraction.*got 2"),
        ({"num_steps": 10, "warmup": 5, "decay": 6}, "are 5 and 6 steps, more than"),
        ({"num_steps": 10, "shape": "square"}, "shape must be one of.*got 'square'"),
    ],
)
def test_numbers_that_make_no_schedule(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wsd_schedule(sgd(), **arguments)


# -- groups of parameters -------------------------------------------------------------------------------------------


class TinyRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


class Net(nn.Module):
    """An embedding that is the head, too; blocks; a frozen part; norms of torch and of others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(4, 1, 8) for _ in range(3)
        )
        self.norm = TinyRMSNorm()
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def names(module: nn.Module, groups: Any) -> dict[str, set[str]]:
    """The names of the parameters in each group."""
    known = {parameter: name for name, parameter in module.named_parameters()}
    return {group["name"]: {known[p] for p in group["params"]} for group in groups}


def test_what_decays() -> None:
    module = Net()
    groups = parameter_groups(module, weight_decay=0.1)
    assert {group["name"]: group["weight_decay"] for group in groups} == {
        "decay": 0.1,
        "no_decay": 0.0,
    }
    found = names(module, groups)
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert found["decay"] | found["no_decay"] == trained
    assert not found["decay"] & found["no_decay"]
    small = {n for n in trained if "bias" in n or "norm" in n}
    assert found["no_decay"] == small
    assert "blocks.0.self_attn.in_proj_bias" in small
    everything = parameter_groups(module, weight_decay=0.1, no_decay=())
    assert [group["name"] for group in everything] == ["decay"]
    some = parameter_groups(module, weight_decay=0.1, no_decay=["embeddings"])
    assert names(module, some)["no_decay"] == {"embed.weight"}
    torch.optim.AdamW(groups, lr=0.1)


def test_each_layer_has_its_rate() -> None:
    """The embedding's is the lowest, that of what follows the layers is the highest."""
    module = Net()
    options: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.1, "layer_decay": 0.5}
    groups = parameter_groups(module, **options)
    by_parameter = {p: group["lr"] for group in groups for p in group["params"]}
    assert by_parameter[module.embed.weight] == 0.5**4
    for index, block in enumerate(module.blocks):
        assert {by_parameter[p] for p in block.parameters()} == {0.5 ** (3 - index)}
    assert by_parameter[module.norm.scale] == by_parameter[module.head.bias] == 1.0
    chosen = parameter_groups(module, **options, layers=[*module.blocks][:1])
    by_parameter = {p: group["lr"] for group in chosen for p in group["params"]}
    assert by_parameter[module.embed.weight] == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"no_decay": "norms"}, "no_decay must hold any of.*got 'norms'"),
        ({"no_decay": ["norm"]}, r"got \['norm'\]"),
        ({"layer_decay": 0.5}, "needs lr"),
        ({"layer_decay": 2.0, "lr": 1.0}, "layer_decay must be.*layer_decay=2.0"),
        ({"layer_decay": 0.5, "lr": 1.0}, "Linear has no nn.ModuleList.*pass layers"),
    ],
)
def test_groups_that_cannot_be_made(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_groups(nn.Linear(2, 1), weight_decay=0.1, **arguments)
