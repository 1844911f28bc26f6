"""The command line: ``python -m sparsedsl explain | plot | check | build | tune SPEC``.

Exit codes: 0; 1 if ``check`` found a property that does not hold; 2 for anything that could not be done (one message, no
traceback; ``SPARSEDSL_DEBUG=1`` shows the traceback).
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sparsedsl import kernel_command, tune_command
from sparsedsl.errors import PatternError, SparseDSLError
from sparsedsl.lang.advice import meant
from sparsedsl.settings import settings
from sparsedsl.specs import CannotLoad, load_pattern, load_tables

__all__ = ["main"]

SPEC_HELP = """\
SPEC is module:name or file.py:name. The name may be a Mask, a Score, a Pattern, a program (not for build and tune), what
sd.compile made of one, a FlexAttention mask_mod or score_mod (which is traced), or a function without arguments that
returns one of these. Tables that are not bound to it are given as --table name=file: a tensor saved with torch.save (.pt)
or numpy.save (.npy), or a list written out (--table 'doc=[0,0,1,1]')."""

EXAMPLES = {
    "explain": """\
examples:
  python -m sparsedsl explain sparsedsl.patterns:causal --q-len 4096
  python -m sparsedsl explain sparsedsl.patterns:moba --q-len 32768 --heads 16
  python -m sparsedsl explain my_patterns.py:packed --q-len 32768 --heads 16 --kv-heads 4 --table doc=doc.pt
  python -m sparsedsl explain my_patterns.py:local --q-len 1 --kv-len 8192 --q-offset 8191 --dtype bfloat16""",
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
    "build": """\
examples:
  python -m sparsedsl build sparsedsl.patterns:causal --target sm_90 --head-dim 128
  python -m sparsedsl build my_patterns.py:packed --target gfx942 --dtype float16 --out kernels/packed
  python -m sparsedsl build my_patterns.py:local --source
  python -m sparsedsl build my_patterns.py:local --target cpu

Needs Triton, and no GPU; tables need no values. Compiles the forward, backward and decode kernels and prints what each
takes of an SM; --out also writes the binaries.""",
    "tune": tune_command.EXAMPLES,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = _parser().parse_args(argv)
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
    commands = parser.add_subparsers(required=True, metavar="command")
    for run, summary in (
        (_explain, "what a pattern costs, whether it is causal, and how it would run"),
        (_plot, "draw a pattern: allowed pairs and tile classes"),
        (_check, "test a pattern with random shapes, tables and inputs"),
        (_build, "compile the GPU kernels of a pattern, without a GPU, and report what they take; or its C++ for this CPU"),
        (_tune, "measure which tiles suit a pattern on this GPU; show, export and import what was measured"),
    ):
        name = run.__name__.strip("_")
        command = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.\n\n{SPEC_HELP}", epilog=EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        command.set_defaults(run=run)
        command.add_argument(
            "spec", metavar="SPEC", nargs="?" if run in (_tune, _check) else None, help="module:name or file.py:name"
        )
        if run is _build:
            _add_build(command)
            continue
        command.add_argument(
            "--table", action="append", default=[], metavar="NAME=FILE", help="values of a table; may be given more than once"
        )
        if run is _tune:
            tune_command.add_arguments(command)
            continue
        if run is _check:
            command.add_argument(
                "--examples", type=_count, metavar="N", help="random cases a property (default 50; of a kernel 100)"
            )
            command.add_argument(
                "--causal", action=argparse.BooleanOptionalAction, default=None,
                help="fail if any query sees a later position (default: as the pattern declares)",
            )  # fmt: skip
            command.add_argument("--json", action="store_true", help="print the report as JSON")
            command.add_argument("--seed", type=int, metavar="N", help="draw the same cases each time")
            kernel_command.add_arguments(command)
        else:
            _add_shape(command, costs=run is _explain)
        if run is _plot:
            command.add_argument("--out", type=Path, metavar="PATH", help="picture to write: .png, .svg, .pdf (default NAME.png)")
        else:
            command.add_argument(
                "--backend", default="auto" if run is _explain else "reference", help="reference, tiled, flex or auto"
            )
    return parser


def _add_shape(command: argparse.ArgumentParser, *, costs: bool) -> None:
    command.add_argument("--q-len", type=_count, required=True, metavar="N", help="number of queries")
    command.add_argument("--kv-len", type=_count, metavar="N", help="number of keys (default: up to the last query)")
    command.add_argument("--q-offset", type=int, default=0, metavar="N", help="position of the first query (default 0)")
    command.add_argument("--block-size", type=_block, metavar="N", help="tokens in a tile, or QxKV such as 64x128")
    if not costs:
        command.add_argument("--head", type=int, default=0, metavar="N", help="head to draw, if the pattern reads h (default 0)")
        command.add_argument("--batch", type=int, default=0, metavar="N", help="batch entry to draw, if it reads b (default 0)")
        return
    command.add_argument("--batch", type=_count, default=1, metavar="N", help="batch size (default 1)")
    command.add_argument("--heads", type=_count, default=1, metavar="N", help="query heads (default 1)")
    command.add_argument("--kv-heads", type=_count, metavar="N", help="key heads (default: as many as query heads)")
    command.add_argument("--head-dim", type=_count, default=64, metavar="N", help="width of a head (default 64)")
    command.add_argument("--dtype", default="float32", help="float32, bfloat16, float16 or float64 (default float32)")
    command.add_argument("--device", default="cpu", help="where it would run: cpu or cuda (default cpu)")


def _add_build(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--target", default="sm_90",
        help="a GPU by name (A100, 'RTX 4090', MI300X) or architecture (sm_80, gfx942), or cpu: C++ for this machine (default sm_90)",
    )  # fmt: skip
    command.add_argument("--dtype", default="bfloat16", help="float16, bfloat16 or float32 (default bfloat16)")
    command.add_argument("--head-dim", type=_count, default=64, metavar="N", help="width of a head (default 64)")
    command.add_argument("--head-dim-v", type=_count, metavar="N", help="width of values (default: as --head-dim)")
    command.add_argument("--group", type=_count, default=1, metavar="N", help="query heads a key head (default 1)")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="write binaries, assembly, source and report.json there")
    command.add_argument("--remarks", action="store_true", help="also what NVIDIA's assembler says about speed")
    command.add_argument("--source", action="store_true", help="print the generated source before the report")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _block(text: str) -> tuple[int, int]:
    sizes = [_count(part) for part in text.split("x")]
    if len(sizes) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is neither one size nor QxKV")
    return sizes[0], sizes[-1]


# ---- commands ----------------------------------------------------------------------------------------------


def _explain(arguments: argparse.Namespace) -> int:
    import sparsedsl as sd

    pattern = load_pattern(arguments.spec)
    words = {"q_offset": arguments.q_offset, "batch": arguments.batch, "heads": arguments.heads, "head_dim": arguments.head_dim}
    words |= {"dtype": arguments.dtype, **load_tables(pattern, arguments.table)}
    kv_len = arguments.kv_len or arguments.q_offset + arguments.q_len
    with _working("analysing"):
        attn = sd.compile(pattern, backend=arguments.backend)
        found = str(attn.explain(arguments.q_len, kv_len, kv_heads=arguments.kv_heads, device=arguments.device, **words))
        if arguments.block_size and isinstance(pattern, sd.Program):
            raise PatternError("--block-size: the tiles of a program follow from its choices at the call; leave it out")
        if arguments.block_size:
            tiles = "x".join(map(str, arguments.block_size))
            analysis = sd.analyse(pattern, arguments.q_len, kv_len, arguments.block_size, **words)
            found += f"\n\nwith tiles of {tiles} tokens:\n{analysis}"
    print(found)
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    import sparsedsl as sd

    pattern = load_pattern(arguments.spec)
    out = arguments.out or Path(arguments.spec.rpartition(":")[2].replace(".", "_") + ".png")
    words = {"block_size": arguments.block_size, "head": arguments.head, "batch": arguments.batch, "q_offset": arguments.q_offset}
    with _working("drawing"):
        figure = sd.plot(pattern, arguments.q_len, arguments.kv_len, **words, **load_tables(pattern, arguments.table))
        try:
            figure.savefig(out)
        except ValueError as error:  # a format matplotlib does not know
            raise SparseDSLError(f"cannot write {out}: {error}") from None
    print(out)
    return 0


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


def _build(arguments: argparse.Namespace) -> int:
    import sparsedsl as sd

    pattern = _static(arguments.spec, "build", "its kernels, in codegen/kernels, are compiled at the first call")
    if arguments.target == "cpu":
        return _build_for_cpu(arguments, pattern)
    names = ("target", "dtype", "head_dim", "head_dim_v", "group", "remarks")
    with _working("compiling"):
        built = sd.build(pattern, **{name: getattr(arguments, name) for name in names})
    if arguments.source:
        print(built.source)
    print(built)
    if arguments.out:
        print(built.save(arguments.out))
    return 0


def _build_for_cpu(arguments: argparse.Namespace, pattern: Any) -> int:
    from sparsedsl.backends.cpp.libraries import build_ahead
    from sparsedsl.codegen.to_cpp import cpp_source

    if arguments.out or arguments.remarks:
        raise PatternError(
            "--target cpu: libraries lie in the cache folder, for this machine alone; leave out --out and --remarks"
        )
    dtype = "float32" if arguments.dtype == "bfloat16" else arguments.dtype
    with _working("compiling"):
        done = build_ahead(pattern, dtype)
    if arguments.source:
        print(cpp_source(pattern).text)
    print(done)
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    instead = "sd.compile(program, backend='triton') takes the sizes that suit the call"
    arguments.pattern = _static(arguments.spec, "tune", instead) if arguments.spec else None
    arguments.tables = load_tables(arguments.pattern, arguments.table) if arguments.spec else {}
    return tune_command.run(arguments)


def _static(spec: str, command: str, instead: str) -> Any:
    """The pattern of a SPEC, which must be no program."""
    import sparsedsl as sd

    pattern = load_pattern(spec)
    if isinstance(pattern, sd.Program):
        raise PatternError(
            f"{command} takes patterns that are known before a call; {spec} is a program, which chooses. Instead: {instead}"
        )
    return pattern


@contextlib.contextmanager
def _working(what: str) -> Iterator[None]:
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
