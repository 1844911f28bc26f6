"""What every command needs: to show that it still runs, to read sizes, to print a report for people or for programs, to write a file."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsedsl.errors import SparseDSLError

__all__ = ["count", "print_json", "working", "written"]


def count(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def print_json(data: dict[str, Any]) -> None:
    """One report on stdout."""
    print(json.dumps(data, indent=2, allow_nan=False))


def written(path: Path, write: Callable[[Path], Any]) -> Any:
    """What ``write(path)`` gives, in a folder that is made if it is not there.

    Raises:
        SparseDSLError: it cannot be written, and why; also where ``write`` knows no such format.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return write(path)
    except ValueError as error:
        raise SparseDSLError(f"cannot write {path}: {error}") from None
    except OSError as error:
        why, where = error.strerror or str(error), error.filename
        raise SparseDSLError(f"cannot write {path}: {why}{'' if where in (None, path, str(path)) else f' ({where})'}") from None


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Shows that something runs, and for how long, if it takes more than a second and somebody is watching."""
    from tqdm import tqdm

    done = threading.Event()

    def tick() -> None:
        if done.wait(1) or not sys.stderr.isatty():
            return
        with tqdm(desc=what, bar_format="{desc} ... {elapsed}", leave=False) as bar:
            while not done.wait(0.5):
                bar.update(0)
                bar.refresh()

    watcher = threading.Thread(target=tick, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
