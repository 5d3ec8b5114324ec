"""What the Engine does where loops of one's own leave the beaten track."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from loopwright.framework import Engine, find_executable_batch_size
from tests.framework.models import Evaluated, Linear, data
from tests.samples import as_dataset
from tests.strategies.distributed import in_processes, quiet


def make(**arguments: Any) -> Engine:
    engine = Engine(accelerator="cpu", **arguments)
    if engine.loss_scaler is not None:
        engine.loss_scaler.scaler = torch.amp.GradScaler(
            "cpu", init_scale=1024.0
        )  # by which these gradients do not overflow
    return engine


def one_weight(engine: Engine, lr: float = 1.0) -> Any:
    """A model whose gradient is its input, and its optimizer."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return engine.prepare(model, torch.optim.SGD(model.parameters(), lr=lr))


def ones() -> Tensor:
    return torch.ones(1, 1)


# -- windows ----------------------------------------------------------------------------------------------------------


def test_a_step_that_is_left_out_after_clipping_does_not_spoil_the_next():
    engine = make(precision="16-mixed")
    model, optimizer = one_weight(engine)
    for give_up in (True, False):
        engine.backward(model(ones()).sum())
        norm = engine.clip_grad_norm_(model.parameters(), 10.0)
        assert norm is not None
        assert norm.item() == pytest.approx(1.0)
        if not give_up:
            optimizer.step()
        optimizer.zero_grad()
    assert model.weight.item() == pytest.approx(-1.0)


def test_two_steps_of_an_optimizer_for_one_batch():
    engine = make(precision="16-mixed")
    model, optimizer = one_weight(engine)
    with engine.accumulate(model):
        for _ in range(2):
            engine.backward(model(ones()).sum())
            norm = engine.clip_grad_norm_(model.parameters(), 10.0)
            assert norm is not None
            assert norm.item() == pytest.approx(1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert model.weight.item() == pytest.approx(-2.0)


class Ones(IterableDataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        return iter([torch.ones(1)] * self.count)


def test_two_losses_of_a_batch_in_a_last_window_that_is_shorter():
    engine = make(gradient_accumulation_steps=4)
    model, optimizer = one_weight(engine)
    for x in engine.prepare(DataLoader(Ones(5))):
        with engine.accumulate(model):
            engine.backward(model(x).sum())
            engine.backward(model(x).sum())
            optimizer.step()
            optimizer.zero_grad()
    assert model.weight.item() == pytest.approx(-4.0)  # two steps with gradients of 2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_weights_of_two_losses_before_a_step(precision: str):
    engine = make(precision=precision)
    model, optimizer = one_weight(engine)
    engine.backward(model(ones()).sum(), weight=1.0)
    engine.backward(model(5 * ones()).sum(), weight=3.0)
    optimizer.step()
    assert model.weight.item() == pytest.approx(-4.0)  # (1 * 1 + 3 * 5) / 4


@pytest.mark.parametrize("first", [True, False])
def test_gradients_may_be_cleared_before_the_backward_or_after_the_step(first: bool):
    engine = make(gradient_accumulation_steps=2)
    model, optimizer = one_weight(engine)
    loader = engine.prepare(DataLoader(TensorDataset(torch.arange(1.0, 7.0)[:, None])))
    for (x,) in loader:
        with engine.accumulate(model):
            if first:
                optimizer.zero_grad()
            engine.backward(model(x).sum())
            optimizer.step()
            if not first:
                optimizer.zero_grad()
    assert model.weight.item() == pytest.approx(-(1.5 + 3.5 + 5.5))


def test_a_window_that_is_given_up_leaves_nothing_to_the_next():
    engine = make(gradient_accumulation_steps=2)
    model, optimizer = one_weight(engine)
    for batch_idx in range(4):
        with engine.accumulate(model):
            engine.backward(model(ones()).sum())
            if batch_idx > 1:
                optimizer.step()
            optimizer.zero_grad()
    assert model.weight.item() == pytest.approx(-1.0)


def test_an_overflow_in_a_fused_optimizer_is_seen():
    engine = make(precision="16-mixed")
    model = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    prepared: Any = engine.prepare(model, optimizer, scheduler)
    model, optimizer, scheduler = prepared
    engine.backward(model(ones()).sum() * 1e38 * 1e3)
    optimizer.step()
    scheduler.step()
    assert optimizer.step_was_skipped
    assert scheduler.get_last_lr() == [1e-3]


# -- what was prepared ------------------------------------------------------------------------------------------------


def test_two_shuffled_loaders_have_orders_of_their_own():
    numbers = TensorDataset(torch.arange(16))
    engine = make()
    first, second = engine.prepare(
        *(DataLoader(numbers, shuffle=True) for _ in range(2))
    )
    assert [x.item() for (x,) in first] != [x.item() for (x,) in second]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_what_an_engine_has_forgotten_still_computes_and_can_be_prepared_again(
    precision: str,
):
    engine = make(precision=precision)
    model, optimizer = one_weight(engine)
    assert engine.prepare(engine.unwrap_model(model)) is model
    engine.end_training()
    assert model(ones()).item() == 0.0
    for other in (engine, make(precision=precision)):
        again, stepped = other.prepare(model, optimizer)
        other.backward(again(ones()).sum())
        stepped.step()
        stepped.zero_grad()
    assert model.weight.item() == pytest.approx(-2.0)


def test_what_cannot_be_prepared_leaves_nothing_behind():
    engine = Engine("cpu", precision="16-mixed")
    half, model = nn.Linear(2, 2).half(), nn.Linear(2, 2)
    with pytest.raises(ValueError, match="cannot scale the gradients"):
        engine.prepare(half, torch.optim.SGD(half.parameters()))
    prepared, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters()))
    assert [strategy.module for strategy in engine.prepared.strategies] == [model]
    assert engine.prepared.optimizers == [optimizer]
    assert engine.prepared.find_module(half) is None
    # What is prepared is found by the user's object, and by itself.
    assert engine.prepared.find_module(model) is prepared
    assert engine.prepared.find_module(prepared) is prepared
    assert engine.prepare(prepared, optimizer) == (prepared, optimizer)
    assert engine.prepare(model) is prepared


def test_attributes_of_an_optimizer_are_read_through_and_not_set():
    engine, model = Engine("cpu"), nn.Linear(2, 2)
    bare = torch.optim.Adam(model.parameters())
    optimizer = engine.prepare(model, bare)[1]
    assert optimizer.param_groups is bare.param_groups
    assert optimizer.state is bare.state
    assert optimizer.defaults is bare.defaults
    with pytest.raises(AttributeError):
        optimizer.param_groups = []


def test_a_class_that_watches_its_subclasses_and_one_with_slots():
    registered: list[str] = []

    class Watched(nn.Module):
        __slots__ = ("factor",)

        def __init_subclass__(cls, **kwargs: Any) -> None:
            registered.append(cls.__name__)

        def __init__(self) -> None:
            super().__init__()
            self.factor = 2.0

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            outputs: dict[str, Tensor] = defaultdict(lambda: x)
            outputs["y"] = (x * self.factor).bfloat16()
            return outputs

    model = make(precision="bf16-mixed").prepare(Watched())
    assert model.factor == 2.0
    assert model(ones())["y"].dtype == torch.float32
    assert not registered


# -- state ------------------------------------------------------------------------------------------------------------


class Stateful:
    """A loader that keeps its own state."""

    dataset = None

    def __init__(self) -> None:
        self.position = 0

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < 12:
            self.position += 1
            yield torch.tensor([[float(self.position - 1)]])
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


@pytest.mark.parametrize(
    "loader", [Stateful, lambda: DataLoader(as_dataset(torch.arange(12.0)[:, None]))]
)
def test_a_window_that_was_saved_half_done_is_begun_again(
    tmp_path: Path, loader: Callable[[], Any]
):
    def prepare() -> Any:
        engine = make(gradient_accumulation_steps=4)
        return engine, *one_weight(engine), engine.prepare(loader())

    engine, model, optimizer, batches = prepare()
    for batch_idx, x in enumerate(batches):
        with engine.accumulate(model):
            engine.backward(model(x).sum())
            optimizer.step()
            optimizer.zero_grad()
        if batch_idx == 5:
            engine.save_state(tmp_path / "state")
            break
    engine, model, optimizer, batches = prepare()
    engine.load_state(tmp_path / "state")
    assert [x.item() for x in batches] == list(range(4, 12))


@pytest.mark.parametrize("saved_after", [(0, 2), (0, 12), (1, 0), (1, 5)])
def test_torchdatas_loader_goes_on(tmp_path: Path, saved_after: tuple[int, int]):
    """Saved inside an epoch, in the body of its last batch, between two, and inside the second."""

    def run(seed: int, resume: bool = False) -> list[tuple[int, int, float]]:
        torch.manual_seed(seed)
        engine = make()
        one_weight(engine)
        batches: Any = engine.prepare(
            StatefulDataLoader(as_dataset(torch.arange(12.0)[:, None]), shuffle=True)
        )
        if resume:
            engine.load_state(tmp_path / "state")
        read: list[tuple[int, int, float]] = []
        while batches.epoch < 3:
            epoch = batches.epoch
            if not resume and saved_after == (epoch, 0):
                engine.save_state(tmp_path / "state")
            for x in batches:
                read.append((epoch, batches.batches, x.item()))
                if not resume and saved_after == (epoch, batches.batches):
                    engine.save_state(tmp_path / "state")
        return read

    whole = run(1)
    rest = run(9, resume=True)
    assert rest == whole[12 * saved_after[0] + saved_after[1] :]


def test_a_window_over_an_epoch_that_was_left_is_saved_where_it_is(tmp_path: Path):
    engine = make(gradient_accumulation_steps=4)
    model, optimizer = one_weight(engine)
    loader: Any = engine.prepare(DataLoader(as_dataset(torch.arange(12.0)[:, None])))
    for last in (2, 1):
        for x in loader:
            with engine.accumulate(model):
                engine.backward(model(x).sum())
                optimizer.step()
            if loader.batches == last:
                break
    assert loader.state_dict()["batches"] == 0


def test_loading_forgets_gradients_and_keeps_the_loss_scale(tmp_path: Path):
    engine = make(precision="16-mixed")
    model, optimizer = one_weight(engine)
    assert engine.scaler is not None
    scale = engine.scaler.get_scale()
    engine.save_state(tmp_path / "state")
    engine.backward(model(ones()).sum() * 1e38 * 1e3)
    optimizer.step()
    engine.load_state(tmp_path / "state")
    assert engine.scaler.get_scale() == scale
    engine.backward(model(ones()).sum())
    optimizer.step()
    assert model.weight.item() == pytest.approx(-1.0)


def test_a_model_without_parameters_is_saved_and_loaded(tmp_path: Path):
    engine = make()
    engine.prepare(nn.CrossEntropyLoss(), nn.Linear(2, 1))
    engine.save_state(tmp_path / "state")
    engine.load_state(tmp_path / "state")


def test_a_trainers_checkpoint_is_taken_up_beside_a_loader_for_validation(
    tmp_path: Path,
):
    model = Linear()
    trainer = quiet(max_steps=3)
    trainer.fit(model, DataLoader(data(), batch_size=1))
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    engine = make()
    model = Linear()
    _, _, train, val = engine.prepare(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        DataLoader(data(), batch_size=1),
        DataLoader(data(), batch_size=1),
    )
    engine.load_state(tmp_path / "three.ckpt")
    assert (len(list(train)), len(list(val))) == (5, 8)


# -- copies -----------------------------------------------------------------------------------------------------------


class Copied(nn.Linear):
    """Copies itself in a way of its own."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        other = Copied(self.in_features, self.out_features)
        other.load_state_dict(self.state_dict())
        return other


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),
    "parametrized": lambda: weight_norm(nn.Linear(3, 1)),
    "parametrized part": lambda: nn.Sequential(weight_norm(nn.Linear(3, 1))),
    "copies itself": lambda: Copied(3, 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_of_a_prepared_model_computes_with_weights_of_its_own(name: str):
    check_copies(make(precision="bf16-mixed"), MODELS[name]())


def check_copies(engine: Engine, model: nn.Module) -> None:
    model = engine.prepare(model)
    copies = [
        copy.deepcopy(model),
        copy.deepcopy({"models": [model]})["models"][0],
        AveragedModel(model).module,
    ]
    for number, other in enumerate(copies):
        for parameter in other.parameters():
            parameter.detach().fill_(number + 1)
    for parameter in model.parameters():
        parameter.detach().zero_()
    x = torch.randn(4, 3)
    expected = copy.deepcopy(engine.unwrap_model(model))
    for number, other in enumerate(copies):
        assert engine.unwrap_model(other) is other
        for parameter in expected.parameters():
            parameter.detach().fill_(number + 1)
        assert torch.equal(other(x), expected(x))
    assert all(not parameter.any() for parameter in model.parameters())


def test_a_copy_of_an_optimizer_or_a_scheduler_is_one_without_the_engine():
    engine = make()
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, scheduler = engine.prepare(
        model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1)
    )
    for copied in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert type(copied) is torch.optim.lr_scheduler.StepLR
        assert type(copied.optimizer) is torch.optim.SGD
    assert type(copy.deepcopy(optimizer)) is torch.optim.SGD


# -- calls that all processes must make --------------------------------------------------------------------------------


def calls_of_one(folder: Path) -> dict[str, Any]:
    """What happens when one of two processes makes a call, while the other gathers (or makes another)."""
    engine = make(strategy="ddp")
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    model, optimizer, loader = engine.prepare(
        model,
        torch.optim.Adam(model.parameters()),
        DataLoader(as_dataset(torch.arange(12.0)[:, None]), batch_size=2),
    )
    spread = make(strategy="fsdp")
    spread_model = nn.Linear(2, 1)
    spread.prepare(spread_model, torch.optim.SGD(spread_model.parameters(), lr=0.1))
    found: dict[str, Any] = {}

    def one(
        name: str,
        rank: int,
        call: Callable[[], Any],
        other: Callable[[], Any] | None = None,
    ) -> None:
        """Make a call in one process, and another in the other one; then all gather how it went."""
        outcome = "went on"
        try:
            if engine.process_index == rank:
                call()
            elif other is not None:
                other()
        except RuntimeError as error:
            outcome = str(error)
        found[name] = engine.gather_object(outcome)

    one("wait", 0, engine.wait_for_everyone)
    one("wait of the other", 1, engine.wait_for_everyone)
    one("end", 0, engine.end_training)
    another = nn.Linear(1, 1)
    one("prepare", 1, lambda: engine.prepare(another))
    one("different", 0, lambda: engine.load_state("nowhere"), engine.wait_for_everyone)
    one(
        "late",
        0,
        engine.wait_for_everyone,
        lambda: (threading.Event().wait(1.5), engine.wait_for_everyone()),
    )
    one("save in parts", 0, lambda: spread.save_state(folder / "parts"))
    one("save of the other", 1, lambda: engine.save_state(folder / "other"))
    trainer, module, batches = (
        quiet(devices=2, strategy="ddp"),
        Evaluated(),
        list(DataLoader(data(8), 2)),
    )
    one("test", 0, lambda: trainer.test(module, batches, verbose=False))
    one(
        "runs of two kinds",
        0,
        lambda: trainer.predict(module, batches),
        lambda: trainer.validate(module, batches),
    )
    one("copy of parts", 0, lambda: copy.deepcopy(spread.prepare(spread_model)))
    for batch_idx, x in enumerate(loader):
        engine.backward(model(x).sum())
        optimizer.step()
        optimizer.zero_grad()
        if batch_idx == 0:
            one("save", 0, lambda: engine.save_state(folder / "state"))
            one(
                "save without waiting",
                0,
                lambda: engine.save_state(folder / "state", wait=False),
            )
            one("save weights", 0, lambda: engine.save_model(model, folder / "weights"))
    engine.wait_for_everyone()
    trained = [parameter.detach().clone() for parameter in model.parameters()]
    engine.load_state(folder / "state")
    for x in loader:
        engine.backward(model(x).sum())
        optimizer.step()
        optimizer.zero_grad()
    found["resumed"] = engine.gather_object(
        (trained, [parameter.detach().clone() for parameter in model.parameters()])
    )
    check_copies(make(strategy="ddp"), MODELS["parametrized"]())
    return found


@pytest.fixture(scope="module")
def of_one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("calls")
    return folder, in_processes(2, calls_of_one, folder)


@pytest.mark.parametrize(
    ("name", "call", "rank"),
    [
        ("wait", "wait_for_everyone", 0),
        ("wait of the other", "wait_for_everyone", 1),
        ("end", "end_training", 0),
        ("prepare", "prepare", 1),
        ("save in parts", "save_state", 0),
        ("save of the other", "save_state", 1),
        ("test", "test", 0),
    ],
)
def test_a_call_that_one_process_makes_names_the_lines_of_all(
    of_one: Any, name: str, call: str, rank: int
):
    told = of_one[1][name]
    assert re.search(
        rf"rank {rank}: {call}\(\) at .*test_engine_rules.py:\d+", told[rank]
    ), told
    assert re.search(
        rf"rank {1 - rank}: waits in another collective, at .*test_engine_rules.py:\d+",
        told[rank],
    ), told
    assert told[1 - rank] == "went on"


def test_two_different_calls_name_the_lines_in_both_processes(of_one: Any):
    for told in of_one[1]["different"]:
        assert re.search(
            r"rank 0: load_state\(\) at .*test_engine_rules.py:\d+", told
        ), told
        assert re.search(
            r"rank 1: wait_for_everyone\(\) at .*test_engine_rules.py:\d+", told
        ), told


def test_two_runs_of_a_trainer_name_the_lines_in_both_processes(of_one: Any):
    for told in of_one[1]["runs of two kinds"]:
        assert re.search(r"rank 0: predict\(\) at .*test_engine_rules.py:\d+", told), (
            told
        )
        assert re.search(r"rank 1: validate\(\) at .*test_engine_rules.py:\d+", told), (
            told
        )


def test_a_process_that_is_late_is_waited_for(of_one: Any):
    assert of_one[1]["late"] == ["went on"] * 2


def test_a_model_in_parts_is_not_copied(of_one: Any):
    assert "is in parts" in of_one[1]["copy of parts"][0]


def test_the_main_process_saves_alone_and_all_resume(of_one: Any):
    folder, found = of_one
    assert [
        found[name] for name in ("save", "save without waiting", "save weights")
    ] == [["went on"] * 2] * 3
    for trained, resumed in found["resumed"]:
        assert all(torch.equal(a, b) for a, b in zip(trained, resumed, strict=True))
    engine = make()
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    model, _, loader = engine.prepare(
        model,
        torch.optim.Adam(model.parameters()),
        DataLoader(as_dataset(torch.arange(12.0)[:, None]), batch_size=2),
    )
    engine.load_state(folder / "state")
    assert torch.cat(list(loader)).flatten().tolist() == list(range(4, 12))
    assert (
        load_file(folder / "weights" / "model.safetensors").keys()
        == model.state_dict().keys()
    )


def ending_first() -> None:
    engine = make()
    if engine.is_main_process:
        engine.wait_for_everyone()


def test_a_process_that_has_ended_is_not_waited_for():
    with pytest.raises(RuntimeError) as error:
        in_processes(2, ending_first)
    assert re.search(
        r"rank 0: wait_for_everyone\(\) at .*test_engine_rules.py:\d+", str(error.value)
    )
    assert "rank 1: has ended" in str(error.value)


# -- several processes ------------------------------------------------------------------------------------------------


def frozen_for_the_other_step(engine: Engine) -> Any:
    """A discriminator that is frozen while the generator learns, which comes last."""
    torch.manual_seed(0)
    critic, generator = nn.Linear(1, 1), nn.Linear(1, 1)
    critic, generator, c_opt, g_opt = engine.prepare(
        critic,
        generator,
        torch.optim.SGD(critic.parameters(), lr=0.1),
        torch.optim.SGD(generator.parameters(), lr=0.1),
    )
    for _ in range(2):
        for x in engine.prepare(
            DataLoader(as_dataset(torch.randn(8, 1)), batch_size=2)
        ):
            critic.requires_grad_(True)
            engine.backward(
                critic(generator(x).detach()).square().mean() - critic(x).mean()
            )
            c_opt.step()
            c_opt.zero_grad()
            critic.requires_grad_(False)
            engine.backward(-critic(generator(x)).mean())
            g_opt.step()
            g_opt.zero_grad()
    return [
        parameter.detach().clone()
        for model in (critic, generator)
        for parameter in model.parameters()
    ]


def called_by_its_parts(engine: Engine) -> Any:
    model = nn.ModuleDict({"encoder": nn.Linear(1, 2), "head": nn.Linear(2, 1)})
    model, optimizer = engine.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1)
    )
    for x in engine.prepare(DataLoader(as_dataset(torch.randn(8, 1)), batch_size=2)):
        engine.backward(model["head"](model["encoder"](x)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def gathered_in_the_last_round(engine: Engine) -> Any:
    found = []
    for _ in engine.prepare(DataLoader(as_dataset(torch.arange(3)))):
        with engine.split_between_processes(list("abcd")) as mine:
            found.append(engine.gather_for_metrics(mine, use_gather_object=True))
    return found


def searches_in_a_search(engine: Engine) -> Any:
    sizes: list[Any] = []

    @find_executable_batch_size(starting_batch_size=4)
    def inner(size: int, full: bool) -> int:
        sizes.append(("inner", size))
        if full and size > 2 and engine.process_index == 0:
            raise torch.OutOfMemoryError("the device is full")
        engine.wait_for_everyone()
        return size

    @find_executable_batch_size(starting_batch_size=8)
    def outer(size: int) -> Any:
        sizes.append(("outer", size))
        if size == 8 and engine.process_index == 1:
            raise torch.OutOfMemoryError("the device is full")
        return size, inner(size > 2)

    return outer(), sizes


def failing_first(engine: Engine) -> Any:
    try:
        with engine.main_process_first():
            if engine.is_main_process:
                raise FileNotFoundError("no such file")
    except FileNotFoundError:
        pass
    return engine.reduce(torch.tensor(1)).item()


def many_rules() -> dict[str, Any]:
    first, engine = make(), make()
    first.end_training()
    return {
        "frozen": engine.gather_object(frozen_for_the_other_step(engine)),
        "parts": engine.gather_object(called_by_its_parts(engine)),
        "gathered": gathered_in_the_last_round(engine),
        "failing first": failing_first(engine),
        "nested": searches_in_a_search(engine),
    }


@pytest.fixture(scope="module")
def rules() -> dict[str, Any]:
    return in_processes(2, many_rules)


@pytest.mark.parametrize("case", ["frozen", "parts"])
def test_replicas_stay_alike(rules: dict[str, Any], case: str):
    own, other = rules[case]
    assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


def test_what_is_no_batch_is_gathered_whole_in_the_last_round(rules: dict[str, Any]):
    assert rules["gathered"] == [list("abcd")] * 2


def test_the_main_process_that_fails_first_lets_the_others_go_on(rules: dict[str, Any]):
    assert rules["failing first"] == 2


def test_a_search_inside_a_search_ends(rules: dict[str, Any]):
    found, sizes = rules["nested"]
    assert found == (4, 2)
    assert [size for size in sizes if size[0] == "outer"] == [
        ("outer", 8),
        ("outer", 4),
    ]
