"""``--backend``: which backends there are, and which of them run here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

__all__ = ["NAMES", "add_backend", "backends_here"]

# As in `backends.registry`, which loads torch; tests compare the two.
NAMES = ("auto", "reference", "tiled", "cpp", "flex", "triton")


def add_backend(command: argparse.ArgumentParser, default: str) -> None:
    """The option of a command."""
    option = command.add_argument(
        "--backend", nargs="?", default=default, action=_Backend, metavar="NAME",
        help=f"{', '.join(NAMES)} (default {default}); without a name: which of them run here, and why the others do not",
    )  # fmt: skip
    option.completer = lambda **_: NAMES  # type: ignore[attr-defined]


class _Backend(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option: str | None = None,
    ) -> None:
        if values is None:
            print(backends_here())
            parser.exit(0)
        setattr(namespace, self.dest, values)


def backends_here() -> str:
    """A line a backend: what it is, and whether it runs on this machine.

    >>> print(backends_here().splitlines()[1])
    reference  runs here (cpu)  dense
    """
    import torch

    from sparsedsl.backends.registry import BACKENDS

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = [("auto", "runs here", "takes the best of those that can run a call; explain says which, and why")]
    for name, backend in BACKENDS.items():
        lacking = {device: backend.lacking(device) for device in devices}
        where = [device for device, why in lacking.items() if why is None]
        runs = f"runs here ({', '.join(where)})" if where else "does not run here"
        reasons = dict.fromkeys(why for why in lacking.values() if why is not None)
        rows.append((name, runs, backend.summary + ("" if where else f". {'; '.join(reasons)}")))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{name:{widths[0]}}  {runs:{widths[1]}}  {what}" for name, runs, what in rows)
