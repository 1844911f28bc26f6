"""``python -m sparsedsl check --kernel file.py:name``: the test kit on a kernel of one's own, from a shell."""

from __future__ import annotations

import argparse
import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

from sparsedsl.errors import PatternError, SparseDSLError
from sparsedsl.specs import CannotLoad, load_object, load_pattern, load_tables

__all__ = ["add_arguments", "faults_are_no_verdict", "refuse_without_kernel", "run"]

_ONLY = ("implements", "lse", "grad", "tiles", "poison", "deep", "quick", "only")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of ``check`` that are about kernels."""
    group = command.add_argument_group("a kernel of your own")
    group.add_argument("--kernel", metavar="SPEC", help="a function fn(q, k, v, ...), or what sd.testing.Kernel made of one")
    group.add_argument("--implements", metavar="SPEC", help="the pattern or program that it implements, if it is a function")
    group.add_argument("--lse", action="store_true", default=None, help="it gives (out, lse)")
    group.add_argument("--grad", choices=("none", "qkv", "all"), help="what gradients reach (default none)")
    group.add_argument(
        "--tiles", type=_tiles, metavar="QxK", help="queries and keys that it takes at once, so that edges are tried"
    )
    group.add_argument("--poison", action="store_true", default=None, help="rows bear NaN in keys that they do not see")
    group.add_argument("--quick", action="store_true", default=None, help="25 cases, 20 seconds")
    group.add_argument("--deep", action="store_true", default=None, help="1,000 cases, up to an hour")
    group.add_argument(
        "--only", action="append", metavar="NAME", help="one property (NUM, GRAD, ..); may be given more than once"
    )


def _tiles(text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if len(parts) not in (2, 3) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not QxK or QxKxD, such as 64x32")
    return tuple(map(int, parts))


def refuse_without_kernel(arguments: argparse.Namespace) -> None:
    """Options of kernels, where none is given."""
    for name in _ONLY:
        if getattr(arguments, name) is not None:
            raise PatternError(f"--{name} is about a kernel of your own: give it by --kernel file.py:name")


@contextlib.contextmanager
def faults_are_no_verdict() -> Iterator[None]:
    """A check that ends by an error nobody raised on purpose has found no property that fails: it is told, and the exit code is 2."""
    try:
        yield
    except (SparseDSLError, CannotLoad, OSError):
        raise
    except Exception as error:
        traceback.print_exc()
        raise CannotLoad(f"the check could not be run to its end: {type(error).__name__}: {error}") from error


def run(arguments: argparse.Namespace) -> int:
    """Test a kernel; 0 if it is right, 1 if a property fails, 2 if it could not be run."""
    from sparsedsl.testing.kernels.kernel_check import check_kernel

    kernel = _kernel(arguments)
    if arguments.causal is not None:
        raise PatternError("--causal is about patterns; a kernel is held to what it implements")
    budget = "deep" if arguments.deep else "quick" if arguments.quick else "default"
    with faults_are_no_verdict():
        report = check_kernel(
            kernel, examples=arguments.examples, seed=arguments.seed, progress=True, budget=budget, only=arguments.only
        )
    print(report.to_json() if arguments.json else report)
    return report.exit_code


def _kernel(arguments: argparse.Namespace) -> Any:
    import sparsedsl as sd

    if arguments.kernel is None:
        raise PatternError("check wants a SPEC of a pattern, or --kernel file.py:name and --implements file.py:pattern")
    if arguments.spec is not None:
        raise PatternError(f"check tests a pattern or a kernel: leave out {arguments.spec}, or say --implements {arguments.spec}")
    if arguments.deep and arguments.quick:
        raise PatternError("--quick and --deep: give one of them")
    found = load_object(arguments.kernel)
    claims = {
        name: getattr(arguments, name) for name in ("lse", "grad", "tiles", "poison") if getattr(arguments, name) is not None
    }
    if isinstance(found, sd.testing.Kernel):
        if claims or arguments.implements or arguments.table:
            given = ", ".join(f"--{name}" for name in (*claims, *(["implements"] if arguments.implements else ())))
            raise PatternError(
                f"{arguments.kernel} is a Kernel, which says itself what it claims: leave out {given or '--table'}"
            )
        return found
    if not callable(found):
        raise CannotLoad(
            f"{arguments.kernel} is a {type(found).__name__}; wanted a function on q, k and v, or a sd.testing.Kernel"
        )
    if not arguments.implements:
        raise PatternError(f"--kernel {arguments.kernel} is a function: say by --implements file.py:pattern what it computes")
    pattern: Any = load_pattern(arguments.implements)
    tables = load_tables(pattern, arguments.table, all_of_them=False)
    if tables and isinstance(pattern, sd.Program):
        raise PatternError("--table: inputs and tables of a program are drawn; bind what is fixed to it")
    return sd.testing.Kernel(found, implements=pattern.bind(**tables) if tables else pattern, **claims)
