"""The command line: ``python -m sparsedsl explain | plot | view | check | plan | build | tune SPEC``. ``*_command``: the larger ones.

Exit codes: 0; 1 if ``check`` found a property that does not hold; 2 for anything that could not be done (one message, no
traceback; ``SPARSEDSL_DEBUG=1`` shows the traceback).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sparsedsl import __version__, build_command, explain_command, kernel_command, plan_command, tune_command, view_command
from sparsedsl.backend_option import add_backend
from sparsedsl.completion import complete, complete_spec
from sparsedsl.errors import PatternError, SparseDSLError
from sparsedsl.lang.advice import meant
from sparsedsl.settings import settings
from sparsedsl.specs import CannotLoad, load_pattern, load_tables
from sparsedsl.working import count, working, written

__all__ = ["main"]

SPEC_HELP = """\
SPEC is module:name or file.py:name. The name may be a Mask, a Score, a Pattern, a program (not for plan, build and tune), what
sd.compile made of one, a FlexAttention mask_mod or score_mod (which is traced), or a function without arguments that
returns one of these. Tables that are not bound to it are given as --table name=file: a tensor saved with torch.save (.pt)
or numpy.save (.npy), or a list written out (--table 'doc=[0,0,1,1]')."""

EXAMPLES = {
    "explain": explain_command.EXAMPLES,
    "plot": """\
examples:
  python -m sparsedsl plot sparsedsl.patterns:streaming_llm --q-len 256 --out streaming.png
  python -m sparsedsl plot my_patterns.py:packed --q-len 8 --table 'doc=[0,0,0,1,1,2,2,2]' --block-size 2 --out packed.svg""",
    "check": """\
examples:
  python -m sparsedsl check my_patterns.py:mine
  python -m sparsedsl check my_patterns.py:mine --causal --examples 500
  python -m sparsedsl check my_package.masks:prefix_lm --backend flex --examples 10 --seed 0
  python -m sparsedsl check --kernel my_kernels.py:attend --implements my_patterns.py:mine --lse --tiles 64x32
  python -m sparsedsl check --kernel my_kernels.py:kernel --deep --json

Tables that are not given are drawn at random, as their declarations allow. Exit code 1 if a property does not hold; then
a program that shows it is printed; 0 if all hold, 2 if nothing could be run. A pattern that declares
itself causal, sd.attend(..., causal=True), is held to it. With --kernel a kernel of your own is tested, a function or
what sd.testing.Kernel made of it (docs/testing.md), by the same exit codes.""",
    "plan": plan_command.EXAMPLES,
    "build": build_command.EXAMPLES,
    "tune": tune_command.EXAMPLES,
    "view": view_command.EXAMPLES,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow
        complete(parser)
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        debug = settings().debug
    except SparseDSLError as error:
        return _refuse(error)
    try:
        return int(arguments.run(arguments))
    except (SparseDSLError, CannotLoad, OSError) as error:
        if debug:
            raise
        return _refuse(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 2


def _refuse(error: Exception) -> int:
    print(f"sparsedsl: {error}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """A parser, of commands too, that says which option was meant."""

    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        words = re.findall(r"(?:unrecognized arguments: |invalid choice: ')(.*)", message)
        wrong = next((word for word in (words[0] if words else "").split() if word), "").split("=")[0].strip("'")
        known = [name for parser in (self, *self._commands()) for action in parser._actions for name in action.option_strings]
        known += [name for action in self._actions for name in action.choices or ()]
        super().error(message + (meant(wrong, known) if wrong else ""))

    def _commands(self) -> list[argparse.ArgumentParser]:
        found = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return [parser for choices in found for parser in choices.values()]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m sparsedsl", description="Look at, draw and test sparse attention patterns.")
    parser.add_argument("--version", action="version", version=f"sparsedsl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for run, summary in (
        (_explain, "what a pattern costs, whether it is causal, and how it would run"),
        (_plot, "draw a pattern: allowed pairs and tile classes"),
        (_view, "a page on this machine that shows a pattern, with sliders; or one file that needs no server"),
        (_check, "test a pattern with random shapes, tables and inputs"),
        (_plan, "what attention over many devices would cost: balance, bytes and time beside a ring, an all-gather and Ulysses"),
        (_build, "compile the GPU kernels of a pattern, without a GPU, and report what they take; or its C++ for this CPU"),
        (_tune, "measure which tiles suit a pattern on this GPU; show, export and import what was measured"),
    ):
        name = run.__name__.strip("_")
        command = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.\n\n{SPEC_HELP}", epilog=EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        command.set_defaults(run=run)
        spec = command.add_argument(
            "spec", metavar="SPEC", nargs="?" if run in (_tune, _check) else None, help="module:name or file.py:name"
        )
        spec.completer = complete_spec  # type: ignore[attr-defined]
        if run is _build:
            build_command.add_arguments(command)
            continue
        command.add_argument(
            "--table", action="append", default=[], metavar="NAME=FILE", help="values of a table; may be given more than once"
        )
        if run in OWN_OPTIONS:
            OWN_OPTIONS[run].add_arguments(command)
            continue
        if run is _check:
            command.add_argument(
                "--examples", type=count, metavar="N", help="random cases a property (default 50; of a kernel 100)"
            )
            command.add_argument(
                "--causal", action=argparse.BooleanOptionalAction, default=None,
                help="fail if any query sees a later position (default: as the pattern declares)",
            )  # fmt: skip
            command.add_argument("--json", action="store_true", help="print the report as JSON")
            command.add_argument("--seed", type=int, metavar="N", help="draw the same cases each time")
            kernel_command.add_arguments(command)
        else:
            _add_lengths(command)
        if run is _plot:
            command.add_argument(
                "--head", type=_heads, default=0, metavar="N",
                help="head to draw, if the pattern reads h (default 0); 0-7 or 0,3,5: a small picture for each",
            )  # fmt: skip
            command.add_argument(
                "--batch", type=int, default=0, metavar="N", help="batch entry to draw, if it reads b (default 0)"
            )
            command.add_argument("--out", type=Path, metavar="PATH", help="picture to write: .png, .svg, .pdf (default NAME.png)")
        elif run is _explain:
            explain_command.add_arguments(command)
            add_backend(command, "auto")
        else:
            add_backend(command, "reference")
    return parser


def _add_lengths(command: argparse.ArgumentParser) -> None:
    command.add_argument("--q-len", type=count, required=True, metavar="N", help="number of queries")
    command.add_argument("--kv-len", type=count, metavar="N", help="number of keys (default: up to the last query)")
    command.add_argument("--q-offset", type=int, default=0, metavar="N", help="position of the first query (default 0)")
    command.add_argument("--block-size", type=_block, metavar="N", help="tokens in a tile, or QxKV such as 64x128")


def _heads(text: str) -> int | list[int]:
    """One head, or several: ``3``, ``0-7``, ``0,3,5``."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(first) <= int(last))):
            raise argparse.ArgumentTypeError(f"{text!r} is no head: want a number, or several as 0-7 or 0,3,5")
        found += range(int(first), int(last or first) + 1)
    return found[0] if text.isdecimal() else found


def _block(text: str) -> tuple[int, int]:
    sizes = [count(part) for part in text.split("x")]
    if len(sizes) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is neither one size nor QxKV")
    return sizes[0], sizes[-1]


# ---- commands ----------------------------------------------------------------------------------------------


def _explain(arguments: argparse.Namespace) -> int:
    return explain_command.run(arguments)


def _plot(arguments: argparse.Namespace) -> int:
    import sparsedsl as sd

    pattern = load_pattern(arguments.spec)
    out = arguments.out or Path(arguments.spec.rpartition(":")[2].replace(".", "_") + ".png")
    words = {"block_size": arguments.block_size, "head": arguments.head, "batch": arguments.batch, "q_offset": arguments.q_offset}
    with working("drawing"):
        figure = sd.plot(pattern, arguments.q_len, arguments.kv_len, **words, **load_tables(pattern, arguments.table))
        written(out, figure.savefig)
    print(out)
    return 0


def _view(arguments: argparse.Namespace) -> int:
    return view_command.run(arguments)


def _check(arguments: argparse.Namespace) -> int:
    import sparsedsl as sd

    if arguments.kernel is not None or arguments.spec is None:
        return kernel_command.run(arguments)
    kernel_command.refuse_without_kernel(arguments)
    pattern = load_pattern(arguments.spec)
    with kernel_command.faults_are_no_verdict():
        report = sd.testing.check(
            pattern, examples=arguments.examples, progress=True, backend=arguments.backend, causal=arguments.causal,
            seed=arguments.seed, **load_tables(pattern, arguments.table, all_of_them=False),
        )  # fmt: skip
    print(report.to_json() if arguments.json else report)
    return report.exit_code


def _plan(arguments: argparse.Namespace) -> int:
    return plan_command.run(arguments)


def _build(arguments: argparse.Namespace) -> int:
    arguments.pattern = _static(arguments.spec, "build", "its kernels, in codegen/kernels, are compiled at the first call")
    return build_command.run(arguments)


def _tune(arguments: argparse.Namespace) -> int:
    instead = "sd.compile(program, backend='triton') takes the sizes that suit the call"
    arguments.pattern = _static(arguments.spec, "tune", instead) if arguments.spec else None
    arguments.tables = load_tables(arguments.pattern, arguments.table) if arguments.spec else {}
    return tune_command.run(arguments)


# Commands whose options are all their own, but for SPEC and --table.
OWN_OPTIONS = {_tune: tune_command, _view: view_command, _plan: plan_command}


def _static(spec: str, command: str, instead: str) -> Any:
    """The pattern of a SPEC, which must be no program."""
    import sparsedsl as sd

    pattern = load_pattern(spec)
    if isinstance(pattern, sd.Program):
        raise PatternError(
            f"{command} takes patterns that are known before a call; {spec} is a program, which chooses. Instead: {instead}"
        )
    return pattern
