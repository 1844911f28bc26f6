"""C++ text -> a loaded library, built once for a machine and kept in the cache folder.

A library is named by a hash of its text, the flags, the compiler, the processor and torch. It is built by a thread
(:mod:`backends.cpp.background`), written beside its place and renamed; processes that want the same one wait for the first to build it.
A library is loaded only from a folder and a file that belong to the user, or to root, and that nobody else may write: whoever could
write there could run code as the user.
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
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import torch

from sparsedsl.backends.cpp.background import Build, compiler_says, finished_at_exit, run_compiler
from sparsedsl.errors import UnsupportedError
from sparsedsl.settings import settings

__all__ = ["FLAGS", "compiler", "is_built", "library", "no_compiler", "start"]

log = logging.getLogger("sparsedsl")

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
# A build that takes longer is told of.
SLOW_SECONDS = 1.0
_LINES = 8  # of what a compiler says

# Files of a process that is no more are removed when they are as old as this.
LEFT_SECONDS = 600.0

# Text, flags and compiler.
_Wanted = tuple[str, tuple[str, ...], str | None]

_loaded: dict[_Wanted, ctypes.CDLL | UnsupportedError] = {}
# Those that nobody has loaded yet.
_builds: dict[_Wanted, Build] = {}
_lock = threading.Lock()
_locked: set[int] = set()


def _after_fork() -> None:
    """The thread that held the lock does not exist in the child, and a copy of a file that is locked would keep it locked."""
    global _lock
    _lock = threading.Lock()
    for descriptor in _locked:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _locked.clear()


os.register_at_fork(after_in_child=_after_fork)


def library(text: str, *flags: str) -> ctypes.CDLL:
    """The library that the C++ ``text`` makes, waited for; a dictionary lookup from the second time on.

    Raises:
        UnsupportedError: there is no compiler, or it fails; with its first lines. The same error again in the same process.
    """
    wanted = text, flags, compiler()
    found = _loaded.get(wanted)
    if found is None:
        try:
            found = _load(_started(wanted).result())
        except UnsupportedError as error:
            found = error
        finally:
            _builds.pop(wanted, None)
        _loaded[wanted] = found
    if isinstance(found, UnsupportedError):
        raise UnsupportedError(str(found))
    return found


def start(text: str, *flags: str) -> Build | None:
    """Begin to build a library, for :func:`library` to load; None if this process has loaded it.

    Raises:
        UnsupportedError: there is no compiler.
    """
    wanted = text, flags, compiler()
    return None if wanted in _loaded else _started(wanted)


def is_built(text: str, *flags: str) -> bool | None:
    """Whether a library is there, or is known to fail; False while it is being built, None: nobody has begun. Begins nothing."""
    path = compiler()
    wanted = text, flags, path
    if wanted in _loaded:
        return True
    build = _builds.get(wanted)
    if build is not None and build.is_begun:
        return build.done
    return True if path is not None and _usable(_place(path, _folder(), text, flags)) else None


def _started(wanted: _Wanted) -> Build:
    text, flags, path = wanted
    with _lock:
        build = _builds.get(wanted)
        if build is None:
            build = _builds[wanted] = Build(partial(_built, _known(path), _folder(), text, flags))
    build.begin()
    return build


def compiler() -> str | None:
    """The C++ compiler: the one that ``CXX`` names, else g++, clang++ or c++; None if there is none."""
    return _found(os.environ.get("CXX", "").strip(), os.environ.get("PATH", ""))


def no_compiler() -> str:
    """Why :func:`compiler` found none."""
    given = os.environ.get("CXX", "").strip()
    what = f"CXX={given!r} names none" if given else "neither g++ nor clang++ nor c++ is installed"
    return f"generated C++ needs a compiler, and {what}"


@lru_cache(maxsize=8)
def _found(given: str, path: str) -> str | None:
    names = [given] if given else ["g++", "clang++", "c++"]
    return next((found for name in names if (found := shutil.which(name, path=path or None))), None)


def _surroundings(path: str) -> tuple[str, ...]:
    """What a binary depends on beside its text."""
    return (*compiler_version(path), *processor(), torch.__version__)


@lru_cache(maxsize=8)
def compiler_version(path: str) -> tuple[str, str]:
    """Where a compiler is, and the first line of what it says of itself; "" where it says nothing."""
    return path, compiler_says([path, "--version"], 30.0).split("\n")[0]


@lru_cache(maxsize=1)
def processor() -> tuple[str, ...]:
    """What the processor is and can do: code made for one may not run on another."""
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    found: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() in wanted:
                found.setdefault(name.strip(), value.strip())
    return (os.uname().machine, *(f"{name}={value}" for name, value in sorted(found.items())))


def _known(path: str | None) -> str:
    if path is None:
        raise UnsupportedError(no_compiler())
    return path


def _folder() -> Path:
    """Where libraries lie: in the cache, or where this process alone looks."""
    folder = settings().cache / "cpp"
    try:
        _made(folder)
    except OSError as error:
        log.warning(
            "%s cannot be written (%s): C++ is built for this process only; set SPARSEDSL_CACHE to another folder", folder, error
        )
        return _own_folder()
    why = _unsafe(folder)
    if why is not None:
        log.warning("%s is not used for C++ libraries: %s. They are built for this process only", folder, why)
        return _own_folder()
    return folder


def _place(path: str, folder: Path, text: str, flags: tuple[str, ...]) -> Path:
    key = hashlib.sha256("\n".join([text, *FLAGS, *flags, *_surroundings(path)]).encode()).hexdigest()[:32]
    return folder / f"{key}.so"


def _built(path: str, folder: Path, text: str, flags: tuple[str, ...]) -> Path:
    place = _place(path, folder, text, flags)
    key = place.stem
    if not _usable(place):
        try:
            with _alone(folder / f"{key}.lock"):
                if not _usable(place):
                    with finished_at_exit():
                        _compile(path, folder, key, text, flags)
        except OSError as error:
            raise UnsupportedError(f"C++ cannot be built in {folder}: {error}") from error
    return place


def _load(place: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(place))
    except OSError as error:
        with contextlib.suppress(OSError):  # of an older system, perhaps: built anew next time
            place.unlink()
        raise UnsupportedError(f"the library that {compiler()} made cannot be loaded: {error}") from error


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
    _locked.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was forked meanwhile may hold a copy
        _locked.discard(descriptor)
        os.close(descriptor)


@lru_cache(maxsize=8)
def _tell(path: str) -> None:
    """Say once a process why it takes so long."""
    log.warning("compiling C++ with %s, once for this machine ..", path)


@lru_cache(maxsize=8)
def _swept(folder: Path) -> None:
    """Remove what a process left that was killed while it built; looked for once."""
    for left in folder.glob(".tmp-*"):
        with contextlib.suppress(OSError, ValueError):
            if time.time() - left.stat().st_mtime > LEFT_SECONDS and not _lives(int(left.name.split("-")[1])):
                left.unlink()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _compile(path: str, folder: Path, key: str, text: str, flags: tuple[str, ...]) -> None:
    """Put the library in its place, and its text beside it."""
    mark = f".tmp-{os.getpid()}-{secrets.token_hex(8)}"
    source, made = folder / f"{mark}.cpp", folder / f"{mark}.so"
    begin = time.perf_counter()
    teller = threading.Timer(SLOW_SECONDS, _tell, [path])
    teller.daemon = True
    teller.start()
    try:
        _swept(folder)
        descriptor = os.open(source, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            file.write(text)
        command = [path, *FLAGS, *flags, "-o", str(made), str(source)]
        status, said = run_compiler(command, folder)
        if status != 0 or not made.exists():
            said = "\n".join((said or f"exit status {status}").strip().split("\n")[:_LINES])
            raise UnsupportedError(f"{path} cannot compile the generated C++:\n{said}")
        made.chmod(0o700)
        os.replace(source, folder / f"{key}.cpp")
        os.replace(made, folder / f"{key}.so")
    finally:
        teller.cancel()
        for left in (source, made):
            with contextlib.suppress(OSError):
                left.unlink()
    log.debug("compiled %d lines of C++: %.1f ms", text.count("\n"), (time.perf_counter() - begin) * 1e3)
