from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from loopwright.callbacks import ModelSummary, RichModelSummary
from loopwright.callbacks.model_summary import summarize
from tests.callbacks.scripted import Scripted, fit, loader, trainer


def state_of_numpy() -> list[int]:
    state: Any = np.random.get_state()
    return state[1].tolist()


class Net(nn.Module):
    """Layers that draw random numbers and count batches."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(8, 1000), nn.BatchNorm1d(1000), nn.Dropout()
        )
        self.head = nn.Linear(1000, 2, bias=False)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros(()))
        self.example_input_array: Any = torch.zeros(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        noise = torch.rand(()) + random.random() + np.random.rand()
        return self.head(self.body(x)) * noise


def test_the_table_in_full():
    net = Net()
    net.head.requires_grad_(False)
    net.head.eval()
    assert str(summarize(net)).splitlines() == [
        "Name         | Type       | Params | Mode  | In sizes  | Out sizes",
        "------------------------------------------------------------------",
        "body         | Sequential | 11.0 K | train | [4, 8]    | [4, 1000]",
        "head         | Linear     | 2.0 K  | eval  | [4, 1000] | [4, 2]",
        "other params |            | 3      |       | ?         | ?",
        "------------------------------------------------------------------",
        "Trainable params: 11.0 K",
        "Non-trainable params: 2.0 K",
        "Total params: 13.0 K, 0.052 MB",
    ]


def test_what_can_be_read():
    net = Net()
    net.head.requires_grad_(False)
    summary = summarize(net, 2)
    assert summary.layer_names == ["body", "body.0", "body.1", "body.2", "head"]
    assert summary.total_parameters == 13_003
    assert summary.trainable_parameters == 11_003
    assert summary.model_size == 4 * 13_003 / 1e6


def test_depth():
    def names(depth: int) -> list[str]:
        return [
            layer.name
            for layer in summarize(nn.Sequential(Net(), nn.ReLU()), depth).layers
        ]

    inside = ["0.body.0", "0.body.1", "0.body.2"]
    assert names(0) == []
    assert names(1) == ["0", "1"]
    assert names(2) == ["0", "0.body", "0.head", "1"]
    assert names(-1) == names(3) == ["0", "0.body", *inside, "0.head", "1"]
    assert summarize(Net(), 0).total_parameters == 8 * 1000 + 1000 + 2000 + 2000 + 3


def test_measuring_sizes_leaves_no_trace():
    net = Net().train()
    net.body[2].eval()
    states = {name: value.clone() for name, value in net.state_dict().items()}
    buffers = {name: id(buffer) for name, buffer in net.named_buffers()}
    modes = [layer.training for layer in net.modules()]
    generators = (torch.get_rng_state(), random.getstate(), state_of_numpy())

    assert summarize(net, -1).layers[1].out_size == [4, 1000]

    assert all(
        torch.equal(value, states[name]) for name, value in net.state_dict().items()
    )
    assert {name: id(buffer) for name, buffer in net.named_buffers()} == buffers
    assert [layer.training for layer in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), state_of_numpy()) == generators[1:]
    assert all(not layer._forward_hooks for layer in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_it_is_called_for_evaluation():
    class Checks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)  # which refuses a single sample in training
            self.example_input_array = torch.zeros(1, 3)

        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return self.norm(x)

    summary = summarize(Checks())
    assert (summary.layers[0].out_size, summary.note) == ([1, 3], "")


def test_shared_parameters_count_once():
    net = nn.ModuleDict({"encoder": nn.Embedding(10, 4), "decoder": nn.Linear(4, 10)})
    net["decoder"].weight = net["encoder"].weight
    summary = summarize(net)
    assert [(layer.parameters, layer.shared) for layer in summary.layers] == [
        (40, False),
        (10, True),
    ]
    assert summary.total_parameters == 50
    assert "10 + shared" in str(summary)


def test_lazy_parameters_are_marked_and_stay_lazy():
    net: Any = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(5))
    net.example_input_array = torch.zeros(1, 2)
    text = str(summarize(net))
    assert "1    | LazyLinear | ?      | train | ?" in text
    assert "Total params: 9 and those not yet known, marked ?" in text
    assert net[1].has_uninitialized_params()


@pytest.mark.parametrize(
    "example",
    [
        (torch.zeros(2, 3), torch.zeros(2, 3)),
        {"x": torch.zeros(2, 3), "y": torch.zeros(2, 3)},
    ],
)
def test_examples_of_several_arguments(example: Any):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(
                3, 1, dtype=torch.float64
            )  # the example's floats are converted
            self.example_input_array = example

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x + y)

    assert summarize(Two()).layers[0].in_size == [2, 3]


def test_a_forward_that_fails_costs_only_the_sizes():
    net = Net()
    net.example_input_array = torch.zeros(4, 9)
    text = str(summarize(net))
    assert "forward(example_input_array) raised RuntimeError" in text
    assert "13.0 K" in text


def test_it_is_printed_when_fitting_begins(capsys: pytest.CaptureFixture[str]):
    fit(ModelSummary(), max_epochs=1)
    assert "layer | Linear | 3" in capsys.readouterr().out
    fit(ModelSummary(max_depth=0), max_epochs=1)
    assert capsys.readouterr().out == ""


def test_training_is_the_same_with_a_summary():
    class Noisy(Scripted):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(
                nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 1)
            )
            self.example_input_array = torch.ones(4, 2)

    torch.manual_seed(1)
    fit(module=(plain := Noisy()))
    torch.manual_seed(1)
    fit(ModelSummary(-1), module=(shown := Noisy()))
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            plain.state_dict().values(), shown.state_dict().values(), strict=True
        )
    )


@pytest.mark.parametrize("depth", [-2, 1.5, True])
def test_a_depth_that_is_none_is_an_error(depth: Any):
    with pytest.raises(ValueError, match=f"max_depth must be -1 .*got {depth}"):
        ModelSummary(depth)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_parts_in_torchscript():
    """Take no hooks: their sizes are not known, and those of the others are."""
    model: Any = Scripted()
    model.layer = nn.Sequential(nn.Linear(2, 3), torch.jit.script(nn.Linear(3, 1)))
    model.example_input_array = torch.zeros(4, 2)
    sizes = {
        layer.name: (layer.in_size, layer.out_size)
        for layer in summarize(model, max_depth=2).layers
    }
    assert sizes["layer.0"] == ([4, 2], [4, 3])
    assert sizes["layer.1"] == (None, None)


def test_rich_draws_into_files_too(capsys: pytest.CaptureFixture[str]):
    trainer(RichModelSummary(header_style="red"), max_epochs=1).fit(
        Scripted(), loader()
    )
    printed = capsys.readouterr().out
    assert "┃ Name" in printed
    assert "Total params: 3" in printed
