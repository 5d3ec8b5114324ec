"""A Module by itself: hyperparameters, loading from a checkpoint, freezing, and use without a Trainer."""

from __future__ import annotations

import abc
import copy
import dataclasses
import pickle
from argparse import Namespace
from collections import UserDict
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar

import attrs
import pydantic
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from loopwright.framework import CheckpointError, DataModule, Module
from loopwright.loggers import CSVLogger, Logger
from tests.framework.models import Linear, loader, quiet, weights

# -- hyperparameters ------------------------------------------------------------------------------------------------


class Plain(Linear):
    """Keeps what the test says."""

    def __init__(
        self, width: int, depth: int = 2, *, keep: Any = (), **options: Any
    ) -> None:
        super().__init__()
        names, kwargs = keep if keep and isinstance(keep[-1], dict) else (keep, {})
        self.save_hyperparameters(*names, **kwargs)
        self.width, self.depth, self.options = width, depth, options


class All(Linear):
    """Keeps everything."""

    def __init__(self, width: int, depth: int = 2, **options: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.width, self.depth = width, depth


def test_all_arguments() -> None:
    """Given by place or name, defaults too; those of ``**kwargs`` one by one; also read as attributes."""
    assert All(3).hparams == {"width": 3, "depth": 2}
    module = All(3, depth=4, extra="x")
    assert module.hparams == {"width": 3, "depth": 4, "extra": "x"}
    assert module.hparams.extra == "x"
    with pytest.raises(
        AttributeError,
        match="no hyperparameter 'heads'; there are: width, depth, extra",
    ):
        _ = module.hparams.heads


def test_some_arguments() -> None:
    """By name, or all but some."""
    assert Plain(3, keep=(("width",), {})).hparams == {"width": 3}
    assert Plain(3, keep=((), {"ignore": "keep"})).hparams == {"width": 3, "depth": 2}
    assert Plain(3, other=5, keep=((), {"ignore": ["keep", "depth"]})).hparams == {
        "width": 3,
        "other": 5,
    }


@pytest.mark.parametrize(
    "given", [{"lr": 0.1, "deep": {"a": 1}}, Namespace(lr=0.1, deep={"a": 1})]
)
def test_a_dict_or_namespace(given: Any) -> None:
    """Instead of the arguments."""

    class Config(Linear):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.save_hyperparameters(config)

    assert Config(given).hparams == {"lr": 0.1, "deep": {"a": 1}}


def test_wrong_names() -> None:
    """Are refused, with those that there are."""
    with pytest.raises(
        ValueError,
        match=r"widht is no argument of Plain; its arguments are: width, depth, keep",
    ):
        Plain(3, keep=(("widht",), {}))
    with pytest.raises(
        TypeError,
        match=r"takes names of arguments, or one dict or other mapping.*got \(3,\)",
    ):
        Plain(3, keep=((3,), {}))


class Child(All):
    """Takes an argument more, and passes others on."""

    def __init__(self, heads: int, **kwargs: Any) -> None:
        super().__init__(width=heads * 2, **kwargs)
        self.heads = heads


def test_inheritance() -> None:
    """The arguments of the class that was constructed and of the base that keeps them; the first construct it again."""
    module = Child(4, depth=3)
    assert (module.width, module.depth) == (8, 3)
    assert module.hparams == {"heads": 4, "depth": 3, "width": 8}
    run = quiet()
    run.fit(module, loader())
    run.save_checkpoint("a.ckpt")
    again = Child.load_from_checkpoint("a.ckpt")
    assert (again.width, again.depth, again.hparams) == (8, 3, module.hparams)


@pytest.mark.parametrize("config", [{"width": 3}, Namespace(width=3)])
def test_one_argument_kept_as_a_whole(config: Any) -> None:
    """A dict or Namespace that was the constructor's argument is given back as that argument."""

    class Configured(Linear):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.save_hyperparameters(config)

    run = quiet()
    run.fit(Configured(config), loader())
    run.save_checkpoint("a.ckpt")
    again = Configured.load_from_checkpoint("a.ckpt")
    assert again.hparams == {"width": 3}


def test_both_save() -> None:
    """A parent's and a child's call add up."""

    class Both(All):
        def __init__(self, heads: int, width: int = 1) -> None:
            super().__init__(width)
            self.save_hyperparameters({"heads": heads * 10})

    assert Both(3).hparams == {"heads": 30, "width": 1, "depth": 2}


def test_initial_hyperparameters_stay() -> None:
    """hparams can be changed; hparams_initial is what was kept."""
    module = All(3, layers=[1])
    module.hparams.width = 5
    module.hparams["layers"].append(2)
    assert module.hparams == {"width": 5, "depth": 2, "layers": [1, 2]}
    assert module.hparams_initial == {"width": 3, "depth": 2, "layers": [1]}


def test_none_kept() -> None:
    """Is an empty dict."""
    assert Linear().hparams == {}
    assert Linear().hparams_initial == {}


def test_data_modules_have_them_too() -> None:
    """And both reach the loggers, unless told not to."""

    class Data(DataModule):
        def __init__(self, batch_size: int, root: str = "here") -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return loader()

    class Silent(Linear):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.save_hyperparameters(logger=False)

    class Keeps(Logger):
        def __init__(self) -> None:
            self.params: list[Any] = []

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            self.params.append(dict(params))

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            pass

    assert Data(4).hparams == {"batch_size": 4, "root": "here"}
    for module, expected in (
        (All(3), {"width": 3, "depth": 2, "batch_size": 4, "root": "here"}),
        (Silent(3), {"batch_size": 4, "root": "here"}),
    ):
        logger = Keeps()
        quiet(logger=logger).fit(module, datamodule=Data(4))
        assert logger.params == [expected]


# -- load_from_checkpoint -------------------------------------------------------------------------------------------


class Sized(Module):
    """A layer of a size that is a hyperparameter."""

    def __init__(self, size: int, activation: str = "relu", table: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(2, size)
        self.activation = activation

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def saved() -> tuple[Sized, str]:
    module, trainer = Sized(5, table={"a": (1, 2)}), quiet()
    trainer.fit(module, loader())
    trainer.save_checkpoint("a.ckpt")
    return module, "a.ckpt"


def test_load_from_checkpoint(saved: tuple[Sized, str]) -> None:
    """Constructed as it was, with its weights, on the CPU, in training mode."""
    module, path = saved
    for where in (path, Path(path), Path(path).absolute()):
        twin = Sized.load_from_checkpoint(where)
        assert (
            twin.hparams
            == module.hparams
            == {"size": 5, "activation": "relu", "table": {"a": (1, 2)}}
        )
        assert all(map(torch.equal, weights(module), weights(twin)))
        assert twin.training
    assert Sized.load_from_checkpoint(path, map_location="cpu").device == torch.device(
        "cpu"
    )


def test_overrides(saved: tuple[Sized, str]) -> None:
    """Win over what was saved."""
    assert Sized.load_from_checkpoint(saved[1], activation="tanh").activation == "tanh"


def test_overrides_of_another_architecture(saved: tuple[Sized, str]) -> None:
    """Are an error that names the parameters."""
    with pytest.raises(
        CheckpointError,
        match=r"is for another architecture than Sized(.|\n)*layer\.weight",
    ):
        Sized.load_from_checkpoint(saved[1], size=7)


def test_strict(saved: tuple[Sized, str]) -> None:
    """Missing parameters are an error, unless strict is False, by argument or by the module."""

    class More(Sized):
        def __init__(self, size: int, lenient: bool = False) -> None:
            super().__init__(size)
            self.more = nn.Linear(1, 1)
            self.strict_loading = not lenient

    with pytest.raises(CheckpointError, match="more"):
        More.load_from_checkpoint(saved[1])
    for twin in (
        More.load_from_checkpoint(saved[1], strict=False),
        More.load_from_checkpoint(saved[1], lenient=True),
    ):
        assert torch.equal(twin.layer.weight, saved[0].layer.weight)
    with pytest.raises(CheckpointError, match="more"):
        More.load_from_checkpoint(saved[1], lenient=True, strict=True)


def test_a_subclass_with_kwargs(saved: tuple[Sized, str]) -> None:
    """Gets all hyperparameters; one without gets those that it takes."""

    class Passes(Sized):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)

    class Fewer(Sized):
        def __init__(self, size: int) -> None:
            super().__init__(size)

    assert Passes.load_from_checkpoint(saved[1]).hparams["table"] == {"a": (1, 2)}
    assert Fewer.load_from_checkpoint(saved[1]).hparams["size"] == 5


class Optional(Module):
    """Has arguments that are None by default."""

    def __init__(self, width: int = 3, other: Any = None, sizes: Any = None) -> None:
        super().__init__()
        sizes = sizes or {"out": 2}
        self.save_hyperparameters()
        self.layer = nn.Linear(width, sizes["out"])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_arguments_that_are_none_are_arguments_like_others(tmp_path: Path) -> None:
    path = str(tmp_path / "a.ckpt")
    trainer = quiet()
    trainer.predict(Optional(5), [torch.ones(1, 5)])
    trainer.save_checkpoint(path)
    assert Optional.load_from_checkpoint(path).layer.in_features == 5


def test_an_argument_counts_with_the_value_that_the_constructor_gave_it() -> None:
    class Outer(Optional):
        def __init__(self, sizes: Any = None) -> None:
            super().__init__(sizes=sizes)

    assert Optional().hparams == {"width": 3, "other": None, "sizes": {"out": 2}}
    # The outermost constructor has the last word, as in what it passes on.
    assert Outer().hparams["sizes"] is None


def test_missing_hyperparameters() -> None:
    """Are named, with the two ways out."""

    class Unsaved(Linear):
        def __init__(self, width: int, *, depth: int) -> None:
            super().__init__()

    trainer = quiet()
    trainer.fit(Unsaved(1, depth=2), loader())
    trainer.save_checkpoint("a.ckpt")
    with pytest.raises(
        CheckpointError,
        match=r"no hyperparameters width, depth for Unsaved: pass them to.*save_hyper",
    ):
        Unsaved.load_from_checkpoint("a.ckpt")
    assert isinstance(Unsaved.load_from_checkpoint("a.ckpt", width=1, depth=2), Unsaved)


def test_configure_model_before_loading() -> None:
    """Submodules that are made there are there when the weights come."""

    class Late(Sized):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            self.late: nn.Linear | None = None

        def configure_model(self) -> None:
            if self.late is None:
                self.late = nn.Linear(2, 2)

    module, trainer = Late(3), quiet()
    trainer.fit(module, loader())
    trainer.save_checkpoint("a.ckpt")
    twin = Late.load_from_checkpoint("a.ckpt")
    assert module.late is not None
    assert twin.late is not None
    assert torch.equal(twin.late.weight, module.late.weight)


def test_hparams_file_is_refused() -> None:
    """With what to do instead."""
    with pytest.raises(
        ValueError, match="a checkpoint holds its hyperparameters; pass overrides"
    ):
        Linear.load_from_checkpoint("a.ckpt", hparams_file="hparams.yaml")


# -- without a Trainer ----------------------------------------------------------------------------------------------


def test_properties_without_a_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    """A module is a plain nn.Module too."""
    module = Linear()
    assert (
        module.current_epoch,
        module.global_step,
        module.global_rank,
        module.local_rank,
    ) == (0, 0, 0, 0)
    assert module.logger is None
    assert module.loggers == []
    assert (module.device, module.dtype) == (torch.device("cpu"), torch.float32)
    assert module.double().dtype == torch.float64
    module.print("here")
    assert capsys.readouterr().out == "here\n"
    with pytest.raises(
        RuntimeError, match="Linear is not attached to a `Trainer`: pass it to fit"
    ):
        _ = module.trainer


def test_device_and_dtype_of_odd_modules() -> None:
    """Of buffers where there is no parameter; the default where there is nothing."""

    class Empty(Module):
        pass

    assert (Empty().device, Empty().dtype) == (torch.device("cpu"), torch.float32)
    module = Empty()
    module.register_buffer("count", torch.zeros((), dtype=torch.int64, device="meta"))
    module.register_buffer("scale", torch.zeros((), dtype=torch.float16))
    assert (module.device, module.dtype) == (torch.device("meta"), torch.float16)


def test_properties_inside_a_trainer() -> None:
    """Are the Trainer's."""
    module, logger = Linear(), CSVLogger("logs")
    trainer = quiet(logger=logger, max_epochs=2)
    trainer.fit(module, loader())
    assert module.trainer is trainer
    assert (module.current_epoch, module.global_step, module.logger) == (2, 8, logger)


def test_the_trainer_is_no_submodule() -> None:
    """It appears in neither parameters nor state_dict nor copies."""
    module = Linear()
    quiet().fit(module, loader())
    assert list(module.state_dict()) == ["layer.weight", "layer.bias"]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(map(torch.equal, weights(module), weights(twin)))
        with pytest.raises(RuntimeError, match="not attached"):
            _ = twin.trainer


def test_freezing() -> None:
    """freeze switches gradients off and to evaluation mode; unfreeze back."""
    module = Linear().freeze()
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert module.unfreeze() is module
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())


class Registry(type):
    """A metaclass with a constructor of its own, as packages have them."""

    made: ClassVar[list[str]] = []

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        Registry.made.append(cls.__name__)
        return super().__call__(*args, **kwargs)


class Abstract(abc.ABC):
    @abc.abstractmethod
    def name(self) -> str: ...


def test_metaclasses_of_others() -> None:
    """A Module mixes with classes of any metaclass: its own is Python's."""

    class Registered(metaclass=Registry):
        pass

    class Both(Linear, Registered):
        pass

    class Named(Abstract, Linear):
        def name(self) -> str:
            return "named"

    for kind in (Both, Named):
        module = kind()
        before = weights(module)
        quiet().fit(module, loader())
        assert not any(map(torch.equal, before, weights(module)))
    assert Registry.made == ["Both"]
    with pytest.raises(TypeError, match="abstract"):
        type("Unnamed", (Abstract, Linear), {})()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("example_input_array", torch.ones(1, 2)),
        ("strict_loading", False),
        ("hparams", {"width": 3}),
        ("logger", None),
        ("current_epoch", 7),
        ("device", torch.device("cpu")),
    ],
)
def test_properties_that_can_only_be_read(name: str, value: Any) -> None:
    """Stand for what the Module has: nobody sets it."""
    kind: Any = type("Fixed", (Linear,), {name: property(lambda self: value)})
    module = kind()
    quiet(max_epochs=2).fit(module, loader())
    assert getattr(module, name) is value


def test_modules_inside_modules() -> None:
    """A Module may be a part of another, and is trained with it."""

    class Outer(Linear):
        def __init__(self, inner: Linear) -> None:
            super().__init__()
            self.layer = inner

    inner = Linear()
    before = weights(inner)
    quiet().fit(Outer(inner), loader())
    assert not any(map(torch.equal, before, weights(inner)))


def test_all_gather_of_one_process() -> None:
    """Gives back what it got."""
    found: list[Any] = []

    class Gathers(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            found.append(self.all_gather({"x": batch[0], "n": 3}))
            return super().training_step(batch, batch_idx)

    quiet().fit(Gathers(), loader(1))
    assert found[0]["n"] == 3
    assert found[0]["x"].shape == (2, 2)


def test_steps_of_few_arguments() -> None:
    """Steps that take the batch alone are given the batch alone."""

    class Short(Linear):
        def training_step(self, batch: Any) -> Tensor:  # on purpose
            return self.loss(batch)

        def validation_step(self, batch: Any) -> None:  # on purpose
            self.log("val", self.loss(batch))

    trainer = quiet()
    trainer.fit(Short(), loader(), [loader(), loader()])
    assert set(trainer.callback_metrics) == {
        "val/dataloader_idx_0",
        "val/dataloader_idx_1",
    }


def test_predict_step_by_default() -> None:
    """Calls the module on the batch."""

    class Forward(Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    assert quiet().predict(Forward(), [torch.ones(1)]) == [torch.full((1,), 2.0)]


# -- hyperparameters of any make ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Size:
    width: int = 3
    names: tuple[str, ...] = ("a", "b")


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What its constructor makes of its arguments must not be made twice."""

    size: Size
    more: list[Size] = dataclasses.field(default_factory=list)
    seed: dataclasses.InitVar[int] = 1
    total: int = dataclasses.field(init=False, default=0)

    def __post_init__(self, seed: int) -> None:
        object.__setattr__(self, "total", self.total + seed)


@attrs.define
class Attrs:
    size: Size
    _private: int = 1


class Pydantic(pydantic.BaseModel):
    width: int = 3
    names: list[str] = pydantic.Field(default_factory=list)


class Keeps(Linear):
    """Takes one configuration, and keeps what is in it or it as an argument."""

    def __init__(self, config: Any, whole: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters(*([config] if whole else []))
        self.config = config


class KeepsFrozen(Keeps):
    def __init__(self, config: Frozen | None = None, whole: bool = True) -> None:
        super().__init__(config, whole)


class KeepsAttrs(Keeps):
    def __init__(self, config: Attrs, whole: bool = True) -> None:
        super().__init__(config, whole)


class KeepsPydantic(Keeps):
    def __init__(self, config: Pydantic, whole: bool = True) -> None:
        super().__init__(config, whole)


def through_a_checkpoint(module: Any, **arguments: Any) -> Any:
    run = quiet()
    run.fit(module, loader(1))
    run.save_checkpoint("again.ckpt")
    return type(module).load_from_checkpoint("again.ckpt", **arguments)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (KeepsFrozen, Frozen(Size(4), [Size(5), Size(6)], seed=7)),
        (KeepsAttrs, Attrs(Size(4), private=2)),  # type: ignore[call-arg] # attrs drops the underscore
        (KeepsPydantic, Pydantic(width=4, names=["x"])),
        (
            Keeps,
            OmegaConf.create(
                {
                    "size": {"width": 4, "list": [1, {"a": 2}]},
                    "lr": 0.1,
                    "same": "${lr}",
                }
            ),
        ),
        (
            Keeps,
            OmegaConf.create(
                {
                    "size": {"to_come": "???", "width": 4},
                    "late": "???",
                    "same": "${late}",
                }
            ),
        ),
        (Keeps, Namespace(width=4, names=("x",))),
        (Keeps, SimpleNamespace(width=4, size={"deep": 1})),
    ],
)
def test_configurations_come_back_as_what_they_were(
    kind: Any, config: Any, whole: bool
) -> None:
    """Without opening any pickled object; the class of an object is told by the constructor's annotation."""
    module = kind(config, whole)
    names = (
        [field for field in ("size", "width") if hasattr(config, field)]
        if whole
        else ["config", "whole"]
    )
    assert set(names) <= set(module.hparams)
    again = through_a_checkpoint(module)
    assert type(again.config) is type(config)
    assert again.config == config
    assert again.hparams == module.hparams


@pytest.mark.parametrize(
    "config",
    [
        UserDict(width=4, size={"deep": 1}),
        MappingProxyType({"width": 4, "size": {"deep": 1}}),
        {"width": 4, "size": {"deep": 1}},
    ],
)
def test_other_mappings_come_back_as_dicts_with_attributes(config: Any) -> None:
    """At any depth, and so does an object whose class no annotation tells."""
    again = through_a_checkpoint(Keeps(config))
    assert (again.config.width, again.config["width"], again.config.size.deep) == (
        4,
        4,
        1,
    )
    assert again.hparams == Keeps(config).hparams
    assert through_a_checkpoint(Keeps(Frozen(Size(4)))).config.size.width == 4


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", [Namespace, SimpleNamespace])
def test_what_is_inside_a_namespace_keeps_its_attributes(
    kind: Any, whole: bool
) -> None:
    """In lists and at any depth, after a second checkpoint, too; it is a dict then."""
    config = kind(
        size=kind(width=4, deep=kind(er=5)),
        more=[kind(a=1), (kind(b=2), 3)],
        plain={6: {"c": 7}},
    )
    again = through_a_checkpoint(through_a_checkpoint(Keeps(config, whole))).config
    assert type(again) is kind
    found = (
        again.size.width,
        again.size.deep.er,
        again.more[0].a,
        again.more[1][0].b,
        again.more[1][1],
        again.plain,
    )
    assert found == (4, 5, 1, 2, 3, {6: {"c": 7}})
    assert again.size == {"width": 4, "deep": {"er": 5}}


def test_an_object_whose_class_nothing_tells_stays_an_object() -> None:
    """As an argument it is not silently another: the checkpoint names it, and how to get it."""
    with pytest.raises(
        CheckpointError, match=r"hyper_parameters.config.*weights_only=False"
    ):
        through_a_checkpoint(Keeps(Frozen(Size(4)), whole=False))
    module = Keeps(Frozen(Size(4)), whole=False)
    assert through_a_checkpoint(module, weights_only=False).config == module.config


def test_what_has_no_fields_is_refused() -> None:
    class Opaque:
        width = 3

    for config in (Opaque(), Frozen, 3, None):
        with pytest.raises(TypeError, match="dataclass, attrs or pydantic object; got"):
            Keeps(config)


def test_a_module_among_the_hyperparameters_is_told() -> None:
    class Wraps(Linear):
        def __init__(self, backbone: nn.Module, **ignore: Any) -> None:
            super().__init__()
            self.save_hyperparameters(**ignore)

    with pytest.warns(
        UserWarning, match=r"keeps 'backbone', which is a module.*ignore=\['backbone'\]"
    ):
        Wraps(nn.Linear(1, 1))
    assert Wraps(nn.Linear(1, 1), ignore="backbone").hparams == {"ignore": "backbone"}


# -- constructors ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Generated(Linear):
    """Its constructor is made after the class."""

    width: int
    depth: int = 2

    def __post_init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()


class SavingMixin:
    def __init__(self, *args: Any, extra: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.save_hyperparameters()  # type: ignore[attr-defined] # of the module that it is mixed into


class SilentMixin:
    def __init__(self, *args: Any, extra: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class SavingBase(Linear):
    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()


class Mixed(SavingMixin, SavingBase): ...


class SilentlyMixed(SilentMixin, SavingBase, abc.ABC): ...


class MixedBelow(SavingMixin, SavingBase):
    def __init__(self, name: str) -> None:
        super().__init__(extra=7)


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda: Generated(3), {"width": 3, "depth": 2}),
        (lambda: Mixed(extra=2), {"size": 64, "extra": 2}),
        (lambda: SilentlyMixed(extra=2, size=5), {"size": 5, "extra": 2}),
        (lambda: MixedBelow("x"), {"size": 64, "extra": 7, "name": "x"}),
    ],
)
def test_constructors_that_are_not_written_in_the_class(
    make: Any, kept: dict[str, Any]
) -> None:
    """Generated ones, and those of mixins, which know nothing of modules."""
    assert make().hparams == kept
    assert through_a_checkpoint(make()).hparams == kept
    assert make().hparams == kept  # again, with all constructors noted


def test_a_subclass_leaves_out_what_its_base_kept() -> None:
    class Less(All):
        def __init__(self, width: int, note: str) -> None:
            super().__init__(width)
            self.save_hyperparameters(ignore=["note", "depth"])

    class Before(All):
        def __init__(self, width: int, note: str) -> None:
            self.save_hyperparameters(ignore="note")
            super().__init__(width)

    class More(Less):
        def __init__(self, width: int, note: str) -> None:
            super().__init__(width, note)
            self.save_hyperparameters()

    assert Less(3, "x").hparams == {"width": 3}
    assert Before(3, "x").hparams == {"width": 3, "depth": 2}
    assert More(3, "x").hparams == {"width": 3, "note": "x"}


def test_a_dataclass_that_cannot_be_hashed_is_refused() -> None:
    @dataclasses.dataclass
    class Equal(Linear):
        def __post_init__(self) -> None:
            super().__init__()

    with pytest.raises(TypeError, match=r"@dataclass\(eq=False\)"):
        quiet().fit(Equal(), loader())


# -- attributes -----------------------------------------------------------------------------------------------------


def test_settings_may_be_properties_or_stand_in_the_class() -> None:
    class Fixed(Linear):
        strict_loading = False

        @property
        def automatic_optimization(self) -> bool:  # type: ignore[override] # read only
            return False

        @property
        def example_input_array(self) -> Any:  # type: ignore[override] # read only
            return torch.zeros(1, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.optimizers().update(self.loss(batch))

    module, run = Fixed(), quiet()
    before = weights(module)
    run.fit(module, loader())
    assert not any(map(torch.equal, before, weights(module)))
    assert module.strict_loading is False


class Scripted(Module):
    """Has a module inside that knows the run."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_modules_become_torchscript() -> None:
    """Before a run and after it, by script and by trace."""
    module, x = Scripted(), torch.ones(3, 2)
    for _ in range(2):
        torch.testing.assert_close(torch.jit.script(module)(x), module(x))
        traced: Any = torch.jit.trace(module, x)
        torch.testing.assert_close(traced(x), module(x))
        quiet().fit(module, loader())
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        _ = Scripted().trainer


def test_modules_assigned_before_the_base_class_is_initialised_stay() -> None:
    """As a dataclass's constructor assigns its fields before ``__post_init__``."""

    @dataclasses.dataclass(eq=False)
    class Fields(Linear):
        backbone: nn.Module

        def __post_init__(self) -> None:
            super().__init__()

    class Early(Linear):
        def __init__(self) -> None:
            self.backbone = nn.Linear(2, 3)
            super().__init__()

    for module in (Fields(nn.Linear(2, 3)), Early()):
        assert set(dict(module.named_children())) == {"backbone", "layer"}


class OneOnly(Linear):
    """There is one object of it."""

    only: OneOnly | None = None

    def __new__(cls, *args: Any) -> OneOnly:
        cls.only = cls.only or object.__new__(cls)
        return cls.only


def test_a_module_may_be_made_in_its_own_way() -> None:
    """Past Module.__new__."""
    module = OneOnly()
    quiet().fit(module, loader(2))
    assert module.layer.weight.grad is not None


def test_lazy_layers_are_trained() -> None:
    """They have no shape before their first batch, in the checks before training neither."""

    class Lazy(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LazyLinear(1)

    module = Lazy()
    quiet().fit(module, loader(2))
    assert module.layer.weight.shape == (1, 2)


def test_data_moves_a_batch_without_a_trainer() -> None:
    """As in a loop of one's own, or in a test of the data."""
    batch = {"x": torch.ones(2), "name": "a"}
    moved = DataModule().transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert (moved["x"].device.type, moved["name"]) == ("meta", "a")
