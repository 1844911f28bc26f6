"""The environment switches, read when asked for and never at import; and the log of stage times that one of them turns on.

=================  ========================================  ==========================================================
switch             values                                    meaning
=================  ========================================  ==========================================================
SPARSEDSL_CACHE    a folder; default ~/.cache/sparsedsl      where generated files are kept; safe to delete at any time
SPARSEDSL_DEBUG    0 (default), 1                            log the time each stage takes to the logger "sparsedsl"
=================  ========================================  ==========================================================
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sparsedsl.errors import SettingsError

__all__ = ["Settings", "settings", "stage"]

logger = logging.getLogger("sparsedsl")


@dataclass(frozen=True)
class Settings:
    """The environment switches, validated."""

    cache: Path
    debug: bool


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
    return Settings(cache=_folder("SPARSEDSL_CACHE"), debug=_choice("SPARSEDSL_DEBUG", {"0": False, "1": True}))


def _choice(name: str, values: dict[str, bool]) -> bool:
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
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsedsl"
    path = Path(given).expanduser()
    if not path.is_absolute() or (path.exists() and not path.is_dir()):
        raise SettingsError(
            f"{name}={given!r} is not valid; valid values: the absolute path of a folder, which need not exist yet "
            "(or leave it unset)"
        )
    return path


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
