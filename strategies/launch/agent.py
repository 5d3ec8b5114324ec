"""The processes of a run: adopting those that a launcher has started, and starting them.

Who is already launched (by torchrun, SLURM's srun, MPI, Kubernetes' PyTorchJob, Ray Train) is found by
:func:`~.environment.detect_environment`.
Otherwise a script that asks for several processes becomes torchelastic's agent itself, which runs the same command line
in each of them (:func:`rerun_script`). Where there is no script to run again, as in a notebook, a function is sent to
fresh processes (:func:`call_in_processes`); they are spawned, never forked, as a fork hangs after OpenMP has run and
fails after CUDA has. Watching, stopping and restarting processes is torchelastic's business in both cases.
"""

from __future__ import annotations

import builtins
import linecache
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from .environment import AGENT
from .failures import failure_text, is_loss, join_job, report
from .rendezvous import leave

_IMPORTED_IN = os.getcwd()
# What programs are called that run others in a way of their own: their command line must not be run again.
_RUNNERS = ("doctest", "idlelib", "pdb", "unittest")
# What torchelastic's agent passes on to the processes: SLURM and others announce the end of a job by SIGUSR1.
_FORWARDED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
)


# -- adopting ---------------------------------------------------------------------------------------------------------


# -- reporting an error -----------------------------------------------------------------------------------------------


# -- starting ---------------------------------------------------------------------------------------------------------


def can_rerun() -> bool:
    """Whether this program is one whose command line can be run again in other processes."""
    main = sys.modules["__main__"]
    runner = getattr(getattr(main, "__spec__", None), "name", "").partition(".")[0]
    interactive = (
        hasattr(sys, "ps1") or sys.flags.interactive or hasattr(builtins, "__IPYTHON__")
    )
    in_test = "PYTEST_CURRENT_TEST" in os.environ and "_pytest" in sys.modules
    alone = multiprocessing.parent_process() is None
    gone = getattr(main, "__file__", "<string>").startswith(
        ("<", "/dev/")
    )  # it was read from standard input, or -c
    return (
        not gone
        and alone
        and not interactive
        and not in_test
        and runner not in _RUNNERS
    )


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
            text, code, _ = failure_text(error.failures, folder, processes)
            print(text, file=sys.stderr)
        except SignalException as error:
            code = 128 + error.sigval
    raise SystemExit(code)


def call_in_processes(
    function: Callable[..., Any], args: tuple[Any, ...], processes: int
) -> Any:
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
        payload, result = (
            os.path.join(folder, "call.pkl"),
            os.path.join(folder, "result.pkl"),
        )
        try:
            with open(payload, "wb") as file:
                start_method = multiprocessing.get_start_method(allow_none=True)
                cloudpickle.dump(
                    (start_method, _unwritten_sources(), function, args), file
                )
        except Exception as error:
            raise TypeError(
                f"{processes} processes get the module, its data and the Trainer by pickle here, as there is no script "
                f"to run again, and something in them cannot be pickled: {error}"
            ) from error
        try:
            with _without_main():
                launch(_call)(payload, result)
        except ChildFailedError as error:
            text, _, rank = failure_text(error.failures, folder, processes)
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
    return {
        name: entry
        for name, entry in linecache.cache.items()
        if len(entry) == 4 and entry[1] is None
    }


def _call(payload: str, result: str) -> None:
    """What each of the fresh processes runs."""
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
        leave()
    except BaseException as error:
        report(error)
        with suppress(Exception):
            _save_error(error, f"{result}.{os.environ['RANK']}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # without waiting for threads or for peers


def _save_error(error: BaseException, path: str) -> None:
    """Write an exception for the process that waits, if it says by itself what happened."""
    import cloudpickle

    if is_loss(error) or (isinstance(error, SystemExit) and not error.code):
        return
    try:
        content = cloudpickle.dumps(error)
        pickle.loads(content)
    except Exception:
        # Its constructor takes other arguments than it has kept, or something in it cannot be pickled.
        attributes = {
            name: value for name, value in vars(error).items() if _can_pickle(value)
        }
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
def _agent(
    processes: int, max_restarts: int = 0
) -> Iterator[tuple[Callable[..., Any], str]]:
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
        signals_to_handle=",".join(
            signal.Signals(number).name for number in _FORWARDED
        ),
        logs_specs=DefaultLogsSpecs(log_dir=folder),
    )
    environment = dict(os.environ)
    os.environ[AGENT] = str(os.getpid())
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes))
    )
    # Processes that are started again must not read the addresses of those before them.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    handlers = {number: signal.getsignal(number) for number in _FORWARDED}
    logger = logging.getLogger("torch.distributed.elastic")
    level = logger.level
    logger.setLevel(
        logging.CRITICAL
    )  # its tables name the process that was seen first to fail, not the guilty one
    try:
        yield lambda entrypoint: elastic_launch(config, entrypoint), folder
    finally:
        logger.setLevel(level)
        if (
            threading.current_thread() is threading.main_thread()
        ):  # else torchelastic has set none
            for number, handler in handlers.items():
                signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(environment)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the main module from multiprocessing, which would import it in each spawned process."""
    main = sys.modules["__main__"]
    kept = {
        name: main.__dict__.pop(name)
        for name in ("__file__", "__spec__")
        if name in main.__dict__
    }
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update(kept)
