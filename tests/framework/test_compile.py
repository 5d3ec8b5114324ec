"""Which parts of a module ``compile=True`` compiles, and how often."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loopwright.framework.engine.compile import compile_submodules


class Block(nn.Module):
    """One of many equal ones."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(torch.relu(self.linear(x)))


class Backbone(nn.Module):
    """Has its blocks in a list, as a language model has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(12))
        self.head = nn.Linear(4, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Whole(nn.Module):
    """Also has blocks of torch's own, and a row of layers that are none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Backbone()
        layer = nn.TransformerEncoderLayer(9, 3, 8, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 10, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.backbone(tokens)))


def test_equal_blocks_are_compiled_once():
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    module = Whole()
    names = list(module.state_dict())
    tokens = torch.randint(9, (2, 3))
    expected = module(tokens)
    expected.sum().backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    compile_submodules(module, {"backend": backend})
    told = module(tokens)
    told.sum().backward()
    compiled = [
        name for name, part in module.named_modules() if part._compiled_call_impl
    ]
    assert compiled == [
        "backbone.embed",
        *(f"backbone.blocks.{number}" for number in range(12)),
        "backbone.head",
        *(f"encoder.layers.{number}" for number in range(10)),
        "head",
    ]
    # Five kinds of parts; one more for each kind whose first one gets what needs no gradient, or another layout.
    assert len(graphs) <= 8
    torch.testing.assert_close(told, expected)
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert list(module.state_dict()) == names
