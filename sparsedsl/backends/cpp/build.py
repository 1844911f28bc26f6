"""C++ text -> a loaded library, built once for a machine and kept in the cache folder.

A library is named by a hash of its text, the flags, the compiler, the processor and torch. It is written beside its place and renamed;
processes that want the same one wait for the first to build it. A library is loaded only from a folder and a file that belong to the
user, or to root, and that nobody else may write: whoever could write there could run code as the user.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch

from sparsedsl.errors import UnsupportedError
from sparsedsl.settings import settings

__all__ = ["FLAGS", "compiler", "library"]

log = logging.getLogger("sparsedsl")

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
# A build that takes longer is told of.
SLOW_SECONDS = 1.0
_LINES = 8  # of what a compiler says

_loaded: dict[str, ctypes.CDLL | UnsupportedError] = {}
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


# The thread that held the lock does not exist in a forked child.
os.register_at_fork(after_in_child=_renew_lock)


def library(text: str, *flags: str) -> ctypes.CDLL:
    """The library that the C++ ``text`` makes; a dictionary lookup from the second time on.

    Raises:
        UnsupportedError: there is no compiler, or it fails; with its first lines. The same error again in the same process.
    """
    key = hashlib.sha256("\n".join([text, *FLAGS, *flags, *_surroundings()]).encode()).hexdigest()[:32]
    found = _loaded.get(key)
    if found is None:
        with _lock:
            found = _loaded.get(key)
            if found is None:
                try:
                    found = _built(key, text, flags)
                except UnsupportedError as error:
                    found = error
                _loaded[key] = found
    if isinstance(found, UnsupportedError):
        raise UnsupportedError(str(found))
    return found


def compiler() -> str | None:
    """The C++ compiler: the one that ``CXX`` names, else g++, clang++ or c++; None if there is none."""
    return _found(os.environ.get("CXX", "").strip(), os.environ.get("PATH", ""))


@lru_cache(maxsize=8)
def _found(given: str, path: str) -> str | None:
    names = [given] if given else ["g++", "clang++", "c++"]
    return next((found for name in names if (found := shutil.which(name, path=path or None))), None)


def _surroundings() -> tuple[str, ...]:
    """What a binary depends on beside its text."""
    return (*_compiler_version(compiler() or ""), *_processor(), torch.__version__)


@lru_cache(maxsize=8)
def _compiler_version(path: str) -> tuple[str, str]:
    if not path:
        return "", ""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    return path, said.split("\n")[0]


@lru_cache(maxsize=1)
def _processor() -> tuple[str, ...]:
    """What the processor is and can do: code made for one may not run on another."""
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    found: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() in wanted:
                found.setdefault(name.strip(), value.strip())
    return (os.uname().machine, *(f"{name}={value}" for name, value in sorted(found.items())))


def _built(key: str, text: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    path = compiler()
    if path is None:
        given = os.environ.get("CXX", "").strip()
        what = f"CXX={given!r} names none" if given else "neither g++ nor clang++ nor c++ is installed"
        raise UnsupportedError(f"generated C++ needs a compiler, and {what}")
    folder = settings().cache / "cpp"
    try:
        _made(folder)
    except OSError as error:
        log.warning(
            "%s cannot be written (%s): C++ is built for this process only; set SPARSEDSL_CACHE to another folder", folder, error
        )
        folder = _own_folder()
    why = _unsafe(folder)
    if why is not None:
        log.warning("%s is not used for C++ libraries: %s. They are built for this process only", folder, why)
        folder = _own_folder()
    place = folder / f"{key}.so"
    if not _usable(place):
        try:
            with _alone(folder / f"{key}.lock"):
                if not _usable(place):
                    _compile(path, folder, key, text, flags)
        except OSError as error:
            raise UnsupportedError(f"C++ cannot be built in {folder}: {error}") from error
    try:
        return ctypes.CDLL(str(place))
    except OSError as error:
        with contextlib.suppress(OSError):  # of an older system, perhaps: built anew next time
            place.unlink()
        raise UnsupportedError(f"the library that {path} made cannot be loaded: {error}") from error


def _made(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError("no right to write")


_temporary: list[tempfile.TemporaryDirectory[str]] = []


def _own_folder() -> Path:
    """A folder of this process, which goes with it."""
    if not _temporary:
        _temporary.append(tempfile.TemporaryDirectory(prefix="sparsedsl-cpp-"))
    return Path(_temporary[0].name)


def _unsafe(path: Path) -> str | None:
    """Why somebody else may have written what lies there, or None."""
    there = os.stat(path, follow_symlinks=False)
    if there.st_uid not in (os.getuid(), 0):
        return f"{path} belongs to another user (uid {there.st_uid})"
    if stat.S_ISLNK(there.st_mode):
        return f"{path} is a link"
    if there.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write {path} (mode {stat.S_IMODE(there.st_mode):o})"
    return None


def _usable(place: Path) -> bool:
    """Whether the library is there; one that somebody else may have written is removed, or refused."""
    try:
        why = _unsafe(place)
    except FileNotFoundError:
        return False
    if why is None:
        return True
    log.warning("a C++ library is not loaded: %s. It is built anew", why)
    place.unlink()
    return False


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; the system gives the lock back when a process dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@lru_cache(maxsize=8)
def _tell(path: str) -> None:
    """Say once a process why it takes so long."""
    log.warning("compiling C++ with %s, once for this machine ..", path)


def _compile(path: str, folder: Path, key: str, text: str, flags: tuple[str, ...]) -> None:
    """Put the library in its place, and its text beside it."""
    mark = f".tmp-{os.getpid()}-{secrets.token_hex(8)}"
    source, made = folder / f"{mark}.cpp", folder / f"{mark}.so"
    start = time.perf_counter()
    teller = threading.Timer(SLOW_SECONDS, _tell, [path])
    teller.daemon = True
    teller.start()
    try:
        descriptor = os.open(source, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            file.write(text)
        command = [path, *FLAGS, *flags, "-o", str(made), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        if done.returncode != 0 or not made.exists():
            said = "\n".join((done.stderr or done.stdout or f"exit status {done.returncode}").strip().split("\n")[:_LINES])
            raise UnsupportedError(f"{path} cannot compile the generated C++:\n{said}")
        made.chmod(0o700)
        os.replace(source, folder / f"{key}.cpp")
        os.replace(made, folder / f"{key}.so")
    finally:
        teller.cancel()
        for left in (source, made):
            with contextlib.suppress(OSError):
                left.unlink()
    log.debug("compiled %d lines of C++: %.1f ms", text.count("\n"), (time.perf_counter() - start) * 1e3)
