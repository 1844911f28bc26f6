"""What every command needs: to show that it still runs, to read sizes, to print a report for people or for programs."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["count", "print_json", "working"]


def count(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def print_json(data: dict[str, Any]) -> None:
    """One report on stdout."""
    print(json.dumps(data, indent=2, allow_nan=False))


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
