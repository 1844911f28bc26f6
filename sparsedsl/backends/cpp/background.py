"""Builds by threads of their own, as many compilers at once as there are cores: whoever wants a result waits for it, or does not.

A thread does not live on in a forked child: there a build that was under way begins anew when somebody waits for it, and finds what the
parent has made meanwhile. No process forks while another is being started: a child that got the ends of its pipes would keep the parent,
which reads to their end, waiting for as long as it lives. A process that ends stops its compilers, and waits for the moment in which
their files are removed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sparsedsl.errors import UnsupportedError

__all__ = ["Build", "compiler_says", "finished_at_exit", "run_compiler"]

# That a compiler gets to stop when it is asked to, in seconds.
STOP_SECONDS = 1.0


class Build:
    """One thing that is made in the background. ``done``: it is made, or has failed."""

    def __init__(self, make: Callable[[], Path]) -> None:
        self.done = False
        self._make = make
        self._begun = False
        self._end = threading.Event()
        self._made: Path | BaseException | None = None

    def begin(self) -> None:
        """Begin, if nobody has."""
        with _lock:
            if self._begun:
                return
            _under_way.add(self)
            self._begun = True
        threading.Thread(target=self._run, name="sparsedsl C++", daemon=True).start()

    @property
    def is_begun(self) -> bool:
        """Whether somebody has begun."""
        return self._begun

    def wait(self, seconds: float | None) -> bool:
        """Whether it is done after so many seconds; None: after as many as it takes."""
        self.begin()
        return self.done or self._end.wait(seconds)

    def result(self) -> Path:
        """What was made, waited for; or the error."""
        self.wait(None)
        if isinstance(self._made, BaseException):
            raise self._made
        assert self._made is not None
        return self._made

    def _run(self) -> None:
        try:
            self._made = self._make()
        except BaseException as error:  # raised where the result is asked for
            self._made = error
        self.done = True
        with _lock:
            _under_way.discard(self)
        self._end.set()

    def _begin_anew(self) -> None:
        if not self.done:
            self._begun = False
        self._end = threading.Event()
        if self.done:
            self._end.set()


@contextlib.contextmanager
def finished_at_exit() -> Iterator[None]:
    """A process that ends waits, for a moment, for what is done within: files are removed there."""
    thread = threading.current_thread()
    with _lock:
        if _ending:
            raise UnsupportedError("this process is ending")
        _busy.add(thread)
    try:
        yield
    finally:
        with _lock:
            _busy.discard(thread)


def run_compiler(command: list[str], folder: Path) -> tuple[int, str]:
    """The exit status of a compiler, and what it said."""
    with _cores:
        process = _started(command, folder)
        try:
            said, complaints = process.communicate()
        finally:
            with _lock:
                _compilers.discard(process)
    return process.returncode, complaints or said


def compiler_says(command: list[str], seconds: float) -> str:
    """What a compiler prints of itself; "" where it says nothing."""
    try:
        process = _started(command, None)
        try:
            return process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return ""
        finally:
            with _lock:
                _compilers.discard(process)
    except (OSError, UnsupportedError):
        return ""


def _started(command: list[str], folder: Path | None) -> subprocess.Popen[str]:
    with _lock:
        if _ending:
            raise UnsupportedError("this process is ending")
        # Its helpers stop with it: a signal to its group reaches them.
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        _compilers.add(process)
    return process


_lock = threading.Lock()
_under_way: set[Build] = set()
_busy: set[threading.Thread] = set()
_compilers: set[subprocess.Popen[str]] = set()
_ending = False


def _as_many_as_cores() -> threading.BoundedSemaphore:
    return threading.BoundedSemaphore(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


_cores = _as_many_as_cores()


def _before_fork() -> None:
    _lock.acquire()


def _after_fork_in_parent() -> None:
    _lock.release()


def _after_fork() -> None:
    global _lock, _cores
    _lock, _cores = threading.Lock(), _as_many_as_cores()
    for build in _under_way:
        build._begin_anew()
    _under_way.clear()
    _busy.clear()
    _compilers.clear()  # they are the parent's


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork)


@atexit.register
def _stop() -> None:
    global _ending
    with _lock:
        _ending = True
        threads = list(_busy)
    for sent in (signal.SIGTERM, signal.SIGKILL):
        for process in list(_compilers):
            with contextlib.suppress(OSError):
                os.killpg(process.pid, sent)
        end = time.monotonic() + STOP_SECONDS
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
