"""`loopwright launch`: what its options make of a command line, and programs that run under it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loopwright.framework.command_line.launch import Job, read_job
from tests.programs import descendants, run_program

LAUNCH = ("-m", "loopwright", "launch")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there to be started."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "program.py"
    file.write_text("")
    return file


@pytest.mark.parametrize(
    "written",
    [
        "--processes 2 program.py",
        "--processes=2 program.py",
        "--nproc_per_node 2 --nnodes 1 program.py",
        "--nproc-per-node=2 --standalone program.py",
        "--num_processes 2 --num_machines 1 --multi_gpu program.py",
        "--num-processes=2 -- program.py",
    ],
)
def test_processes_are_asked_for_in_everybodys_words(
    written: str, program: Path
) -> None:
    job = read_job(f"{written} --processes 7 --x=1".split())
    assert job.processes == 2
    assert job.nodes.count == 1
    # What follows the program is the program's.
    assert job.command[-4:] == ["program.py", "--processes", "7", "--x=1"]
    assert job.command[0] == sys.executable


def test_settings_reach_the_program_as_accelerate_passes_them(program: Path) -> None:
    options = (
        "--processes 1 --mixed_precision bf16 --gradient-accumulation-steps 4 --cpu --debug --gpu_ids 1,2 "
        "--num_cpu_threads_per_process 3 --use_fsdp --fsdp_offload_params true -m package.train --lr 1"
    )
    job = read_job(options.split())
    assert job.command[-4:] == ["-m", "package.train", "--lr", "1"]
    assert job.variables == {
        "LOOPWRIGHT_COMMAND": "loopwright launch",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_DEBUG_MODE": "true",
        "ACCELERATE_USE_FSDP": "true",
        "CUDA_VISIBLE_DEVICES": "1,2",
        "FSDP_OFFLOAD_PARAMS": "true",
        "OMP_NUM_THREADS": "3",
    }


def machines(*options: str) -> Job:
    return read_job(["--processes", "4", *options, "program.py"])


def test_machines_meet_where_they_are_told(program: Path) -> None:
    addressed = machines(
        "--nnodes", "2", "--node_rank", "1", "--master_addr", "n1"
    ).nodes
    assert (addressed.backend, addressed.endpoint) == ("static", "n1:29500")
    assert (addressed.settings, addressed.job) == ({"rank": 1}, "none")
    met = machines(
        "--num_machines", "2", "--rdzv-endpoint", "n1:29400", "--rdzv-id", "a",
        "--rdzv_conf", "timeout=60,join_timeout=9", "--max_restarts", "3", "--local_addr", "10.0.0.7",
    )  # fmt: skip
    assert (met.nodes.backend, met.nodes.endpoint) == ("c10d", "n1:29400")
    assert (met.nodes.job, met.max_restarts, met.processes) == ("a", 3, 4)
    assert met.nodes.settings == {"timeout": "60", "join_timeout": "9"}
    assert (met.nodes.local_addr, addressed.local_addr) == ("10.0.0.7", None)
    elastic = machines("--nnodes", "1:3", "--rdzv-endpoint", "n1:29400").nodes
    assert (elastic.least, elastic.count) == (1, 3)


def test_what_has_no_effect_on_one_machine_is_said(
    program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = machines("--master_port", "29501", "--node_rank", "0")
    assert job.nodes.count == 1
    assert (
        "whose processes meet at a free port: master_port\n" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("--num-procs 2 program.py", "no option '--num-procs'; did you mean '--num-processes'?"),
        ("--processes two program.py", "argument --processes/--nproc-per-node: invalid"),
        ("--processes 0 program.py", "invalid integer from 1"),
        ("--processes", "--processes needs a value"),
        ("--processes 2", "name a program to start"),
        ("--processes 2 progam.py", "there is no file 'progam.py'"),
        ("--no_python no-such-program", "there is no program 'no-such-program'"),
        ("--no_python -m program", "exclude each other"),
        ("--tee 3 program.py", "--tee has no effect here: all processes write to this terminal"),
        ("--mixed_precision fp8 program.py", "choose from"),
        ("--nnodes 4:1 program.py", "must be an integer from 1, or least:most, such as 1:4; got '4:1'"),
        ("--nnodes 1:2 --num_processes 4 program.py", "pass --processes, those of each machine"),
        ("--processes 1 --nnodes 1:2 --master_addr n1 --node_rank 0 program.py", "needs --rdzv-backend c10d"),
        ("--num_processes 3 --nnodes 2 program.py", "cannot be divided by 2 of them"),
        ("--num_processes 4 --nnodes 2 --processes 4 program.py", "contradicts --processes 4"),
        ("--processes 1 --nnodes 2 program.py", "needs --rdzv-endpoint host:port, or"),
        ("--processes 1 --nnodes 2 --master_addr n1 program.py", "--node_rank must be an integer from 0 to 1"),
        ("--processes 1 --nnodes 2 --master_addr n1 --node_rank 0 --max_restarts 1 program.py", "c10d"),
        ("--processes 1 --nnodes 2 --rdzv_endpoint n1 --rdzv_conf x program.py", "key=value"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_an_error(
    written: str, words: str, program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        read_job(written.split())
    assert ended.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_switched_off_launcher_starts_nothing(
    program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOOPWRIGHT_LAUNCH", "off")
    with pytest.raises(SystemExit):
        read_job(["--processes", "2", "program.py"])
    assert "LOOPWRIGHT_LAUNCH=off" in capsys.readouterr().err


CONFIG = """
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: FSDP
downcast_bf16: 'no'
enable_cpu_affinity: true
fsdp_config:
  fsdp_offload_params: false
  fsdp_sharding_strategy: FULL_SHARD
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 2
num_processes: 4
main_process_ip: n1
main_process_port: 29501
rdzv_backend: static
same_network: true
use_cpu: false
"""


@pytest.mark.parametrize("name", ["config.yaml", "config.json"])
def test_a_file_of_accelerate_config(
    name: str, program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    text = CONFIG if name.endswith("yaml") else json.dumps(yaml.safe_load(CONFIG))
    Path(name).write_text(text)
    job = read_job(["--config_file", name, "--mixed_precision", "fp16", "program.py"])
    assert (job.processes, job.nodes.count) == (2, 2)
    assert (job.nodes.endpoint, job.nodes.settings) == ("n1:29501", {"rank": 0})
    # The command line counts for more than the file.
    assert job.variables["ACCELERATE_MIXED_PRECISION"] == "fp16"
    assert job.variables["ACCELERATE_USE_FSDP"] == "true"
    assert job.variables["FSDP_SHARDING_STRATEGY"] == "FULL_SHARD"
    assert "ACCELERATE_USE_CPU" not in job.variables
    said = capsys.readouterr().err
    assert f"{name}: no effect here: enable_cpu_affinity\n" in said


def test_a_file_for_another_kind_of_machine_is_refused(
    program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("tpu.yaml").write_text("distributed_type: XLA\nnum_processes: 8\n")
    with pytest.raises(SystemExit):
        read_job(["--config_file", "tpu.yaml", "program.py"])
    assert "distributed_type XLA cannot be served" in capsys.readouterr().err


TRAINING = """
import sys

import torch
from torch.utils.data import DataLoader

from loopwright import Engine, Module, Trainer


class Net(Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


try:
    Trainer(devices=3, accelerator="cpu", logger=False)
except ValueError as error:
    refused = str(error)
engine = Engine()
told = [engine.num_processes, engine.precision.name, engine.gradient_accumulation_steps, engine.device.type]
trainer = Trainer(devices="auto", max_steps=2, barebones=True)
trainer.fit(Net(), DataLoader(torch.ones(32, 2), 2))
counts = (trainer.world_size, trainer.global_step, trainer.accumulate_grad_batches)
result = ("RESULT", sys.argv[1:], told, *counts, refused)
# Both processes write to one pipe, so each line is written at once.
sys.stdout.write(" ".join(map(str, result)) + "\\n")
"""


def test_a_program_takes_what_the_command_asks_for(program: Path) -> None:
    program.write_text(TRAINING)
    ended = run_program(
        *LAUNCH, "--processes", 2, "--mixed_precision", "bf16", "--gradient_accumulation_steps", 4, "--cpu",
        "program.py", "--flag", "value",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "precision='bf16-mixed', as loopwright launch asks for" in ended.stderr
    results = [line for line in ended.stdout.splitlines() if line.startswith("RESULT")]
    assert len(results) == 2
    for result in results:
        assert "['--flag', 'value'] [2, 'bf16-mixed', 4, 'cpu'] 2 2 4 " in result
        assert "devices asks for 3, but loopwright launch started 2 processes" in result


FAILING = """
import os
import signal
import sys
import time

rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
sys.stdout.write(f"STARTED {rank}\\n")
sys.stdout.flush()
if sys.argv[1] == "exit" and rank == "1":
    sys.exit(3)
if sys.argv[1] == "kill" and rank == "0":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "again":
    sys.exit(int(attempt == "0"))
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("what", "options", "code", "words"),
    [
        ("exit", [], 3, "Rank 1 of 2 ended with exit code 3"),
        ("kill", [], 137, "Rank 0 of 2 ended with SIGKILL"),
        ("again", ["--max_restarts", 1], 0, ""),
    ],
)
def test_who_dies_first_is_told(
    what: str, options: list[str], code: int, words: str, program: Path
) -> None:
    program.write_text(FAILING)
    ended = run_program(*LAUNCH, "--processes", 2, *options, program, what)
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.strip().startswith(words)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_ends_all(number: int, code: int, program: Path) -> None:
    program.write_text(FAILING)
    command = [sys.executable, *LAUNCH, "--processes", "2", str(program), "sleep"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as launcher:
        assert launcher.stdout is not None
        assert launcher.stderr is not None
        for _ in range(2):
            assert launcher.stdout.readline().startswith("STARTED")
        started = descendants(launcher.pid)[1:]
        assert len(started) >= 2
        launcher.send_signal(number)
        assert launcher.wait(timeout=60) == code
        told = f"{signal.Signals(number).name} has ended the job; it was not training\n"
        assert told in launcher.stderr.read()
    for process in started:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


MEETING = """
import torch

from loopwright import Engine

engine = Engine()
ranks = engine.gather(torch.tensor([engine.process_index]))
print("RESULT", engine.process_index, ranks.tolist(), flush=True)
if engine.process_index == 1:
    raise RuntimeError("the second one fails")
engine.wait_for_everyone()
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["static", "c10d"])
def test_two_machines_are_one_job(backend: str, program: Path) -> None:
    program.write_text(MEETING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--rdzv-endpoint", f"127.0.0.1:{port}"]
    if backend == "static":
        where = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    launchers = [
        subprocess.Popen(
            [sys.executable, *LAUNCH, "--num_processes", "2", "--nnodes", "2", "--node_rank", str(rank), *where,
             "--cpu", str(program)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        ends = [launcher.communicate(timeout=100) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    told = sorted(line for out, _ in ends for line in out.splitlines())
    assert told == ["RESULT 0 [0, 1]", "RESULT 1 [0, 1]"]
    failed = [err for out, err in ends if "RESULT 1" in out]
    assert "Rank 1 of 2 failed" in failed[0]
    assert "the second one fails" in failed[0]
    assert all(launcher.returncode == 1 for launcher in launchers)


LEFT = """
import os
import sys
import time

from loopwright import Engine

engine = Engine(accelerator="cpu")
print("RESULT", engine.process_index, engine.num_processes, os.getpid(), flush=True)
while not os.path.exists(sys.argv[1]):
    engine.wait_for_everyone()
    time.sleep(0.05)
"""


@pytest.mark.slow
def test_a_job_goes_on_without_a_machine(program: Path, tmp_path: Path) -> None:
    """Its launcher is killed: its process dies, and that of the other machine is started again by itself."""
    program.write_text(LEFT)
    over = tmp_path / "over"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, *LAUNCH, "--processes", "1", "--nnodes", "1:2", "--rdzv-endpoint", f"127.0.0.1:{port}",
        "--max_restarts", "1", str(program), str(over),
    ]  # fmt: skip
    outputs = [tmp_path / "first", tmp_path / "second"]
    launchers = []
    try:
        for output in outputs:
            # The first one keeps the store.
            with output.open("w") as file:
                launchers.append(subprocess.Popen(command, stdout=file))
            wait_for_port(port)
        # If the second one is late, the first one begins alone, and then again with it.
        results = [wait_for_result(output, of=2) for output in outputs]
        assert {rank for rank, _ in results} == {0, 1}
        launchers[1].kill()
        assert wait_for_result(outputs[0], of=1)[0] == 0
        with pytest.raises(ProcessLookupError):
            os.kill(results[1][1], 0)
        over.touch()
        assert launchers[0].wait(timeout=60) == 0
    finally:
        for launcher in launchers:
            launcher.kill()
            launcher.wait()


def wait_for_result(output: Path, of: int) -> tuple[int, int]:
    """Wait until a process of a job of that size has told its rank and its id; return the last that has."""
    until = time.monotonic() + 100
    while time.monotonic() < until:
        told = [line.split()[1:] for line in output.read_text().splitlines()]
        ranks = [(int(rank), int(pid)) for rank, size, pid in told if int(size) == of]
        if ranks:
            return ranks[-1]
        time.sleep(0.05)
    raise AssertionError(f"no process of {of}: {output.read_text()!r}")


KILLED_AS_IT_CAME = """
import os
import signal

from loopwright import Engine

engine = Engine(accelerator="cpu")
engine.wait_for_everyone()
if engine.process_index == 1:
    def count(store, key, amount):
        os.kill(os.getpid(), signal.SIGKILL)

    # It has told the others which call it makes, and not yet that it has come.
    from torch.distributed import Store

    for kind in (Store, *Store.__subclasses__()):
        kind.add = count
engine.wait_for_everyone()
"""


def test_a_process_that_is_killed_as_it_comes_is_not_waited_for(program: Path) -> None:
    """Without an agent that would end the other one."""
    program.write_text(KILLED_AS_IT_CAME)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, str(program)],
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        _, told = started[0].communicate(timeout=60)
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert started[0].returncode == 1
    assert "rank 1: has ended" in told


def wait_for_port(port: int) -> None:
    """Wait until somebody listens there."""
    while True:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
