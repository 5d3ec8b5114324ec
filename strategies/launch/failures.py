"""The processes of a run: adopting those that a launcher has started, and starting them.

Who is already launched (by torchrun, SLURM's srun, MPI, Kubernetes' PyTorchJob, Ray Train) is found by :func:`detect`.
Otherwise a script that asks for several processes becomes torchelastic's agent itself, which runs the same command line
in each of them (:func:`rerun_script`). Where there is no script to run again, as in a notebook, a function is sent to
fresh processes (:func:`call_in_processes`); they are spawned, never forked, as a fork hangs after OpenMP has run and
fails after CUDA has. Watching, stopping and restarting processes is torchelastic's business in both cases.
"""

from __future__ import annotations

import atexit
import builtins
import gc
import io
import json
import linecache
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from glob import glob
from types import FrameType
from typing import Any, NoReturn

SWITCH = "LOOPWRIGHT_LAUNCH"  # "off": whatever launched this process is not looked for
AGENT = "LOOPWRIGHT_AGENT"  # in processes that we start: the process id of the one that did

_IMPORTED_IN = os.getcwd()
# What programs are called that run others in a way of their own: their command line must not be run again.
_RUNNERS = ("doctest", "idlelib", "pdb", "unittest")
# What torchelastic's agent passes on to the processes: SLURM and others announce the end of a job by SIGUSR1.
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
# In messages of errors that only say that another process has gone, or is stuck.
_PEER_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused) by peer|broken pipe", re.IGNORECASE)
_PEER_FAILED = re.compile(r"rank \d+ could not save")


@dataclass(frozen=True)
class Place:
    """This process among its peers, as its launcher says.

    Attributes:
        launcher: who started it, in words.
        rank, local_rank, node_rank: its index among all, on its machine, and that of its machine.
        world_size, local_world_size: number of processes in all and on this machine.
        address, port: where the processes meet, on the machine of rank 0.
        elastic: torchelastic started it, even if it is the only one.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    address: str
    port: int
    elastic: bool = False

    @property
    def num_nodes(self) -> int:
        """Number of machines, if each has as many processes."""
        return -(-self.world_size // self.local_world_size)


# -- adopting ---------------------------------------------------------------------------------------------------------


def detect() -> Place | None:
    """This process's place, if it was launched as one of several (or by torchelastic, as one of any number).

    Raises:
        ValueError: if a launcher's variables contradict each other, or one is missing.
    """
    if os.environ.get(SWITCH) == "off" or _started_by_a_rank():
        return None
    for find in (_from_variables, _from_slurm, _from_mpi):
        place = find(os.environ)
        if place is not None and (place.world_size > 1 or place.elastic):
            return place
    return None


def _from_variables(env: Mapping[str, str]) -> Place | None:
    """torchrun, PyTorchJob, Ray Train, and our own processes."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        return None
    rank, local_rank, local_size = (
        int(env.get(name, usual)) for name, usual in (("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if local_rank >= local_size:
        raise ValueError(
            f"LOCAL_RANK is {local_rank} and LOCAL_WORLD_SIZE {env.get('LOCAL_WORLD_SIZE')}: set the latter"
        )
    elastic = "TORCHELASTIC_RUN_ID" in env
    own = "this program" if AGENT in env else "torchrun"
    return Place(
        launcher=own if elastic else "the environment (RANK, WORLD_SIZE)",
        rank=rank,
        world_size=int(env["WORLD_SIZE"]),
        local_rank=local_rank,
        local_world_size=local_size,
        node_rank=int(env.get("GROUP_RANK", env.get("NODE_RANK", rank // local_size))),
        address=env["MASTER_ADDR"],
        port=int(env["MASTER_PORT"]),
        elastic=elastic,
    )


def _from_slurm(env: Mapping[str, str]) -> Place | None:
    # Only srun sets the number of a step's tasks; a batch script that srun did not start runs alone.
    if "SLURM_STEP_NUM_TASKS" not in env or "SLURM_PROCID" not in env:
        return None
    tasks = [  # on each machine: "4(x2),3" means 4, 4, 3
        int(count)
        for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", env["SLURM_STEP_TASKS_PER_NODE"])
        for _ in range(int(times or 1))
    ]
    node = int(env["SLURM_NODEID"])
    return Place(
        launcher="SLURM's srun",
        rank=int(env["SLURM_PROCID"]),
        world_size=int(env["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(env["SLURM_LOCALID"]),
        local_world_size=tasks[node],
        node_rank=node,
        address=env.get("MASTER_ADDR") or first_host(env["SLURM_STEP_NODELIST"]),
        port=int(env.get("MASTER_PORT") or 15000 + (int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"])) % 10000),
    )


def first_host(nodes: str) -> str:
    """The first of a SLURM node list, such as ``gpu[003-007,012],login1``."""
    found = re.match(r"(?:[^\[\],]|\[\d[^\]]*\])+", nodes)  # up to a comma outside of brackets
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST is no list of machines: {nodes!r}; set MASTER_ADDR")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", found.group())


def _from_mpi(env: Mapping[str, str]) -> Place | None:
    for names in (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ):
        if set(names) <= env.keys():
            rank, size, local_rank, local_size = (int(env[name]) for name in names)
            address = env.get("MASTER_ADDR") or ("127.0.0.1" if local_size == size else None)
            if address is None:
                raise ValueError(
                    f"MPI started {size} processes, {local_size} of them on this machine, and MASTER_ADDR is not set: "
                    "set it to the address of rank 0's machine (mpirun -x MASTER_ADDR=…)"
                )
            port = int(env.get("MASTER_PORT", 29500))
            return Place("MPI", rank, size, local_rank, local_size, rank // local_size, address, port)
    return None


def check_place(place: Place, devices: int | None, num_nodes: int | None) -> None:
    """Refuse counts that are not those of the launcher; None accepts any.

    Raises:
        ValueError: naming both numbers.
    """
    for argument, wanted, found, what in (
        ("devices", devices, place.local_world_size, "processes on this machine"),
        ("num_nodes", num_nodes, place.num_nodes, "machines"),
    ):
        if wanted not in (None, found):
            raise ValueError(
                f"{argument} asks for {wanted}, but {place.launcher} started {found} {what}: make them equal, leave "
                f'{argument}="auto", or set {SWITCH}=off to ignore the launcher'
            )


def runs_alone(place: Place, devices: Any, num_nodes: int | str, single: bool) -> bool:
    """Whether a Trainer in one of several processes asks for no more than a device of its own.

    Args:
        place: what the launcher told this process.
        devices: as passed.
        num_nodes: as passed.
        single: the strategy is one for a single process.
    """
    one_index = isinstance(devices, list) and len(devices) == 1
    one_device = one_index or devices == "1" or (type(devices) is int and devices == 1)
    if num_nodes not in ("auto", 1) or not (one_device or (single and devices == "auto")):
        return False
    # A launcher may have started one process on each machine: then one device is its share.
    return single or place.local_world_size > 1 or (num_nodes == 1 and place.num_nodes > 1)


def adopt() -> None:
    """Make this process a good one among several: its errors are recorded, and it does not outlive its agent."""
    global _adopted, _previous_hook
    if _adopted:
        return
    _adopted = True
    _previous_hook = sys.excepthook
    sys.excepthook = _report_uncaught
    if AGENT in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        _die_with(int(os.environ.get(AGENT, os.getppid())))


def _started_by_a_rank() -> bool:
    """Whether one of our processes has started this one for something else, and it has inherited the variables."""
    agent = int(os.environ.get(AGENT, os.getppid()))
    if os.getppid() == agent:
        return False
    try:
        os.kill(agent, 0)  # asks whether it lives
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)  # as it would have, had it lived a little longer
    return True


def find_peers() -> frozenset[int]:
    """The processes that torchelastic has started beside this one, and itself; none where they cannot be told."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not os.path.exists("/proc/self/stat"):
        return frozenset()
    mine = _command(os.getpid())
    alive = (int(name) for name in os.listdir("/proc") if name.isdigit() and _runs_beside(int(name)))
    found = frozenset(process for process in alive if _command(process) == mine)
    # It may be started through a shell that stays between, or have changed its title.
    return found if len(found) == int(os.environ.get("LOCAL_WORLD_SIZE", 1)) else frozenset()


def one_is_gone(peers: frozenset[int]) -> bool:
    """Whether one of the processes has ended: then torchelastic ends the others by SIGTERM."""
    return not all(map(_runs_beside, peers))


def _runs_beside(process: int) -> bool:
    """Whether a process runs that this one's agent has started."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]  # behind the name, which may hold anything
    except OSError:
        return False
    return int(parent) == os.getppid() and state != "Z"


def process_here() -> tuple[str, int]:
    """This process, for :func:`has_ended`: its machine (or container), and its number there."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}", os.getpid()
    return "", os.getpid()


def has_ended(process: Sequence[Any] | None) -> bool:
    """Whether a process that :func:`process_here` told is known to have ended; on another machine, it is not."""
    machine, number = process or ("", 0)
    if not machine or machine != process_here()[0]:
        return False
    try:
        with open(f"/proc/{number}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _command(process: int) -> bytes:
    """How a process was called, without the numbers, in which those that an agent starts may differ."""
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:
            return re.sub(rb"\d", b"", file.read())
    except OSError:  # it has just ended
        return b""


LAST_WORK: list[Any] = []  # the last barrier's
STORE: list[Any] = []  # where the processes meet: kept for the next process group, which must not meet in another
BEFORE_LEAVING: list[Callable[[], None]] = []  # what is to be done while the process group is still there


def leave_group() -> None:
    """Leave the process group, and so end gloo's threads: one that drops a tensor as the interpreter ends aborts it."""
    import torch.distributed as dist

    for function in list(BEFORE_LEAVING):
        function()
    LAST_WORK.clear()
    gc.collect()  # the traceback of what ended the program may hold DDP, which holds the group
    if dist.is_initialized():
        dist.destroy_process_group()
    if (groups := sys.modules.get("deepspeed.utils.groups")) is not None:
        groups._release_process_group_references()  # which it keeps for its next engine


def leave() -> None:
    """Leave the process group for good."""
    leave_group()
    STORE.clear()


def _die_with(agent: int) -> None:
    """Let the system kill this process when the agent dies (Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() != agent:  # it died before
            os.kill(os.getpid(), signal.SIGKILL)


# -- reporting an error -----------------------------------------------------------------------------------------------

_noted: tuple[int, str] | None = None  # the id of an exception: to hold it would keep alive what its frames hold


def note(error: BaseException, where: str) -> None:
    """Keep in mind how far a run had come when ``error`` ended it, should it end this process too."""
    global _noted
    _noted = id(error), where
    # Python has no hook for SystemExit; and when a peer is gone, the agent may end this process before the hook runs.
    if isinstance(error, SystemExit) or _is_loss(error):
        with suppress(OSError):  # such as a full disk: the run must end in order all the same
            _report(error)
    if isinstance(error, SystemExit) and _adopted and "TORCHELASTIC_ERROR_FILE" not in os.environ:
        _print(f"{_headline(error)} SystemExit: {error}\n")


def forget_failure() -> None:
    """A run begins: what was noted of one before has not ended this process."""
    with suppress(OSError):
        os.remove(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))


def note_stop(where: str, frame: FrameType | None) -> None:
    """The agent ends this process as a peer has ended: keep in mind where it is, unless an error has been noted."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not os.path.exists(path):
        told = "it was told to end, as another process had"
        with suppress(OSError):  # such as a full disk: it must end all the same
            _write_report(path, told, "".join(traceback.format_stack(frame)), where, lost=True, stopped=True)


def _is_loss(error: BaseException) -> bool:
    """Whether ``error`` says that a peer is gone."""
    kind = type(error).__name__
    gone = isinstance(error, RuntimeError) and _PEER_LOST.search(f"{kind}: {error}")
    return bool(kind.startswith("Dist") or gone or _PEER_FAILED.match(str(error)))


def _report(error: BaseException) -> None:
    """Write ``error`` to torchelastic's error file, if it started this process."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        callstack = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        _write_report(path, f"{type(error).__name__}: {error}", callstack, _where(error), lost=_is_loss(error))


def _where(error: BaseException) -> str:
    """How far the run had come that ``error`` ended, if one has noted it."""
    return _noted[1] if _noted is not None and _noted[0] == id(error) else ""


def _headline(error: BaseException) -> str:
    """Which process ``error`` ends, and where."""
    place = detect()
    who = "This process" if place is None else f"Rank {place.rank} of {place.world_size}"
    what = "lost its peers" if _is_loss(error) else "failed"
    if isinstance(error, SystemExit) and not error.code:
        what = "ended"
    where = _where(error)
    return f"{who} {what} at {where}:" if where else f"{who} {what}:"


def _print(text: str) -> None:
    """Write to standard error at once, as other processes do."""
    # Not sys.stderr: torch's hook calls ours with another one there, which is written out only afterwards.
    if sys.__stderr__ is not None:
        sys.__stderr__.write(text)
        sys.__stderr__.flush()


def _write_report(path: str, message: str, callstack: str, where: str, **facts: bool) -> None:
    now = time.time()
    extra = {"py_callstack": callstack, "timestamp": str(int(now))}
    content = {"message": {"message": message, "extraInfo": extra}, "where": where, "time": now, **facts}
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.part", "w", encoding="utf-8") as file:  # this process may be ended meanwhile
        json.dump(content, file)
    os.replace(f"{path}.part", path)


def _report_uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    _report(error)
    if not isinstance(error, Exception):
        _previous_hook(kind, error, trace)
        return
    # With an agent of ours, it prints what all have reported, the guilty rank's first.
    if AGENT not in os.environ:
        with redirect_stderr(io.StringIO()) as text:
            _previous_hook(kind, error, trace)
        _print(f"{_headline(error)}\n{text.getvalue()}")
    # `leave` might wait for peers; and without it, the end of the interpreter is not safe.
    atexit.unregister(leave)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


_adopted = False
_previous_hook = sys.excepthook


def _failure_text(failures: Mapping[int, Any], folder: str, processes: int) -> tuple[str, int, int]:
    """What failed, in the order of guilt: those that merely lost a peer come last; the first's exit code and rank."""
    # By SIGTERM the agent ends those that are left; if there is nothing else, the first had it from elsewhere.
    own = {rank: failure for rank, failure in failures.items() if failure.exitcode != -signal.SIGTERM}
    own = own or dict([min(failures.items(), key=lambda item: item[1].timestamp)])
    found: list[tuple[tuple[bool, float], int, str]] = []
    stopped: dict[int, str] = {}  # those that had not noticed anything, by rank
    attempts = sorted(glob(os.path.join(folder, "*", "attempt_*")), key=lambda path: int(path.rpartition("_")[2]))
    for path in glob(os.path.join(attempts[-1], "*", "error.json")) if attempts else ():
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        rank, extra = int(os.path.basename(os.path.dirname(path))), content["message"]["extraInfo"]
        order = bool(content.get("lost")), float(content.get("time", extra["timestamp"]))
        at = f" at {content['where']}" if content.get("where") else ""
        if content.get("stopped"):
            stopped[rank] = f"was still running when it was stopped{at}:\n{extra['py_callstack'].rstrip()}"
        if order[0]:
            text = f"Rank {rank} of {processes} lost its peers{at}: {content['message']['message']}"
        else:
            text = f"Rank {rank} of {processes} failed{at}:\n{extra['py_callstack'].rstrip()}"
        found.append((order, rank, text))
    told = {rank for _, rank, _ in found}
    for rank, failure in own.items():
        if rank not in told:
            how = f"exit code {failure.exitcode}" if failure.exitcode >= 0 else f"{failure.signal_name()}"
            found.append(((False, failure.timestamp), rank, f"Rank {rank} of {processes} ended with {how}"))
    found.sort()
    if all(lost for (lost, _), _, _ in found):  # to one that hung
        silent = dict.fromkeys(sorted(set(range(processes)) - told), "did not answer: it hung, or had ended")
        guilty = {**silent, **dict(sorted(stopped.items()))}
        found = [entry for entry in found if entry[1] not in stopped]
        found = [((True, 0.0), rank, f"Rank {rank} of {processes} {how}") for rank, how in guilty.items()] + found
    code = next(own[rank].exitcode for _, rank, _ in found if rank in own)
    text = "\n\n".join(text for _, _, text in found)
    return text, 128 - code if code < 0 else code or 1, found[0][1]


# -- starting ---------------------------------------------------------------------------------------------------------


def can_rerun() -> bool:
    """Whether this program is one whose command line can be run again in other processes."""
    main = sys.modules["__main__"]
    runner = getattr(getattr(main, "__spec__", None), "name", "").partition(".")[0]
    interactive = hasattr(sys, "ps1") or sys.flags.interactive or hasattr(builtins, "__IPYTHON__")
    in_test = "PYTEST_CURRENT_TEST" in os.environ and "_pytest" in sys.modules
    alone = multiprocessing.parent_process() is None
    gone = getattr(main, "__file__", "<string>").startswith(("<", "/dev/"))  # it was read from standard input, or -c
    return not gone and alone and not interactive and not in_test and runner not in _RUNNERS


def _started_in() -> str:
    """The folder to which this program's command line is relative. It may have left it before it imported us."""
    main = sys.modules["__main__"]
    file = main.__file__ or ""
    if main.__spec__ is None:  # a script: Python notes its absolute path
        for given in sys.orig_argv[1:]:
            if file.endswith(os.sep + given.removeprefix("./")):
                return file.removesuffix(given.removeprefix("./"))
    elif file.startswith(sys.path[0] + os.sep):  # -m: Python has put it there
        return sys.path[0]
    return _IMPORTED_IN


def rerun_script(processes: int, max_restarts: int = 0) -> NoReturn:
    """Run this program's command line in ``processes`` processes, and leave with the job's exit code."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    sys.stdout.flush()
    sys.stderr.flush()
    os.chdir(_started_in())
    code = 0
    with _agent(processes, max_restarts) as (launch, folder):
        try:
            launch(sys.executable)("-u", *sys.orig_argv[1:])
        except ChildFailedError as error:
            text, code, _ = _failure_text(error.failures, folder, processes)
            print(text, file=sys.stderr)
        except SignalException as error:
            code = 128 + error.sigval
    raise SystemExit(code)


def call_in_processes(function: Callable[..., Any], args: tuple[Any, ...], processes: int) -> Any:
    """Call ``function(*args)`` in ``processes`` fresh processes; returns what it returns in rank 0.

    Both are sent by cloudpickle, so what a notebook defines may be in them.

    Raises:
        TypeError: if they cannot be pickled.
        RuntimeError: if a process died or hung; with the rank that did first, and what is known of it.
        BaseException: what the process that failed first has raised, caused by such a RuntimeError with its traceback.
    """
    import cloudpickle
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with _agent(processes) as (launch, folder):
        payload, result = os.path.join(folder, "call.pkl"), os.path.join(folder, "result.pkl")
        try:
            with open(payload, "wb") as file:
                start_method = multiprocessing.get_start_method(allow_none=True)
                cloudpickle.dump((start_method, _unwritten_sources(), function, args), file)
        except Exception as error:
            raise TypeError(
                f"{processes} processes get the module, its data and the Trainer by pickle here, as there is no script "
                f"to run again, and something in them cannot be pickled: {error}"
            ) from error
        try:
            with _without_main():
                launch(_call)(payload, result)
        except ChildFailedError as error:
            text, _, rank = _failure_text(error.failures, folder, processes)
            failure = RuntimeError(f"a process failed\n\n{text}")
            raised = _load_error(f"{result}.{rank}")
            if raised is None:
                raise failure from None
            if not isinstance(raised, Exception):
                # Nobody prints what has caused one that ends the program.
                print(failure, file=sys.stderr)
            raise raised from failure
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None
        with open(result, "rb") as file:
            return pickle.load(file)


def _unwritten_sources() -> dict[str, Any]:
    """The lines of code that is in no file, such as a notebook's cells, for tracebacks in other processes."""
    return {name: entry for name, entry in linecache.cache.items() if len(entry) == 4 and entry[1] is None}


def _call(payload: str, result: str) -> None:
    """What each of the fresh processes runs."""
    import cloudpickle

    adopt()
    try:
        with open(payload, "rb") as file:
            start_method, sources, function, args = pickle.load(file)
        # A DataLoader's workers are started as they would be in the program, not as this process was.
        multiprocessing.set_start_method(start_method, force=True)
        linecache.cache.update(sources)
        value = function(*args)
        if os.environ["RANK"] == "0":
            with open(result, "wb") as file:
                cloudpickle.dump(value, file)
        leave()
    except BaseException as error:
        _report(error)
        with suppress(Exception):
            _save_error(error, f"{result}.{os.environ['RANK']}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # without waiting for threads or for peers


def _save_error(error: BaseException, path: str) -> None:
    """Write an exception for the process that waits, if it says by itself what happened."""
    import cloudpickle

    if _is_loss(error) or (isinstance(error, SystemExit) and not error.code):
        return
    try:
        content = cloudpickle.dumps(error)
        pickle.loads(content)
    except Exception:
        # Its constructor takes other arguments than it has kept, or something in it cannot be pickled.
        attributes = {name: value for name, value in vars(error).items() if _can_pickle(value)}
        args = error.args if _can_pickle(error.args) else (str(error),)
        content = cloudpickle.dumps((type(error), args, attributes))
    with open(path, "wb") as file:
        file.write(content)


def _can_pickle(value: Any) -> bool:
    import cloudpickle

    try:
        cloudpickle.dumps(value)
    except Exception:
        return False
    return True


def _load_error(path: str) -> BaseException | None:
    """What another process has raised; None if that cannot be told."""
    try:
        with open(path, "rb") as file:
            found = pickle.load(file)
        if isinstance(found, BaseException):
            return found
        kind, args, attributes = found
        error = kind.__new__(kind, *args)
        error.__dict__.update(attributes)
        return error
    except Exception:  # nothing is there, or it is of a class that cannot be sent
        return None


@contextmanager
def _agent(processes: int, max_restarts: int = 0) -> Iterator[tuple[Callable[..., Any], str]]:
    """torchelastic's agent, ready to launch, and a folder for what it leaves; puts everything back afterwards."""
    import logging

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    folder = tempfile.mkdtemp(prefix="loopwright_")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=max_restarts,
        monitor_interval=0.05,  # seconds between two looks at the processes
        signals_to_handle=",".join(signal.Signals(number).name for number in _FORWARDED),
        logs_specs=DefaultLogsSpecs(log_dir=folder),
    )
    environment = dict(os.environ)
    os.environ[AGENT] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # Processes that are started again must not read the addresses of those before them.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    handlers = {number: signal.getsignal(number) for number in _FORWARDED}
    logger = logging.getLogger("torch.distributed.elastic")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # its tables name the process that was seen first to fail, not the guilty one
    try:
        yield lambda entrypoint: elastic_launch(config, entrypoint), folder
    finally:
        logger.setLevel(level)
        if threading.current_thread() is threading.main_thread():  # else torchelastic has set none
            for number, handler in handlers.items():
                signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(environment)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the main module from multiprocessing, which would import it in each spawned process."""
    main = sys.modules["__main__"]
    kept = {name: main.__dict__.pop(name) for name in ("__file__", "__spec__") if name in main.__dict__}
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update(kept)
