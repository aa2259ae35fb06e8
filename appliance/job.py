"""A job is a process; its directory is its whole interface.

    <run>/jobs/<id>/lock         held (flock) by the process while it lives
    <run>/jobs/<id>/status.json  replaced atomically, at most every TICK seconds
    <run>/jobs/<id>/log.jsonl    appended, one event a line

Readers need no server: console and command line read these files, and cancel by SIGTERM. A status
that says "running" while the lock is free means that the process died; the kernel, which drops the
lock, is the one that says so, and the reader calls the job *lost*.

Core functions take a `Progress` and call `advance` after every piece of data that they moved: the
one place where a job reports, and where it can be cancelled.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from appliance.errors import ColdspareError, Refused

TICK = 0.2  # seconds between two writes of status.json


class Cancelled(BaseException):
    """The operator asked the job to stop. Not an Exception: nothing swallows it by accident."""


class Progress:
    """What a core function tells about its work. This one tells nobody."""

    def phase(self, name: str, total: int = 0) -> None:
        """A new part of the work begins; `total` is its size in bytes, 0 if unknown."""

    def advance(self, count: int) -> None:
        """`count` more bytes are done. Raises Cancelled when the job was asked to stop."""

    def log(self, message: str, **fields: Any) -> None:
        """Something worth keeping happened."""


@dataclass(frozen=True)
class Status:
    """A job as a reader sees it; `done` and `total` are bytes, `started` is seconds since 1970."""

    job: str
    verb: str
    subject: str = ""  # what it works on: a machine or a point
    state: str = "running"  # running, done, failed, cancelled; *lost* is the reader's verdict
    phase: str = ""
    done: int = 0
    total: int = 0
    pid: int = 0
    started: float = 0.0
    error: str = ""


def run_directory() -> Path:
    """Where jobs live: COLDSPARE_RUN, else /run/coldspare for root, else the user's runtime dir."""
    if chosen := os.environ.get("COLDSPARE_RUN"):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/run/coldspare")
    return Path(os.environ.get("XDG_RUNTIME_DIR", f"/tmp/coldspare-{os.geteuid()}")) / "coldspare"


class Job(Progress):
    """The writer's side: held by the process that does the work."""

    def __init__(self, directory: Path, verb: str, subject: str = "") -> None:
        directory.mkdir(parents=True, mode=0o700)
        self.directory = directory
        self._lock = (directory / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._log = (directory / "log.jsonl").open("a", buffering=1)
        self._status = Status(directory.name, verb, subject, pid=os.getpid(), started=time.time())
        self._due = 0.0
        self._cancelled = False
        self._write()

    def cancel(self) -> None:
        """Ask for a stop; the next `advance` raises Cancelled."""
        self._cancelled = True

    def phase(self, name: str, total: int = 0) -> None:
        self._status = replace(self._status, phase=name, done=0, total=total)
        self.log(name)
        self._write()
        self._check()

    def advance(self, count: int) -> None:
        self._status = replace(self._status, done=self._status.done + count)
        self._check()
        if time.monotonic() >= self._due:
            self._write()

    def log(self, message: str, **fields: Any) -> None:
        self._log.write(json.dumps({"time": time.time(), "message": message, **fields}) + "\n")

    def finish(self, state: str, error: str = "") -> None:
        """The last word: `state` is done, failed or cancelled."""
        self._status = replace(self._status, state=state, error=error)
        self.log(state, **({"error": error} if error else {}))
        self._write()
        self._log.close()
        self._lock.close()

    def _check(self) -> None:
        if self._cancelled:
            raise Cancelled

    def _write(self) -> None:
        self._due = time.monotonic() + TICK
        new = self.directory / "status.json.new"
        new.write_text(json.dumps(asdict(self._status)))
        new.replace(self.directory / "status.json")


@contextmanager
def running(verb: str, subject: str = "", run: Path | None = None) -> Iterator[Job]:
    """Run the block as a job: SIGTERM and SIGINT cancel it, and its end is written down."""
    base = (run or run_directory()) / "jobs"
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    job = Job(base / f"{stamp}-{verb}-{os.getpid()}-{time.monotonic_ns() % 10**6:06d}", verb, subject)

    def on_signal(signum: int, frame: FrameType | None) -> None:
        job.cancel()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield job
    except Cancelled:
        job.finish("cancelled")
        raise
    except Refused as error:
        job.finish("done" if error.exit_code == 3 else "failed", error.message)
        raise
    except ColdspareError as error:
        job.finish("failed", error.message)
        raise
    except BaseException as error:
        job.finish("failed", f"{type(error).__name__}: {error}")
        raise
    else:
        job.finish("done")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read(directory: Path) -> Status:
    """The reader's side: the status, corrected for a process that died without a word.

    Raises FileNotFoundError or ValueError when the directory holds no job.
    """
    status = _load(directory)
    if status.state == "running" and not _alive(directory):
        status = _load(directory)  # it may have finished between the two looks
        if status.state == "running":
            status = replace(status, state="lost", error="the process died")
    return status


def _load(directory: Path) -> Status:
    fields = json.loads((directory / "status.json").read_text())
    return Status(**{key: fields[key] for key in Status.__dataclass_fields__ if key in fields})


def _alive(directory: Path) -> bool:
    with (directory / "lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def list_jobs(run: Path | None = None) -> list[Status]:
    """Every job of the run directory, oldest first."""
    found = []
    for directory in ((run or run_directory()) / "jobs").glob("*"):
        try:
            found.append(read(directory))
        except (OSError, ValueError, TypeError):
            continue  # being born, or not a job
    return sorted(found, key=lambda status: status.started)


def cancel(status: Status) -> None:
    """Ask a running job to stop. Raises ProcessLookupError when it is gone."""
    os.kill(status.pid, signal.SIGTERM)
