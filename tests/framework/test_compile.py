"""Which parts of a module ``compile=True`` compiles, and how often."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from loopwright.framework import Module
from loopwright.framework.engine.compile import compile_submodules
from tests.strategies.distributed import all_in_processes, quiet

EAGER = {"backend": "aot_eager"}


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
    tokens: Any = torch.randint(9, (2, 3))
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


class Language(Module):
    """Trains :class:`Backbone`."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.backbone(batch[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def train(strategy: str, compile: Any) -> tuple[list[float], int]:
    """Losses, and the number of compiled parts."""
    torch.manual_seed(0)
    module = Language()
    tokens: Any = torch.randint(9, (32, 4), generator=torch.Generator().manual_seed(1))
    trainer = quiet(strategy=strategy, devices=2, compile=compile)
    trainer.fit(module, DataLoader(tokens, 4))
    compiled = [part for part in module.modules() if part._compiled_call_impl]
    return module.losses, len(compiled)


@pytest.mark.slow
def test_parts_are_compiled_under_strategies_of_several_processes():
    calls = {
        f"{strategy}, {scope}": (train, strategy, scope and {"scope": scope, **EAGER})
        for strategy in ("ddp", "fsdp")
        for scope in (None, "parts", "step")
    }
    told = all_in_processes(2, calls)
    losses, _ = told["ddp, None"]
    for name, (compiled_losses, parts) in told.items():
        torch.testing.assert_close(compiled_losses, losses, msg=name)
        # The blocks, and what stands beside them.
        assert parts == (0 if name.endswith("None") else 14), name
