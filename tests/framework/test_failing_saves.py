"""Saves that fail: a store that breaks off, a disk that refuses, a process that is killed. What was saved stays."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.config import conf
from torch import Tensor, nn

from loopwright.callbacks import ModelCheckpoint
from loopwright.framework import Module, Trainer
from loopwright.framework.checkpoint.find import find_checkpoints, resolve
from loopwright.framework.checkpoint.manifest import is_complete, read_manifest
from loopwright.framework.checkpoint.reader import load_checkpoint
from loopwright.framework.checkpoint.writer import remove_checkpoint, save_checkpoint
from tests.framework.models import Evaluated, ended, in_a_child, loader, quiet

FIRST, SECOND, THIRD, FOURTH = (
    f"epoch={epoch}-step={4 * epoch + 4}.ckpt" for epoch in range(4)
)
EPOCHS = 3

FILES = {
    "manifest.json", "model/model.safetensors", "optimizer/optimizer.safetensors", "rng/rank-0.json",
    "rng/rank-0.safetensors", "state.json", "state.safetensors",
}  # fmt: skip

# -- runs -----------------------------------------------------------------------------------------------------------


class Scored(Evaluated):
    """Dropout and Adam, so that a resume has more than weights to get right; validation scores that are given.

    ``when_saving`` is called with the global step when a checkpoint is put together. The save before is over by then,
    so what it does concerns this one.
    """

    scores = (3.0, 1.0, 2.0, 4.0)

    def __init__(
        self, width: int = 2000, when_saving: Callable[[int], None] | None = None
    ) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            nn.Linear(2, width), nn.Dropout(0.2), nn.Linear(width, 1)
        )
        self.when_saving = when_saving

    def validation_step(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.log("val_loss", torch.tensor(self.scores[self.current_epoch]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.when_saving is not None:
            self.when_saving(checkpoint["global_step"])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def train(
    folder: str | Path | None,
    epochs: int = EPOCHS,
    resume: bool = False,
    when_saving: Callable[[int], None] | None = None,
    **arguments: Any,
) -> tuple[Trainer, Scored]:
    """A run of four steps per epoch, with a checkpoint after each; all are kept unless asked otherwise."""
    # A resumed run must not owe its numbers to the seed.
    torch.manual_seed(99 if resume else 0)
    module = Scored(when_saving=when_saving)
    arguments = {
        "monitor": "val_loss",
        "save_top_k": -1,
        "save_last": True,
        **arguments,
    }
    trainer = quiet(
        *([] if folder is None else [ModelCheckpoint(folder, **arguments)]),
        max_epochs=epochs,
    )
    trainer.fit(
        module, loader(shuffle=True), loader(1), ckpt_path="last" if resume else None
    )
    return trainer, module


def same(module: Module | dict[str, Tensor], other: Module) -> bool:
    """Whether the weights are, to the last bit."""
    weights, expected = (
        module if isinstance(module, dict) else module.state_dict(),
        other.state_dict(),
    )
    return weights.keys() == expected.keys() and all(
        torch.equal(weights[name], expected[name]) for name in expected
    )


@contextmanager
def warnings_of_the_run() -> Iterator[list[str]]:
    """What the logger says at level warning or above; in a process without pytest, too."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Keep(logging.WARNING)
    logging.getLogger("loopwright").addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger("loopwright").removeHandler(handler)


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder))


# -- a disk that refuses --------------------------------------------------------------------------------------------


def check_refusal(
    folder: Path,
    refuse: Callable[[], None],
    allow: Callable[[], None],
    number: int,
    **how: Any,
) -> None:
    """A run whose second checkpoint the disk refuses: with both settings, nothing is lost, and it can go on."""

    def when_saving(step: int) -> None:
        (refuse if step == 8 else allow)()

    whole = train(None)[1]
    first_epoch = train(None, 1)[1]
    for on_save_error in ("raise", "warn"):
        run = folder / on_save_error
        second = str(run / SECOND)
        arguments = {"when_saving": when_saving, "on_save_error": on_save_error, **how}
        if on_save_error == "raise":
            try:
                with pytest.raises(
                    OSError,
                    match=re.escape(f"checkpoint {second!r} could not be written"),
                ) as caught:
                    train(run, **arguments)
            finally:
                allow()
            assert caught.value.errno == number
            assert os.strerror(number) in str(caught.value)
            assert names(run) == {
                FIRST,
                "best.ckpt",
                "last.ckpt",
            }  # nothing half-written, under no name
        else:
            with warnings_of_the_run() as messages:
                trainer, module = train(run, **arguments)
            assert trainer.global_step == 4 * EPOCHS
            assert same(module, whole)
            [message] = messages
            assert second in message
            assert os.strerror(number) in message
            assert "training goes on" in message
            # The one after it was written again.
            assert names(run) == {FIRST, THIRD, "best.ckpt", "last.ckpt"}
            assert same(Scored.load_from_checkpoint(run / THIRD), module)
            assert resolve(str(run / "last.ckpt")) == str(run / THIRD)

        assert same(Scored.load_from_checkpoint(run / FIRST), first_epoch)
        newest = run / (FIRST if on_save_error == "raise" else THIRD)
        assert same(
            Scored.load_from_checkpoint(run / "last.ckpt"),
            whole if newest.name == THIRD else first_epoch,
        )
        trainer, module = train(run, EPOCHS + 1, resume=True)
        assert trainer.ckpt_path == str(newest)
        assert same(module, train(None, EPOCHS + 1)[1])
        assert names(run) >= {FIRST, THIRD, FOURTH}
        assert not [name for name in names(run) if name.startswith(".")]


@pytest.mark.parametrize("async_save", [True, False], ids=["background", "waiting"])
@pytest.mark.parametrize("size", [10_000, 40_000], ids=["first file", "second file"])
def test_a_file_larger_than_the_disk_takes(
    tmp_path: Path, size: int, async_save: bool
) -> None:
    """The weights take 32 kB and the optimizer twice that: writing stops in the middle of one of the two."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores the signal that comes with it, so that `write` fails as on a full disk.
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN

    def allow() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)

    def refuse() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))

    try:
        check_refusal(
            tmp_path / "runs", refuse, allow, errno.EFBIG, async_save=async_save
        )
    finally:
        allow()


def on_a_small_disk(folder: str) -> None:
    """In a process with mounts of its own: a file system of 2 MB that is full once, and read-only once."""
    disk, filler = Path(folder), Path(folder, "filler")

    def mount(*arguments: str) -> None:
        subprocess.run(["mount", *arguments], check=True)

    def fill() -> None:
        free = os.statvfs(folder)
        # What is left then ends in the optimizer's file.
        filler.write_bytes(bytes(free.f_bavail * free.f_frsize - 60_000))

    mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", folder)
    check_refusal(
        disk / "full", fill, lambda: filler.unlink(missing_ok=True), errno.ENOSPC
    )
    check_refusal(
        disk / "fixed",
        lambda: mount("-o", "remount,ro", folder),
        lambda: mount("-o", "remount,rw", folder),
        errno.EROFS,
    )


def test_a_full_and_a_read_only_file_system(tmp_path: Path) -> None:
    """Real ones, which root cannot write to either."""
    own_mounts = ["unshare", "--map-root-user", "--mount"]
    try:
        tried = subprocess.run(
            [*own_mounts, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        pytest.skip(f"no file system can be mounted: {error}")
    if tried.returncode:
        pytest.skip(f"no file system can be mounted: {tried.stderr.strip()}")
    program = f"from tests.framework.test_failing_saves import on_a_small_disk; on_a_small_disk({str(tmp_path)!r})"
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(
        [*own_mounts, sys.executable, "-c", program],
        cwd=root, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr


def test_a_kill_while_a_pointer_is_written_leaves_nothing(tmp_path: Path) -> None:
    """The next save removes what it has left."""
    replace = os.replace

    def be_killed(source: str, target: str) -> None:
        if target.endswith("last.ckpt"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    def act() -> None:
        os.replace = be_killed
        train(tmp_path, 1)

    assert ended(in_a_child(act)) == -signal.SIGKILL
    assert len(names(tmp_path)) == 2
    train(tmp_path, 2, resume=True)
    assert names(tmp_path) == {FIRST, SECOND, "best.ckpt", "last.ckpt"}


def test_a_path_below_a_file(tmp_path: Path) -> None:
    """No folder can be made there: the error names the checkpoint, and the run can do without."""
    Path(tmp_path, "notes").write_text("a file")
    run = tmp_path / "notes" / "run"
    with pytest.raises(
        OSError,
        match=re.escape(
            f"the folder for checkpoints {str(run)!r} cannot be written to"
        ),
    ):
        train(run)
    with warnings_of_the_run() as messages:
        trainer, module = train(run, on_save_error="warn")
    assert same(module, train(None)[1])
    tried = [re.findall(r"epoch=\d-step=\d+\.ckpt", message) for message in messages]
    assert tried == [
        [FIRST],
        [SECOND],
        [THIRD],
        [THIRD],
    ]  # the last one once more, at the end
    with pytest.raises(
        NotADirectoryError, match=re.escape(f"checkpoint {str(run / 'end.ckpt')!r}")
    ):
        trainer.save_checkpoint(run / "end.ckpt")
    trainer = train(run, resume=True, on_save_error="warn")[
        0
    ]  # "last": there is none, so from the start
    assert (trainer.ckpt_path, trainer.global_step) == (None, 4 * EPOCHS)
    assert Path(tmp_path, "notes").read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    """The error names the checkpoint, and what is in the folder can be read."""
    run = tmp_path / "run"
    first_epoch = train(run, 1)[1]
    run.chmod(0o555)
    try:
        with pytest.raises(
            OSError,
            match=re.escape(
                f"the folder for checkpoints {str(run)!r} cannot be written to"
            ),
        ):
            train(run, resume=True)
        assert same(Scored.load_from_checkpoint(run / "last.ckpt"), first_epoch)
    finally:
        run.chmod(0o755)
    trainer, module = train(run, resume=True)
    assert trainer.ckpt_path == str(run / FIRST)
    assert same(module, train(None)[1])


# -- a process that is killed while it saves ------------------------------------------------------------------------


def kill_before(call: int) -> None:
    """Let this process be killed before its so manyth call that makes, moves, removes or flushes something."""
    made = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            if made == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    for name in ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))


def content(value: int) -> dict[str, Any]:
    return {
        "state_dict": {"w": torch.full((3,), value)},
        "optimizer_states": [{"m": torch.full((3,), value)}],
    }


def values(path: str | Path) -> set[int]:
    """Those of all tensors of a checkpoint: one, if it was written in one go."""
    checkpoint = load_checkpoint(str(path))
    return {
        *checkpoint["state_dict"]["w"].tolist(),
        *checkpoint["optimizer_states"][0]["m"].tolist(),
    }


def test_killed_at_any_moment_of_a_save(tmp_path: Path) -> None:
    """A checkpoint that is being replaced is there, the old or the new; the next save clears up what was left."""
    unfinished, outcomes = set(), set()
    for call in range(1, 100):
        folder = tmp_path / str(call)
        path = str(folder / "a.ckpt")
        save_checkpoint(content(1), path, {"created": 1.0}, None)

        def act(path: str = path, call: int = call) -> None:
            kill_before(call)
            save_checkpoint(content(2), path, {"created": 2.0}, None)

        status = ended(in_a_child(act))
        left = [name for name in names(folder) if name.endswith(".tmp")]
        unfinished |= {(folder / name / "manifest.json").exists() for name in left}
        # What "last" would try: the one checkpoint, at its place or moved aside.
        found = find_checkpoints(str(folder))
        assert len(found) == 1, call
        assert ".tmp" not in found[0]
        assert len(values(path)) == 1
        assert values(found[0]) == values(path)
        outcomes |= values(path)

        save_checkpoint(content(3), str(folder / "b.ckpt"), {"created": 3.0}, None)
        assert not [name for name in names(folder) if name.endswith(".tmp")], call
        assert len(values(path)) == 1
        save_checkpoint(content(4), path, {"created": 4.0}, None)
        assert values(path) == {4}
        save_checkpoint(content(5), str(folder / "b.ckpt"), {"created": 5.0}, None)
        assert names(folder) == {"a.ckpt", "b.ckpt"}
        if status == 0:
            break
        assert status == -signal.SIGKILL
    else:
        pytest.fail("a save takes more calls than were tried")
    assert outcomes == {1, 2}
    assert unfinished == {
        True,
        False,
    }  # among what was left were folders that only lacked their name


@pytest.mark.parametrize(
    "before", [True, False], ids=["a checkpoint before", "none before"]
)
def test_killed_at_any_moment_of_a_save_into_a_folder_of_other_files(
    tmp_path: Path, before: bool
) -> None:
    """The checkpoint there is the old or the new one, whole; the next save clears up, and the others stay."""
    outcomes = set()
    for call in range(1, 100):
        path = tmp_path / str(call) / "run"
        for name in ("args.json", "model/config.json", "state.json"):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text("mine")
        if before:
            save_checkpoint(content(1), str(path), {"created": 1.0}, None)

        def act(path: Path = path, call: int = call) -> None:
            kill_before(call)
            save_checkpoint(content(2), str(path), {"created": 2.0}, None)

        status = ended(in_a_child(act))
        if found := find_checkpoints(str(path)):
            assert found == [str(path)]
            assert len(values(path)) == 1
            outcomes |= values(path)
        else:
            outcomes.add(0)
        save_checkpoint(content(3), str(path), {"created": 3.0}, None)
        assert values(path) == {3}
        left = {
            str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()
        }
        assert len(left) == 3 + 1 + len(read_manifest(str(path))["files"]), (call, left)
        assert (
            (path / "args.json").read_text()
            == (path / "model/config.json").read_text()
            == "mine"
        )
        if status == 0:
            break
        assert status == -signal.SIGKILL
    else:
        pytest.fail("a save takes more calls than were tried")
    assert outcomes == ({1, 2} if before else {0, 2})


def test_killed_at_any_moment_of_a_removal(tmp_path: Path) -> None:
    """The checkpoint is there whole, or it is none; the next save of its name clears up, and a user's file stays."""
    for others in ([], ["notes.txt", "model/config.json"]):
        for call in range(1, 100):
            path = tmp_path / f"{len(others)}-{call}" / "a.ckpt"
            save_checkpoint(content(1), str(path), {"created": 1.0}, None)
            for name in others:
                (path / name).write_text("mine")

            def act(path: Path = path, call: int = call) -> None:
                kill_before(call)
                remove_checkpoint(str(path))

            status = ended(in_a_child(act))
            for found in find_checkpoints(str(path.parent)):
                assert values(found) == {1}
            save_checkpoint(content(2), str(path), {"created": 2.0}, None)
            assert values(path) == {2}
            remove_checkpoint(str(path))
            left = {
                str(file.relative_to(path))
                for file in path.rglob("*")
                if file.is_file()
            }
            assert left == set(others), call
            assert names(path.parent) == ({"a.ckpt"} if others else set())
            if status == 0:
                break
            assert status == -signal.SIGKILL


def test_a_run_goes_on_after_a_kill_in_a_save(tmp_path: Path) -> None:
    """ "last" passes over the unfinished checkpoint, though it was begun later, and the next save removes it."""
    run, whole = tmp_path / "run", train(None)[1]
    train(run, 1)
    trainer = train(tmp_path / "other", 2)[0]

    def act() -> None:
        kill_before(5)
        trainer.save_checkpoint(run / SECOND)

    assert ended(in_a_child(act)) == -signal.SIGKILL
    assert len([name for name in names(run) if name.endswith(".tmp")]) == 1
    resumed, module = train(run, resume=True)
    assert resumed.ckpt_path == str(run / FIRST)
    assert same(module, whole)
    assert names(run) == {FIRST, SECOND, THIRD, "best.ckpt", "last.ckpt"}


def test_the_unfinished_checkpoint_of_a_living_process(tmp_path: Path) -> None:
    """Is left alone while that process lives, and is no checkpoint for "last"; it is removed when it has gone."""
    run = tmp_path / "run"
    first = train(run, 1)[0]
    from_child, to_parent = os.pipe()

    def act() -> None:
        replace = os.replace

        def last_step(source: str, target: str) -> None:
            """Move the manifest, so that the folder has all that a checkpoint has, and never come to its name."""
            replace(source, target)
            os.write(to_parent, b"x")
            signal.pause()

        os.replace = last_step
        first.save_checkpoint(run / "later.ckpt")

    child = in_a_child(act)
    try:
        os.close(to_parent)
        assert os.read(from_child, 1) == b"x"  # nothing, if it ended instead
        [unfinished] = [name for name in names(run) if name.endswith(".tmp")]
        assert is_complete(str(run / unfinished))
        trainer = train(run, 2, resume=True)[0]  # saves in the folder, too
        assert trainer.ckpt_path == str(run / FIRST)
        assert names(run) == {FIRST, SECOND, "best.ckpt", "last.ckpt", unfinished}
        assert is_complete(str(run / unfinished))
    finally:
        os.close(from_child)
        os.kill(child, signal.SIGKILL)
        status = ended(child)
    assert status == -signal.SIGKILL
    trainer, module = train(run, resume=True)
    assert trainer.ckpt_path == str(run / SECOND)
    assert same(module, train(None)[1])
    assert names(run) == {FIRST, SECOND, THIRD, "best.ckpt", "last.ckpt"}


# -- a store --------------------------------------------------------------------------------------------------------


class Store:
    """An S3 server that answers as one should, or not, as told.

    Attributes:
        requests: what was asked of it, as ``PUT /bucket/name?query``; for deletions, with the names.
        failed: those of them that it did not answer.
    """

    def __init__(self, app: Callable[[dict[str, Any], Any], Iterable[bytes]]) -> None:
        self.app = app
        self.url = ""
        self.up()

    def up(self) -> None:
        """Work, from now on."""
        self.requests: list[str] = []
        self.failed: list[str] = []
        self._fails: Callable[[str], bool] = lambda request: False
        self._way = ""

    def fail_at(self, pattern: str, way: str = "500") -> None:
        """Fail each request that begins with ``pattern``.

        ``way`` is a number to answer with; ``"drop"`` to drop the connection, or ``"lost"`` to do so after having done
        as asked.
        """
        self.up()
        self._way = way
        self._fails = lambda request: re.match(pattern, request) is not None

    def go_down_at(
        self, pattern: str, way: str = "500", others: str = "PUT|POST|DELETE"
    ) -> None:
        """Fail the first request that begins with ``pattern``, and all that begin with ``others`` after it."""
        self.up()
        self._way = way
        self._fails = lambda request: (
            re.match(others if self.failed else pattern, request) is not None
        )

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        if environ["QUERY_STRING"]:
            request += f"?{environ['QUERY_STRING']}"
        if request.startswith("POST") and request.endswith("?delete"):
            body = sent(environ)
            environ["wsgi.input"] = io.BytesIO(body)
            request += f" {body.decode()}"
        self.requests.append(request)
        if not self._fails(request):
            return self.app(environ, start_response)
        self.failed.append(request)
        if self._way == "lost":
            list(self.app(environ, lambda *answer: None))
        else:
            sent(environ)  # else the answer is not heard
        if self._way in ("drop", "lost"):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError
        code = {
            "500": "InternalError",
            "503": "ServiceUnavailable",
            "403": "AccessDenied",
        }[self._way]
        start_response(f"{self._way} {code}", [("Content-Type", "application/xml")])
        if request.startswith("HEAD"):
            return []
        return [
            f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>not now</Message></Error>".encode()
        ]


def sent(environ: dict[str, Any]) -> bytes:
    """The body of a request."""
    # The connection stays open behind it: only what is sent in chunks has an end of its own.
    length = (
        -1
        if environ.get("wsgi.input_terminated")
        else int(environ.get("CONTENT_LENGTH") or 0)
    )
    return environ["wsgi.input"].read(length)


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    """The server, and what a user has in the configuration of fsspec to reach it by ``s3://`` alone."""
    s3fs = pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("flask_cors", reason="moto's server needs it")
    requests = logging.getLogger("werkzeug")
    level = requests.level
    requests.setLevel(logging.WARNING)  # else it prints each request
    running = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    store = running._server.app = Store(running._server.app)
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        settings = {
            "endpoint_url": f"http://{host}:{port}",
            "key": "key",
            "secret": "secret",
            "client_kwargs": {"region_name": "us-east-1"},
            "default_block_size": 5
            * 2**20,  # the least that the protocol allows for a part
            "config_kwargs": {
                "retries": {"max_attempts": 0},
                "connect_timeout": 5,
                "read_timeout": 30,
            },
        }
        patch.setitem(conf, "s3", settings)
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        yield store
    s3fs.S3FileSystem.clear_instance_cache()
    running.stop()
    requests.setLevel(level)


@pytest.fixture
def store(server: Store, request: pytest.FixtureRequest) -> Iterator[Store]:
    """The server, with ``url`` in an empty bucket of the test's own."""
    bucket = "bucket-" + re.sub(
        r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_")
    )[-50:].strip("-")
    files().call_s3("create_bucket", Bucket=bucket)
    server.url = f"s3://{bucket}/run"
    yield server
    server.up()
    files().rm(bucket, recursive=True)


def files() -> Any:
    """The server as a file system that remembers no listings."""
    return fsspec.filesystem("s3", use_listings_cache=False)


def keys(url: str) -> set[str]:
    """The names of all objects below ``url``."""
    root = url.removeprefix("s3://") + "/"
    return {key.removeprefix(root) for key in files().find(url)}


def keys_of(
    *checkpoints: str, pointers: Iterable[str] = ("best.ckpt", "last.ckpt")
) -> set[str]:
    return {f"{checkpoint}/{file}" for checkpoint in checkpoints for file in FILES} | {
        *pointers
    }


def test_training_with_a_store(store: Store) -> None:
    """What is there in the end: the two best, the last one, and a pointer to each; all can be loaded."""
    trainer, module = train(store.url, 4, save_top_k=2)
    assert keys(store.url) == keys_of(
        SECOND, THIRD, FOURTH
    )  # the scores are 3, 1, 2, 4
    assert trainer.checkpoint_callback is not None
    assert trainer.checkpoint_callback.best_model_path == f"{store.url}/{SECOND}"
    assert resolve(f"{store.url}/best.ckpt") == f"{store.url}/{SECOND}"
    assert resolve(f"{store.url}/last.ckpt") == f"{store.url}/{FOURTH}"
    assert same(Scored.load_from_checkpoint(f"{store.url}/last.ckpt"), module)
    assert same(
        Scored.load_from_checkpoint(f"{store.url}/best.ckpt"), train(None, 2)[1]
    )


@pytest.mark.parametrize("async_save", [True, False], ids=["background", "waiting"])
def test_resuming_from_a_store(store: Store, async_save: bool) -> None:
    """The run ends with the weights of one that was never stopped, and cleans up after the first part too."""
    first = train(store.url, 2, save_top_k=2, async_save=async_save)[0]
    assert keys(store.url) == keys_of(FIRST, SECOND)
    trainer, module = train(
        store.url, 4, resume=True, save_top_k=2, async_save=async_save
    )
    assert trainer.ckpt_path == f"{store.url}/{SECOND}"
    assert (first.global_step, trainer.global_step) == (8, 16)
    assert same(module, train(None, 4)[1])
    assert keys(store.url) == keys_of(SECOND, THIRD, FOURTH)


def test_resuming_from_a_file_at_a_store(store: Store) -> None:
    """The same with checkpoints in one file: found by their ends, replaced, and cleaned up."""
    train(store.url, 2, save_top_k=2, save_format="file")
    trainer, module = train(store.url, 4, resume=True, save_top_k=2, save_format="file")
    assert trainer.ckpt_path == f"{store.url}/{SECOND}"
    assert same(module, train(None, 4)[1])
    kept = [name for name in keys(store.url) if "step" in name]
    assert sorted(kept) == sorted([SECOND, THIRD, FOURTH])
    assert same(Scored.load_from_checkpoint(f"{store.url}/{FOURTH}"), module)


def large() -> tuple[Trainer, Scored]:
    """A run whose weights take 16 MB, and so more than one part."""
    module, trainer = Scored(width=1_000_000), quiet(max_steps=1)
    trainer.fit(module, loader(1))
    return trainer, module


def unfinished_uploads(url: str) -> list[Any]:
    bucket = url.removeprefix("s3://").partition("/")[0]
    return files().call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])


def test_a_file_in_parts(store: Store) -> None:
    """Comes back as it was."""
    trainer, module = large()
    trainer.save_checkpoint(f"{store.url}/a.ckpt", weights_only=True)
    parts = [
        request
        for request in store.requests
        if re.match(r"PUT .*model\.safetensors\?.*partNumber=", request)
    ]
    assert len(parts) > 1
    assert unfinished_uploads(store.url) == []
    assert same(load_checkpoint(f"{store.url}/a.ckpt")["state_dict"], module)


@pytest.mark.parametrize(
    "where",
    [
        "PUT .*partNumber=1",
        "PUT .*partNumber=2",
        r"POST .*\?uploadId=",
    ],
    ids=["first part", "second part", "completion"],
)
def test_a_part_that_fails(store: Store, where: str) -> None:
    """The checkpoint is none, and no parts are left behind, which would be paid for and which no listing shows."""
    trainer, module = large()
    store.fail_at(where)
    with pytest.raises(
        OSError,
        match=re.escape(f"checkpoint '{store.url}/a.ckpt' could not be written"),
    ):
        trainer.save_checkpoint(f"{store.url}/a.ckpt", weights_only=True)
    assert store.failed
    assert find_checkpoints(store.url) == []
    assert keys(store.url) == set()
    assert unfinished_uploads(store.url) == []
    store.up()
    trainer.save_checkpoint(f"{store.url}/a.ckpt", weights_only=True)
    assert same(load_checkpoint(f"{store.url}/a.ckpt")["state_dict"], module)


# The first file of a checkpoint, one in the middle, and the one that makes it count; and the three ways to fail.
OUTAGES = pytest.mark.parametrize(
    ("file", "way"),
    [
        ("model/model.safetensors", "500"),
        ("state.json", "drop"),
        ("manifest.json", "503"),
    ],
)


def check_goes_on(store: Store, newest: str) -> None:
    """Once the store works again, a new run goes on from the checkpoint ``newest``, and nothing is missing."""
    store.up()
    assert find_checkpoints(store.url)[0] == f"{store.url}/{newest}"
    assert resolve(f"{store.url}/last.ckpt") == f"{store.url}/{newest}"
    trainer, module = train(store.url, 4, resume=True)
    assert trainer.ckpt_path == f"{store.url}/{newest}"
    assert same(module, train(None, 4)[1])
    # What another thread has just written is found here, where the folder was listed before.
    assert find_checkpoints(store.url)[0] == f"{store.url}/{FOURTH}"


@OUTAGES
def test_an_upload_that_fails_ends_the_training(
    store: Store, file: str, way: str
) -> None:
    """With an error that names the checkpoint; the one before is what a new run goes on from."""
    store.go_down_at(f"PUT .*{SECOND}/{file}", way)
    with pytest.raises(
        OSError,
        match=re.escape(f"checkpoint '{store.url}/{SECOND}' could not be written"),
    ):
        train(store.url)
    assert file in store.failed[0]
    left = keys(store.url)
    assert f"{SECOND}/manifest.json" not in left
    assert any(key.startswith(SECOND) for key in left) == (
        file != "model/model.safetensors"
    )
    assert find_checkpoints(store.url) == [f"{store.url}/{FIRST}"]
    first_epoch = train(None, 1)[1]
    assert all(
        same(Scored.load_from_checkpoint(f"{store.url}/{name}"), first_epoch)
        for name in (FIRST, "last.ckpt")
    )
    check_goes_on(store, FIRST)
    assert keys(store.url) == keys_of(FIRST, SECOND, THIRD, FOURTH)


@OUTAGES
def test_training_goes_on_without_the_store(store: Store, file: str, way: str) -> None:
    """It takes no more uploads: each is told, the run ends as ever, and "last" is what is whole."""
    store.go_down_at(f"PUT .*{SECOND}/{file}", way)
    with warnings_of_the_run() as messages:
        trainer, module = train(store.url, on_save_error="warn")
    assert file in store.failed[0]
    assert trainer.global_step == 4 * EPOCHS
    assert same(module, train(None)[1])
    assert len(messages) == 3
    for message, name in zip(
        messages, (SECOND, THIRD, THIRD), strict=True
    ):  # the last one once more, at the end
        assert f"checkpoint '{store.url}/{name}' could not be written" in message
        assert "training goes on" in message
    assert trainer.checkpoint_callback is not None
    assert trainer.checkpoint_callback.best_model_path == f"{store.url}/{FIRST}"
    assert find_checkpoints(store.url) == [f"{store.url}/{FIRST}"]
    check_goes_on(store, FIRST)
    assert keys(store.url) == keys_of(FIRST, SECOND, THIRD, FOURTH)


@OUTAGES
def test_a_short_outage(store: Store, file: str, way: str) -> None:
    """One checkpoint is missing, and the next one is saved and pointed to as if nothing had been."""
    store.fail_at(f"PUT .*{SECOND}/{file}", way)
    with warnings_of_the_run() as messages:
        trainer = train(store.url, on_save_error="warn", save_top_k=2)[0]
    assert len(messages) == 1
    assert f"{store.url}/{SECOND}" in messages[0]
    assert find_checkpoints(store.url) == [
        f"{store.url}/{name}" for name in (THIRD, FIRST)
    ]
    assert trainer.checkpoint_callback is not None
    assert trainer.checkpoint_callback.best_model_path == f"{store.url}/{THIRD}"
    assert resolve(f"{store.url}/best.ckpt") == f"{store.url}/{THIRD}"
    check_goes_on(store, THIRD)


def test_the_last_checkpoint_is_tried_again(store: Store) -> None:
    """Nothing would come after it: where the store works again at the end, it has the rank that it deserves."""

    def when_saving(step: int) -> None:
        if step == 8 and not store.failed:
            store.fail_at(f"PUT .*{SECOND}/state.json")
        elif step == 8:
            store.fail_at("nothing")

    with warnings_of_the_run() as messages:
        trainer, module = train(
            store.url, 2, when_saving=when_saving, on_save_error="warn"
        )
    assert len(messages) == 1
    assert keys(store.url) == keys_of(FIRST, SECOND)
    assert trainer.checkpoint_callback is not None
    assert trainer.checkpoint_callback.best_model_path == f"{store.url}/{SECOND}"
    assert (
        resolve(f"{store.url}/best.ckpt")
        == resolve(f"{store.url}/last.ckpt")
        == f"{store.url}/{SECOND}"
    )
    assert same(Scored.load_from_checkpoint(f"{store.url}/last.ckpt"), module)


@pytest.mark.parametrize("way", ["drop", "503"])
def test_training_goes_on_when_the_store_is_gone(store: Store, way: str) -> None:
    """It answers no question either, such as whether a name is free."""
    store.go_down_at(f"PUT .*{SECOND}/state.json", way, others=".*")
    with warnings_of_the_run() as messages:
        trainer, module = train(store.url, on_save_error="warn")
    assert trainer.global_step == 4 * EPOCHS
    assert same(module, train(None)[1])
    assert [
        re.findall(r"epoch=\d-step=\d+\.ckpt", message)[:1] for message in messages
    ] == [
        [SECOND],
        [THIRD],
        [THIRD],
    ]  # once more at the end
    check_goes_on(store, FIRST)


@pytest.mark.parametrize("way", ["drop", "503", "403"])
def test_last_does_not_start_anew_when_the_store_is_gone(
    store: Store, way: str
) -> None:
    """Not to find a checkpoint is one thing, not to be able to look for one another."""
    train(store.url, 1)
    store.go_down_at(".*", way, others=".*")
    # As each file system tells of it: the first two are what `s3fs` makes of an answer.
    with pytest.raises(
        Exception, match=r"Service Unavailable|Forbidden|Connection was closed"
    ):
        train(store.url, resume=True)
    assert not [
        request for request in store.failed if request.startswith("PUT")
    ]  # it has not even begun
    check_goes_on(store, FIRST)


def test_what_a_failed_upload_has_sent_is_removed(store: Store) -> None:
    """Where the store works again: what is no checkpoint would be paid for, and never be found by a later save."""
    store.fail_at(f"PUT .*{SECOND}/state.json")
    with warnings_of_the_run() as messages:
        train(store.url, on_save_error="warn")
    assert len(messages) == 1
    assert keys(store.url) == keys_of(FIRST, THIRD)


def train_without_a_pointer(
    store: Store, way: str, on_save_error: str, epochs: int, **arguments: Any
) -> list[str]:
    """A run in which ``last.ckpt`` cannot be written after the second checkpoint; what it says of that."""

    def when_saving(step: int) -> None:
        if step == 8:
            store.fail_at(r"PUT .*/last\.ckpt", way)
        elif store.failed:
            store.up()

    arguments = {
        "when_saving": when_saving,
        "on_save_error": on_save_error,
        **arguments,
    }
    if on_save_error == "raise":
        with pytest.raises(
            Exception, match=r"not now|Connection was closed|could not be written"
        ) as caught:
            train(store.url, epochs, **arguments)
        messages = [f"{type(caught.value).__mro__} {caught.value}"]
    else:
        with warnings_of_the_run() as messages:
            train(store.url, epochs, **arguments)
    store.up()
    return messages


@pytest.mark.parametrize("way", ["500", "drop"])
@pytest.mark.parametrize("on_save_error", ["raise", "warn"])
def test_a_pointer_that_fails(store: Store, on_save_error: str, way: str) -> None:
    """The checkpoint is whole and what a new run goes on from; the pointer still names the one before."""
    assert len(train_without_a_pointer(store, way, on_save_error, 2)) == 1
    assert find_checkpoints(store.url) == [
        f"{store.url}/{name}" for name in (SECOND, FIRST)
    ]
    assert resolve(f"{store.url}/last.ckpt") == f"{store.url}/{FIRST}"
    trainer, module = train(store.url, resume=True)
    assert trainer.ckpt_path == f"{store.url}/{SECOND}"
    assert same(module, train(None)[1])
    assert resolve(f"{store.url}/last.ckpt") == f"{store.url}/{THIRD}"


@pytest.mark.parametrize("way", ["500", "drop"])
@pytest.mark.parametrize("on_save_error", ["raise", "warn"])
def test_a_pointer_that_fails_is_named(
    store: Store, on_save_error: str, way: str
) -> None:
    """The error is an OSError, whatever the file system raises, and says which file it was about."""
    [message] = train_without_a_pointer(store, way, on_save_error, 2)
    assert f"{store.url}/last.ckpt" in message or f"{store.url}/{SECOND}" in message
    assert "OSError" in message or on_save_error == "warn"


def test_a_checkpoint_whose_pointer_failed_is_removed_in_its_turn(store: Store) -> None:
    """It is a checkpoint of the run as the others."""
    assert (
        len(
            train_without_a_pointer(
                store, "500", "warn", EPOCHS, monitor=None, save_top_k=1
            )
        )
        == 1
    )
    assert keys(store.url) == keys_of(THIRD, pointers=["last.ckpt"])


@pytest.mark.parametrize("what", ["manifest.json", "state.json"])
def test_a_removal_that_fails(store: Store, what: str) -> None:
    """Of the checkpoint before, when the new one is in place: the run knows the new one as its best and last."""
    store.fail_at(f"POST .*delete.*{FIRST}/{what}", "500")
    with warnings_of_the_run() as messages:
        trainer = train(store.url, 2, monitor=None, save_top_k=1, on_save_error="warn")[
            0
        ]
    assert store.failed
    assert len(messages) == 1
    store.up()
    assert trainer.checkpoint_callback is not None
    best = trainer.checkpoint_callback.best_model_path
    assert best == f"{store.url}/{SECOND}"
    assert is_complete(best)
    assert resolve(f"{store.url}/last.ckpt") == best


# -- a checkpoint in the place of another ---------------------------------------------------------------------------


def test_replacing_a_checkpoint_at_a_store(store: Store) -> None:
    """Only the new one's files are left, however often."""
    url = f"{store.url}/same.ckpt"
    for epochs in (1, 2, 3):
        trainer, module = train(None, epochs)
        trainer.save_checkpoint(url)
        assert same(Scored.load_from_checkpoint(url), module)
        assert len(keys(url)) == len(FILES)
        # All but the manifest are in one folder, if it is not the first.
        assert len({key.split("/")[0] for key in keys(url)}) == (
            6 if epochs == 1 else 2
        )
    assert find_checkpoints(store.url) == [url]
    assert train(store.url, resume=True)[0].ckpt_path == url
    trainer.save_checkpoint(url, weights_only=True)  # has fewer files
    assert len(keys(url)) == 4
    assert same(Scored.load_from_checkpoint(url), module)


def test_a_replaced_checkpoint_is_not_called_damaged(store: Store) -> None:
    """Nothing is wrong with it."""
    trainer = train(None, 1)[0]
    for _ in range(2):
        trainer.save_checkpoint(f"{store.url}/same.ckpt")
    with warnings_of_the_run() as messages:
        train(store.url, resume=True)
    assert messages == []


@pytest.mark.parametrize(
    "replaced",
    [
        pytest.param(0, id="new"),
        pytest.param(1, id="first"),
        pytest.param(2, id="replaced before"),
    ],
)
def test_a_save_whose_last_answer_is_lost(store: Store, replaced: int) -> None:
    """The manifest is at the store, though the save cannot know: the checkpoint is whole, the old one or the new."""
    url = f"{store.url}/same.ckpt"
    old, new = train(None, 1), train(None, 2)
    for _ in range(replaced):
        old[0].save_checkpoint(url)
    store.fail_at("PUT .*same.ckpt/manifest.json", "lost")
    with pytest.raises(
        OSError, match=re.escape(f"checkpoint '{url}' could not be written")
    ):
        new[0].save_checkpoint(url)
    assert store.failed
    store.up()
    found = find_checkpoints(store.url)
    assert found == [url] or not replaced
    for path in found:
        module = Scored.load_from_checkpoint(path)
        assert same(module, new[1]) or (same(module, old[1]) and replaced)
    new[0].save_checkpoint(url)
    assert same(Scored.load_from_checkpoint(url), new[1])
    assert len(keys(url)) == len(FILES)


def test_a_save_where_an_upload_has_broken_off(store: Store) -> None:
    """What that has left, when it could not even be removed, is no part of the next checkpoint of the name."""
    url = f"{store.url}/same.ckpt"
    trainer, module = train(None, 1)
    store.go_down_at("PUT .*same.ckpt/manifest.json")
    with pytest.raises(
        OSError, match=re.escape(f"checkpoint '{url}' could not be written")
    ):
        trainer.save_checkpoint(url)
    store.up()
    assert len(keys(url)) == len(FILES) - 1
    trainer.save_checkpoint(url, weights_only=True)  # has fewer files
    assert keys(url) == {
        "manifest.json",
        "model/model.safetensors",
        "state.json",
        "state.safetensors",
    }
    assert same(Scored.load_from_checkpoint(url), module)


@OUTAGES
@pytest.mark.parametrize("replaced", [1, 2], ids=["first", "replaced before"])
def test_a_replacement_that_fails(
    store: Store, file: str, way: str, replaced: int
) -> None:
    """The old checkpoint is there as if nothing had been, and gives way to the next that succeeds."""
    url = f"{store.url}/same.ckpt"
    old, new = train(None, 1), train(None, 2)
    for _ in range(replaced):
        old[0].save_checkpoint(url)
    before = keys(url)
    store.go_down_at(f"PUT .*same.ckpt/(......../)?{file}", way)
    with pytest.raises(
        OSError, match=re.escape(f"checkpoint '{url}' could not be written")
    ):
        new[0].save_checkpoint(url)
    assert file in store.failed[0]
    store.up()
    assert before <= keys(url)
    assert is_complete(url)
    assert find_checkpoints(store.url) == [url]
    assert same(Scored.load_from_checkpoint(url), old[1])
    new[0].save_checkpoint(url)
    assert same(Scored.load_from_checkpoint(url), new[1])
    assert len(keys(url)) == len(FILES)


@pytest.mark.parametrize("way", ["drop", "503"])
def test_a_replacement_when_the_store_is_gone(store: Store, way: str) -> None:
    """Not to hear whether there is a checkpoint does not mean that there is none."""
    url = f"{store.url}/same.ckpt"
    old, new = train(None, 1), train(None, 2)
    old[0].save_checkpoint(url)
    store.go_down_at(
        ".*", way, others="GET|HEAD"
    )  # of all requests, those that write would work
    with pytest.raises(
        OSError, match=re.escape(f"checkpoint '{url}' could not be written")
    ):
        new[0].save_checkpoint(url)
    store.up()
    assert same(Scored.load_from_checkpoint(url), old[1])


def test_a_replacement_that_cannot_remove_the_old_one(store: Store) -> None:
    """The new one counts from its manifest on; the next save removes what is left of both."""
    url = f"{store.url}/same.ckpt"
    old, new = train(None, 1), train(None, 2)
    old[0].save_checkpoint(url)
    store.fail_at(r"POST .*\?delete.*state\.json")
    with pytest.raises(OSError, match=re.escape(url)):
        new[0].save_checkpoint(url)
    assert store.failed
    store.up()
    assert is_complete(url)
    assert same(Scored.load_from_checkpoint(url), new[1])
    new[0].save_checkpoint(url)
    assert same(Scored.load_from_checkpoint(url), new[1])
    assert len(keys(url)) == len(FILES)
