"""What ``Engine.prepare`` does to each kind of object, and the record of what it has prepared."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...strategies.optimizer_state import parameters_of
from ..data.combined import is_loader, is_other_stream
from ..messages import log
from .loaders import PreparedLoader
from .prepared import PreparedOptimizer, PreparedScheduler, prepare_module, unwrapped

if TYPE_CHECKING:
    from ...strategies import Strategy
    from .engine import Engine


class Prepared:
    """What an engine has prepared: by kind, and in the order of preparation, by which checkpoints know it.

    Args:
        engine: the engine.
        data_seed: the seed that gives shuffled loaders their order, if it is known already.

    Attributes:
        strategies: one for each prepared module, which is its ``module``.
        modules: the prepared module for each of the user's.
        optimizers: the prepared optimizers; each knows its module's strategy.
        schedulers: the prepared schedulers.
        loaders: the prepared loaders.
        running_loaders: those loaders that are being iterated, the innermost last.
        registered: objects that are only saved and loaded.
        data_seed: as given; None until it is known.
    """

    def __init__(self, engine: Engine, data_seed: int | None = None) -> None:
        self._engine = engine
        self.data_seed = data_seed
        self.strategies: list[Strategy] = []
        self.modules: dict[nn.Module, nn.Module] = {}
        self.optimizers: list[PreparedOptimizer] = []
        self.schedulers: list[PreparedScheduler] = []
        self.loaders: list[PreparedLoader] = []
        self.running_loaders: list[PreparedLoader] = []
        self.registered: list[Any] = []
        self._reported_streams: set[type] = set()

    @property
    def positioned_loaders(self) -> list[PreparedLoader]:
        """Those loaders whose positions checkpoints hold."""
        return [loader for loader in self.loaders if loader.keeps_position]

    def find_module(self, module: nn.Module) -> nn.Module | None:
        """The prepared module for one of the user's, or for itself; None if it is not prepared."""
        return self.modules.get(unwrapped(module))

    def find_optimizer(self, optimizer: Any) -> PreparedOptimizer | None:
        """The prepared optimizer for one of the user's, or for itself; None if it is not prepared."""
        original = unwrapped(optimizer)
        matching = (item for item in self.optimizers if item.optimizer is original)
        return next(matching, None)

    def strategy_of(self, optimizer: Any) -> Strategy:
        """The strategy of an optimizer's module; of one that is not prepared, the engine's."""
        prepared = self.find_optimizer(optimizer)
        return self._engine.strategy if prepared is None else prepared.strategy

    def add(self, objects: Iterable[Any]) -> tuple[Any, ...]:
        """Prepare what is not prepared yet, as ``Engine.prepare``.

        Returns:
            One object for each.

        Raises:
            ValueError: if the strategy cannot train a module, or not with these optimizers.
        """
        # What another engine has prepared, or this one has forgotten, is prepared anew.
        objects = [item if self._holds(item) else unwrapped(item) for item in objects]
        if any(self._needs_all_processes(item) for item in objects):
            self._engine.all_call("prepare")
        optimizers = [item for item in objects if isinstance(item, Optimizer)]
        # A module takes its optimizers along, so modules come first.
        for item in objects:
            if isinstance(item, nn.Module) and self.find_module(item) is None:
                self._add_module(item, optimizers)
        for optimizer in optimizers:
            if self.find_optimizer(optimizer) is None:
                self._add_optimizer(optimizer)
        return tuple(self._find_or_add(item) for item in objects)

    def _holds(self, item: Any) -> bool:
        """Whether ``prepare`` has returned this very object."""
        known = (
            *self.modules.values(),
            *self.optimizers,
            *self.schedulers,
            *self.loaders,
        )
        return any(item is one for one in known)

    def _needs_all_processes(self, item: Any) -> bool:
        if isinstance(item, nn.Module):
            return self.find_module(item) is None
        return is_loader(item) and not self._holds(item)

    def _add_module(self, module: nn.Module, optimizers: list[Optimizer]) -> None:
        """Prepare a module, and those of these optimizers that train it."""
        engine = self._engine
        strategy = engine.strategy
        if not strategy.capabilities.single_module:
            strategy = copy.copy(strategy)
        elif self.strategies:
            raise ValueError(
                f"an Engine with strategy={strategy.name!r} can prepare one module; this is another"
            )
        trained = [
            optimizer
            for optimizer in optimizers
            if trains(optimizer, module.parameters())
            and self.find_optimizer(optimizer) is None
        ]
        self._check_optimizers(strategy, module, trained)
        strategy.setup(module, engine.precision)
        prepared = []
        for optimizer in strategy.setup_optimizers(trained):
            engine.watch(optimizer)
            prepared.append(self.new_optimizer(optimizer, strategy))
        self.strategies.append(strategy)
        self.optimizers += prepared
        self.modules[module] = module
        if not strategy.is_transparent:
            self.modules[module] = self.new_module(module, strategy)

    def _check_optimizers(
        self,
        strategy: Strategy,
        module: nn.Module,
        optimizers: list[Optimizer],
    ) -> None:
        """Raise if the strategy cannot take these optimizers of a module."""
        if strategy.capabilities.single_module or self._replaces_parameters(strategy):
            parameters = set(module.parameters())
            for optimizer in optimizers:
                if not parameters.issuperset(parameters_of(optimizer)):
                    raise ValueError(
                        f"strategy={strategy.name!r} takes an optimizer for each module; this "
                        f"{type(optimizer).__name__} has parameters of several"
                    )
        if strategy.capabilities.single_module and not optimizers:
            raise ValueError(
                f"strategy={strategy.name!r}: prepare the module and its optimizer in one call of prepare"
            )

    def _replaces_parameters(self, strategy: Strategy) -> bool:
        return (
            strategy.capabilities.replaces_parameters and self._engine.num_processes > 1
        )

    def _add_optimizer(self, optimizer: Optimizer) -> None:
        """Prepare an optimizer whose module was prepared before, or is not prepared at all."""
        strategy = self._engine.strategy
        self._engine.watch(optimizer)
        owners = [
            owner
            for owner in self.strategies
            if trains(optimizer, owner.module.parameters())
        ]
        if not owners and self._replaces_parameters(strategy):
            raise ValueError(
                f"an optimizer ({type(optimizer).__name__}) has no parameter of a prepared module: "
                f"strategy={strategy.name!r} replaces parameters, so prepare the module and its optimizer "
                "in one call of prepare, or make the optimizer afterwards"
            )
        # An optimizer of no prepared module has a state to save as well, with positions in the place of names.
        owner = owners[0] if owners else strategy
        self.optimizers.append(self.new_optimizer(optimizer, owner))

    def new_module(self, module: nn.Module, strategy: Strategy) -> Any:
        """What stands for a module from now on."""
        return prepare_module(module, strategy, self._engine.precision)

    def new_optimizer(
        self, optimizer: Optimizer, strategy: Strategy
    ) -> PreparedOptimizer:
        """What stands for an optimizer from now on."""
        return PreparedOptimizer(optimizer, self._engine, strategy)

    def _find_or_add(self, item: Any) -> Any:
        """What ``prepare`` returns for an object."""
        if isinstance(item, nn.Module):
            return self.find_module(item)
        if isinstance(item, Optimizer):
            return self.find_optimizer(item)
        if self._holds(item):
            return item
        if has_methods(item, "step", "state_dict"):
            scheduler = PreparedScheduler(item, self._engine)
            self.schedulers.append(scheduler)
            return scheduler
        if is_loader(item):
            loader = PreparedLoader(item, self._engine, len(self.loaders))
            self.loaders.append(loader)
            return loader
        self._report_stream(item)
        return item

    def _report_stream(self, item: Any) -> None:
        """Say, once for each type, that the batches of a stream which is no loader are left as they are."""
        kind = type(item)
        processes = self._engine.num_processes
        if (
            processes == 1
            or kind in self._reported_streams
            or not is_other_stream(item)
        ):
            return
        self._reported_streams.add(kind)
        log.info(
            "prepare: a %s comes back as it is, as it is no DataLoader and has no dataset: its batches are not "
            "dealt out to the %d processes, nor moved to the device. Let it give each process a part, or prepare a "
            "loader that reads it",
            kind.__name__,
            processes,
        )

    def draw_data_seed(self) -> int:
        """The seed that gives shuffled loaders their order; if none is known, torch's seed in the main process.

        The first call is a collective.
        """
        if self.data_seed is None:
            # collective
            self.data_seed = int(
                self._engine.strategy.broadcast(torch.initial_seed() % 2**63)
            )
        return self.data_seed

    def set_data_seed(self, seed: int) -> None:
        """Give shuffled loaders the order of this seed. All processes call this."""
        if seed != self.data_seed:
            self.data_seed = seed
            for loader in self.loaders:
                loader.read_in_order_of(seed)

    def release(self, interrupted: bool) -> None:
        """Undo what the strategies have done to the modules, and end the loaders' workers.

        Args:
            interrupted: whether other ranks may not come to collectives.
        """
        for strategy in self.strategies:
            # The user may have left a step half done, as when memory ran out in a backward. So a module's own copy of
            # the strategy neither checks its gradients nor calls a collective. The engine's strategy itself serves
            # where there can be one module only; that one gives back what it has trained, which takes all ranks.
            is_copy = strategy is not self._engine.strategy
            strategy.teardown(interrupted=interrupted or is_copy)
        for loader in self.loaders:
            loader.close()


def trains(optimizer: Optimizer, parameters: Iterable[Tensor]) -> bool:
    """Whether an optimizer has one of these parameters."""
    return not set(parameters_of(optimizer)).isdisjoint(parameters)


def has_methods(item: Any, *names: str) -> bool:
    """Whether an object has all of these methods."""
    return all(callable(getattr(item, name, None)) for name in names)
