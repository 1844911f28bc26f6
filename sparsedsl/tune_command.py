"""``python -m sparsedsl tune``: measure the kernels of one pattern on the GPU at hand, or look at, carry and delete what was measured.

Without a GPU, ``--target`` names one: then the cost model and the compiler choose, nothing is measured or remembered.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsedsl.errors import ShapeError, TableError, UnsupportedError
from sparsedsl.plain_values import plain
from sparsedsl.quantities import bytes_text, factor_text, seconds_text
from sparsedsl.working import count, print_json, written

if TYPE_CHECKING:
    from sparsedsl.gpu.autotune import Chosen, Tuned

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
examples:
  python -m sparsedsl tune sparsedsl.patterns:causal --q-len 8192 --heads 16 --kv-heads 4 --head-dim 128 --backward
  python -m sparsedsl tune my_patterns.py:packed --q-len 32768 --heads 16 --table doc=doc.pt --budget 30
  python -m sparsedsl tune my_patterns.py:local --q-len 8192 --target sm_90
  python -m sparsedsl tune --list
  python -m sparsedsl tune --export h100.json
  python -m sparsedsl tune --import h100.json

SPARSEDSL_TUNE=cached (the default) uses what was measured; full measures in a program's own calls whatever is missing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command; SPEC, which may be left out, and ``--table`` are its caller's."""
    parser.add_argument("--q-len", type=count, metavar="N", help="number of queries")
    parser.add_argument("--kv-len", type=count, metavar="N", help="number of keys (default: as many as queries)")
    parser.add_argument("--batch", type=count, default=1, metavar="N", help="batch size (default 1)")
    parser.add_argument("--heads", type=count, default=16, metavar="N", help="query heads (default 16)")
    parser.add_argument("--kv-heads", type=count, metavar="N", help="key heads (default: as many as query heads)")
    parser.add_argument("--head-dim", type=count, default=64, metavar="N", help="width of a head (default 64)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("float16", "bfloat16", "float32"), help="of q, k and v (default bfloat16)"
    )
    parser.add_argument("--backward", action="store_true", help="the kernels of the backward pass too")
    parser.add_argument("--budget", type=_seconds, default=60.0, metavar="SECONDS", help="most time a kernel (default 60)")
    parser.add_argument("--again", action="store_true", help="measure also what is remembered")
    parser.add_argument("--target", metavar="NAME", help="choose for this GPU without one: as for build, such as H100 or sm_90")
    parser.add_argument("--list", action="store_true", help="show what is remembered")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write what is remembered to a file")
    parser.add_argument("--import", type=Path, metavar="FILE", dest="import_", help="take over what an exported file holds")
    parser.add_argument("--replace", action="store_true", help="with --import: also where ours is newer")
    parser.add_argument("--clear", action="store_true", help="delete what is remembered of kernels")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON (docs/reports.md has its keys)")


def run(arguments: argparse.Namespace) -> int:
    """The command; the exit code. ``arguments.pattern`` (None without a SPEC) and ``arguments.tables`` are set by the caller.

    Raises:
        UnsupportedError: there is no CUDA device and no ``--target``; or the target or size is none that the kernels have.
        ShapeError: a pattern, but no ``--q-len``; or heads that are no multiple of key heads.
    """
    from sparsedsl.gpu import tuning_records

    done: dict[str, Any] = {}
    said: list[str] = []
    if arguments.clear:
        done["deleted"] = tuning_records.clear()
        said.append(f"{done['deleted']:,} records deleted")
    if arguments.import_ is not None:
        taken = tuning_records.import_(arguments.import_, replace=arguments.replace)
        done["imported"] = plain(taken)
        said.append(f"{arguments.import_}: {taken}")
    if arguments.pattern is not None:
        _check(arguments)
        text, done["tuned"] = (_without_device if arguments.target else _on_device)(arguments)
        said.append(text)
    if arguments.list:
        found = tuning_records.records()
        done["records"] = [{"key": key, **plain(record)} for key, record in found]
        said.append(_listed(found))
    if arguments.export is not None:
        done["exported"] = written(arguments.export, tuning_records.export)
        said.append(f"{done['exported']:,} records written to {arguments.export}")
    if not done:
        raise ShapeError("nothing to do: name a pattern (SPEC --q-len N), or one of --list, --export, --import, --clear")
    if arguments.json:
        print_json({"report": "Tune", **done})
    else:
        print("\n".join(said))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.q_len is None:
        raise ShapeError("--q-len is missing: how many queries the calls have that are to be fast, as in --q-len 8192")
    arguments.kv_len = arguments.kv_len or arguments.q_len
    arguments.kv_heads = arguments.kv_heads or arguments.heads
    if arguments.heads % arguments.kv_heads:
        raise ShapeError(f"--heads must be a multiple of --kv-heads; got {arguments.heads} and {arguments.kv_heads}")
    if arguments.kv_len < arguments.q_len:
        raise ShapeError(f"--kv-len must be at least --q-len; got {arguments.kv_len} and {arguments.q_len}")


# ---- on a device --------------------------------------------------------------------------------------------


Done = tuple[str, dict[str, Any]]
"""What was done, for people and as plain data."""


def _on_device(arguments: argparse.Namespace) -> Done:
    import torch

    from sparsedsl.execute.compiling import compile
    from sparsedsl.gpu.autotune import Session, session

    if not torch.cuda.is_available():
        raise UnsupportedError(
            "there is no CUDA device to measure on: pass --target H100 (or another GPU, by name) for the choice of the cost model, "
            "or measure on a machine that has one, and carry the results over with --export FILE and --import FILE"
        )
    q, k, v = _tensors(arguments, torch)
    tables = {name: table.to("cuda") for name, table in arguments.tables.items()}
    attn = compile(arguments.pattern, backend="triton")
    lines: list[str] = []
    kernels: list[dict[str, Any]] = []

    def note(kernel: str, chosen: Chosen, tuned: Tuned | None) -> None:
        lines.append(_line(kernel, chosen, tuned))
        kernels.append({"kernel": kernel, **plain(chosen), "tuned": plain(tuned)})

    with _bar() as show, session(
        Session(budget_s=arguments.budget, again=arguments.again, progress=show, chosen=note)
    ):  # fmt: skip
        out = attn(q, k, v, q_offset=arguments.kv_len - arguments.q_len, **tables)
        if arguments.backward:
            out.backward(torch.randn_like(out))
        torch.cuda.synchronize()
    device = torch.cuda.get_device_name()
    text = "\n".join([f"{device}, {_sizes(arguments)}", *(lines or ["no kernel had a choice"])])
    return text, {"device": device, "measured": True, "call": _call(arguments), "kernels": kernels}


def _tensors(arguments: argparse.Namespace, torch: Any) -> Iterator[Any]:
    dtype = getattr(torch, arguments.dtype)
    for heads, length in ((arguments.heads, arguments.q_len), *[(arguments.kv_heads, arguments.kv_len)] * 2):
        yield torch.randn(
            arguments.batch, heads, length, arguments.head_dim, device="cuda", dtype=dtype, requires_grad=arguments.backward
        )


def _line(kernel: str, chosen: Chosen, tuned: Tuned | None) -> str:
    words = [f"{kernel}: {chosen.config}", chosen.source]
    if chosen.seconds is not None:
        words.append(seconds_text(chosen.seconds))
    if tuned is not None:
        usable = [trial for trial in tuned.trials if trial.seconds is not None]
        default = tuned.trials[0].seconds
        if default is not None and chosen.seconds is not None:
            words.append(f"{factor_text(default / chosen.seconds)} as fast as the default")
        words.append(f"{len(usable)} of {len(tuned.trials)} candidates measured in {seconds_text(tuned.took_s)}")
    return ", ".join(words)


@contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on the terminal, one a kernel; none where nobody watches."""
    from tqdm import tqdm

    bars: list[Any] = []

    def show(done: int, total: int, text: str) -> None:
        if not bars or done <= bars[-1].n:
            if bars:
                bars[-1].close()
            bars.append(tqdm(total=total, leave=False, file=sys.stderr, disable=None))
        bars[-1].set_postfix_str(text.splitlines()[0][:60] if text else "", refresh=False)
        bars[-1].update(done - bars[-1].n)

    try:
        yield show
    finally:
        if bars:
            bars[-1].close()


# ---- without one --------------------------------------------------------------------------------------------


def _without_device(arguments: argparse.Namespace) -> Done:
    import functools

    from sparsedsl.analysis.domain import Domain
    from sparsedsl.analysis.tiles import classify
    from sparsedsl.codegen.to_triton import triton_source, variant_of
    from sparsedsl.gpu.configs import Shape
    from sparsedsl.gpu.costs import TileCounts, listed_tiles, work_of
    from sparsedsl.gpu.expected import expected_config
    from sparsedsl.gpu.targets import target_named

    target, pattern = target_named(arguments.target), arguments.pattern
    missing = sorted(set(pattern.tables) - set(arguments.tables) - set(pattern.bound))
    if missing:
        raise TableError(f"the tiles depend on tables: pass values, as in --table {missing[0]}={missing[0]}.pt")
    domain = Domain(
        arguments.q_len, arguments.kv_len, arguments.kv_len - arguments.q_len, arguments.batch, arguments.heads,
        {**pattern.bound, **arguments.tables},
    )  # fmt: skip
    shape = Shape(arguments.dtype, arguments.head_dim, arguments.head_dim, arguments.heads // arguments.kv_heads)
    source = triton_source(pattern, variant_of(pattern, head_dim=arguments.head_dim))
    lists = functools.cache(lambda block: classify(pattern.mask.expr, domain, block))
    names = ("forward", "delta", "grad_q", "grad_kv") if arguments.backward else ("forward",)
    lines = [f"{target.name} ({target.device}), not at hand: nothing is measured or remembered. {_sizes(arguments)}"]
    kernels = []
    with _bar() as show:
        for done, name in enumerate(names):
            show(done, len(names), name)

            def tiles_at(block: tuple[int, int], by_key: bool = name == "grad_kv") -> TileCounts:
                return listed_tiles(lists(block), batch=arguments.batch, heads=arguments.heads, by_key=by_key)

            found = expected_config(source, source.kernel(name), shape, target, work_of(lists((128, 128))), tiles_at)
            needs = found.resources
            kernels.append(plain(found))
            lines.append(
                f"{name}: {found.config}, expected {seconds_text(found.seconds)} ({found.source}); {needs.registers} registers, "
                f"{bytes_text(needs.spills)} spilled, {bytes_text(needs.shared_bytes)} shared"
            )
            lines += [f"  refused {config}: {reason}" for config, reason in found.refused]
    return "\n".join(lines), {"device": target.device, "measured": False, "call": _call(arguments), "kernels": kernels}


# ---- words --------------------------------------------------------------------------------------------------


def _call(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("dtype", "batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim")
    return {name: getattr(arguments, name) for name in names}


def _sizes(arguments: argparse.Namespace) -> str:
    return (
        f"{arguments.dtype}, batch {arguments.batch}, heads {arguments.heads}/{arguments.kv_heads}, {arguments.q_len:,} queries, "
        f"{arguments.kv_len:,} keys, head_dim {arguments.head_dim}"
    )


def _listed(records: list[tuple[dict[str, Any], Any]]) -> str:
    lines = []
    for key, record in sorted(records, key=lambda one: (one[0].get("device", ""), one[0].get("kernel", ""), one[1].measured)):
        shape = key["shape"]
        lines.append(
            f"{key['device']}: {key['kernel']} of {key['pattern'][:12]}, {shape['dtype']}, head_dim {shape['head_dim']}, group "
            f"{shape['group']}, {key['density']}: {record.config}, {seconds_text(record.seconds)}, measured {record.measured[:10]}"
        )
    return "\n".join(lines) or "nothing is remembered"


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value
