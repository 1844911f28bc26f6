"""The environment switches, read when asked for and never at import; and the log of stage times that one of them turns on.

======================  =================================  ================================================================
switch                  values                             meaning
======================  =================================  ================================================================
SPARSEDSL_CACHE         a folder                           where generated files are kept; safe to delete at any time;
                                                           default ~/.cache/sparsedsl
SPARSEDSL_DEBUG         0 (default), 1                     log the time each stage takes to the logger "sparsedsl"
SPARSEDSL_MEMORY_BYTES  a whole number                     how much memory results kept between calls may take: tile lists,
                                                           schedules, tiles of masks; default 268435456 (256 MiB); 0: keep none
SPARSEDSL_TUNE          cached (default), off, full        what is measured on this machine: see below
======================  =================================  ================================================================

``SPARSEDSL_MEMORY_BYTES`` is one bound for the process, all devices together, and is looked at whenever something new is to be kept.

``SPARSEDSL_TUNE=cached`` uses what is remembered in the cache folder and measures once what is missing; ``off`` takes built-in numbers,
and nothing is measured, read or written, so that the same call makes the same choices everywhere; ``full`` measures the processor anew
in this process, once, and remembers the result. Of generated kernels ``cached`` measures none: it takes what is remembered, else what
a cost model expects; ``full`` measures what is not remembered, at the first call that needs it (up to a minute a kernel).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sparsedsl.errors import SettingsError

__all__ = ["Settings", "memory_bytes", "settings", "stage", "tune_mode"]

logger = logging.getLogger("sparsedsl")

Value = TypeVar("Value")

MEMORY_BYTES = 1 << 28
# No file can be made below it, whoever tries: where the cache lies if the user has no home folder.
_NOWHERE = Path(os.devnull)


@dataclass(frozen=True)
class Settings:
    """The environment switches, validated."""

    cache: Path
    debug: bool
    memory_bytes: int
    tune: str


def settings() -> Settings:
    """Read the environment switches; :class:`~sparsedsl.errors.SettingsError` if one has a value it cannot have.

    >>> import os
    >>> os.environ["SPARSEDSL_DEBUG"] = "yes"
    >>> settings()
    Traceback (most recent call last):
        ...
    sparsedsl.errors.SettingsError: SPARSEDSL_DEBUG='yes' is not valid; valid values: 0, 1 (or leave it unset)
    >>> del os.environ["SPARSEDSL_DEBUG"]
    >>> settings().debug
    False
    """
    debug = _choice("SPARSEDSL_DEBUG", {"0": False, "1": True})
    return Settings(cache=_folder("SPARSEDSL_CACHE"), debug=debug, memory_bytes=memory_bytes(), tune=tune_mode())


def memory_bytes() -> int:
    """``SPARSEDSL_MEMORY_BYTES`` alone: how many bytes of results are kept between calls at most.

    >>> import os
    >>> os.environ["SPARSEDSL_MEMORY_BYTES"] = "1GB"
    >>> memory_bytes()
    Traceback (most recent call last):
        ...
    sparsedsl.errors.SettingsError: SPARSEDSL_MEMORY_BYTES='1GB' is not valid; valid values: a number of bytes (or leave it unset)
    >>> del os.environ["SPARSEDSL_MEMORY_BYTES"]
    >>> memory_bytes()
    268435456
    """
    given = os.environ.get("SPARSEDSL_MEMORY_BYTES", "")
    if not given:
        return MEMORY_BYTES
    if not (given.isascii() and given.isdigit()):
        raise SettingsError(f"SPARSEDSL_MEMORY_BYTES={given!r} is not valid; valid values: a number of bytes (or leave it unset)")
    return int(given)


def tune_mode() -> str:
    """``SPARSEDSL_TUNE`` alone, for what is asked in every call: ``"cached"``, ``"off"`` or ``"full"``.

    >>> import os
    >>> os.environ["SPARSEDSL_TUNE"] = "off"
    >>> tune_mode()
    'off'
    >>> del os.environ["SPARSEDSL_TUNE"]
    >>> tune_mode()
    'cached'
    """
    return _choice("SPARSEDSL_TUNE", {"cached": "cached", "off": "off", "full": "full"})


def _choice(name: str, values: dict[str, Value]) -> Value:
    """The meaning of a switch; the first of ``values`` is the default."""
    given = os.environ.get(name, "")
    if not given:
        return next(iter(values.values()))
    if given not in values:
        raise SettingsError(f"{name}={given!r} is not valid; valid values: {', '.join(values)} (or leave it unset)")
    return values[given]


def _folder(name: str) -> Path:
    """A folder that exists or can be made later; it is not made here."""
    given = os.environ.get(name, "")
    if not given:
        return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "sparsedsl"
    # os.path, since Path raises where there is no home folder, or where it may not look
    path = Path(os.path.expanduser(given))
    if not path.is_absolute() or (os.path.exists(path) and not os.path.isdir(path)):
        raise SettingsError(
            f"{name}={given!r} is not valid; valid values: the absolute path of a folder, which need not exist yet "
            "(or leave it unset)"
        )
    return path


def _home() -> Path:
    """The user's home folder; a user of a container may have none, and what cannot be kept is then made anew each time."""
    try:
        return Path.home()
    except RuntimeError:
        return _NOWHERE


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Log how long the body takes, if ``SPARSEDSL_DEBUG=1``; otherwise do nothing.

    >>> with stage("analyse"):
    ...     pass
    """
    if not settings().debug:
        yield
        return
    _show_debug_log()
    start = time.perf_counter()
    try:
        yield
    finally:
        logger.debug("%s: %.3f ms", name, (time.perf_counter() - start) * 1e3)


def _show_debug_log() -> None:
    """Make the log visible for those who have not set up logging themselves."""
    logger.setLevel(logging.DEBUG)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
