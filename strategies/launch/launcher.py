"""Starting the processes of a run, where no launcher has done so.

A process that torchrun, SLURM's srun, MPI, Kubernetes' PyTorchJob or Ray Train has started learns it from
:func:`~.environment.detect_environment`, and starts no others. Without a launcher, a script that asks for several
processes becomes torchelastic's agent, which runs the same command line in each of them (:func:`rerun_script`). Where
there is no script to run again, as in a notebook, a function is sent to fresh processes (:func:`call_in_processes`);
they are spawned, never forked, as a fork hangs after OpenMP has run and fails after CUDA has. In both cases,
torchelastic watches, stops and restarts the processes.
"""

from __future__ import annotations

import builtins
import linecache
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from .agent import ONE_NODE, Nodes, agent
from .failures import is_loss, join_job, report
from .job_report import failure_text, read_attempt, tell_job
from .rank_report import describe_exit
from .rendezvous import RENDEZVOUS

_IMPORTED_IN = os.getcwd()
# Programs that run other programs in their own way: if one of them is main, its command line must not be run again.
_RUNNERS = ("doctest", "idlelib", "pdb", "unittest")


def can_rerun() -> bool:
    """Whether this program is one whose command line can be run again in other processes."""
    main = sys.modules["__main__"]
    runner = getattr(getattr(main, "__spec__", None), "name", "").partition(".")[0]
    if runner in _RUNNERS:
        return False
    if hasattr(sys, "ps1") or sys.flags.interactive or hasattr(builtins, "__IPYTHON__"):
        return False
    if "PYTEST_CURRENT_TEST" in os.environ and "_pytest" in sys.modules:
        return False
    if multiprocessing.parent_process() is not None:
        return False
    # A program from standard input or from -c is in no file.
    file = getattr(main, "__file__", "<string>")
    return not file.startswith(("<", "/dev/"))


def started_in() -> str:
    """Return the folder in which this program was started, to which its command line is relative.

    The program may have changed its folder before it imported us, so the current one then is the last resort.
    """
    main = sys.modules["__main__"]
    file = main.__file__ or ""
    if main.__spec__ is None:
        # For a script, Python keeps the absolute path; what it ends with stands in the command line.
        for argument in sys.orig_argv[1:]:
            relative = argument.removeprefix("./")
            if file.endswith(os.sep + relative):
                return file.removesuffix(relative)
    elif file.startswith(sys.path[0] + os.sep):
        # For -m, Python has put the folder at the front of the path.
        return sys.path[0]
    return _IMPORTED_IN


def rerun_script(processes: int, max_restarts: int = 0) -> NoReturn:
    """Run this program's command line in ``processes`` processes, and leave with the job's exit code.

    Args:
        processes: how many.
        max_restarts: how often all are started again when one fails.

    Raises:
        SystemExit: always.
    """
    os.chdir(started_in())
    command = (sys.executable, "-u", *sys.orig_argv[1:], *_folder_of_hydra())
    raise SystemExit(run_in_processes(command, processes, max_restarts))


def _folder_of_hydra() -> list[str]:
    """The argument by which a program of Hydra's writes into the folder that it has made, and makes no other one."""
    module = sys.modules.get("hydra.core.hydra_config")
    if module is None or not module.HydraConfig.initialized():
        return []
    config = module.HydraConfig.get()
    kind = "sweep" if config.mode.name == "MULTIRUN" else "run"
    folder = os.path.join(config.runtime.cwd, config[kind].dir)
    return [f"hydra.{kind}.dir={folder!r}"]


def run_in_processes(
    command: Sequence[str],
    processes: int,
    max_restarts: int = 0,
    nodes: Nodes = ONE_NODE,
) -> int:
    """Run a command in processes that end together, and print which one failed first.

    Args:
        command: a program and its arguments.
        processes: how many on this machine.
        max_restarts: how often all are started again when one fails.
        nodes: the machines of the job.

    Returns:
        The job's exit code, as a shell gives it.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from .elastic import JobLost

    sys.stdout.flush()
    sys.stderr.flush()
    program, *arguments = command
    with agent(processes, max_restarts, nodes) as (launch, folder):
        try:
            launch(program)(*arguments)
        except ChildFailedError as error:
            failure = failure_text(error.failures, folder, processes, nodes.count)
            tell_job(failure, folder, processes * nodes.count, nodes.job)
            return failure.exit_code
        except SignalException as error:
            _tell_of_signal(error.sigval, folder)
            return 128 + error.sigval
        except JobLost as error:
            print(f"The processes of this machine were ended: {error}", file=sys.stderr)
            return 1
    return 0


def _tell_of_signal(number: int, folder: str) -> None:
    """Say that a signal has ended the processes, if none of them was in a training, which tells of it itself."""
    reports = read_attempt(folder).values()
    if not any(report.kind == "asked" for report in reports):
        name = describe_exit(-number)
        print(f"{name} has ended the job; it was not training", file=sys.stderr)


def call_in_processes(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    processes: int,
    max_restarts: int = 0,
) -> Any:
    """Call ``function(*args)`` in ``processes`` fresh processes; returns what it returns in rank 0.

    Args:
        function: sent by cloudpickle, as its arguments are, so what a notebook defines may be in them.
        args: its arguments.
        processes: how many.
        max_restarts: how often all are started again when one fails, to call the function again.

    Raises:
        TypeError: if they cannot be pickled.
        RuntimeError: if a process died or hung; with the rank that did first, and what is known of it.
        BaseException: what the process that failed first has raised, caused by such a RuntimeError with its traceback.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with agent(processes, max_restarts) as (launch, folder):
        payload = os.path.join(folder, "call.pkl")
        result = os.path.join(folder, "result.pkl")
        try:
            _write_payload(payload, function, args)
        except Exception as error:
            raise TypeError(
                f"{processes} processes get the module, its data and the Trainer by pickle here, as there is no script "
                f"to run again, and something in them cannot be pickled: {error}"
            ) from error
        try:
            with _without_main():
                launch(_call)(payload, result)
        except ChildFailedError as error:
            job = failure_text(error.failures, folder, processes, has_all_exits=False)
            failure = RuntimeError(f"a process failed\n\n{job.text}")
            raised = _load_error(f"{result}.{job.rank}.{job.reports[0].attempt}")
            if raised is None:
                raise failure from None
            if not isinstance(raised, Exception):
                # Python prints no cause of exceptions such as SystemExit.
                print(failure, file=sys.stderr)
            raise raised from failure
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None
        with open(result, "rb") as file:
            return pickle.load(file)


def _write_payload(
    path: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Write what :func:`_call` reads: the function, its arguments, and what it needs of this process."""
    import cloudpickle

    start_method = multiprocessing.get_start_method(allow_none=True)
    # The lines of code that is in no file, such as a notebook's cells, for tracebacks in the other processes.
    cache = linecache.cache
    sources = {k: v for k, v in cache.items() if len(v) == 4 and v[1] is None}
    with open(path, "wb") as file:
        cloudpickle.dump((start_method, sources, function, args), file)


def _call(payload: str, result: str) -> None:
    """Call the function in one of the fresh processes: it is what they run."""
    import cloudpickle

    join_job()
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
        RENDEZVOUS.leave_job()
    except BaseException as error:
        report(error)
        with suppress(Exception):
            restart = os.environ["TORCHELASTIC_RESTART_COUNT"]
            _save_error(error, f"{result}.{os.environ['RANK']}.{restart}")
        sys.stdout.flush()
        sys.stderr.flush()
        # The usual end of the interpreter would wait for threads, which may wait for peers.
        os._exit(1)


def _save_error(error: BaseException, path: str) -> None:
    """Write an exception for the process that waits, unless it only says that a peer is gone or that all went well."""
    import cloudpickle

    if is_loss(error) or (isinstance(error, SystemExit) and not error.code):
        return
    try:
        content = cloudpickle.dumps(error)
        pickle.loads(content)
    except Exception:
        # Its constructor takes other arguments than it has kept, or something in it cannot be pickled: what can be
        # pickled of it is sent in parts.
        attributes = {k: v for k, v in vars(error).items() if _can_pickle(v)}
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
    """Return what another process has raised; None if nothing is there, or it is of a class that cannot be sent."""
    try:
        with open(path, "rb") as file:
            content = pickle.load(file)
        if isinstance(content, BaseException):
            return content
        kind, args, attributes = content
        error = kind.__new__(kind, *args)
        error.__dict__.update(attributes)
        return error
    except Exception:
        return None


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the main module from multiprocessing, which would import it in each spawned process."""
    attributes = vars(sys.modules["__main__"])
    before = dict(attributes)
    attributes.pop("__file__", None)
    attributes["__spec__"] = None
    try:
        yield
    finally:
        for name in ("__file__", "__spec__"):
            if name in before:
                attributes[name] = before[name]
