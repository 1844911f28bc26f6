"""``python -m sparsedsl plan``: what attention over many devices would cost, without the devices."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsedsl.errors import ArgumentError
from sparsedsl.specs import load_pattern, load_tables
from sparsedsl.working import count, print_json, working, written

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
examples:
  python -m sparsedsl plan sparsedsl.patterns:causal --q-len 1M --world 8,64
  python -m sparsedsl plan my_patterns.py:local --q-len 16M --world 1024 --rate 400 --bandwidth 25 --out plan.png
  python -m sparsedsl plan my_patterns.py:packed --q-len 1M --world 64 --table doc=doc.pt --json

A ring, an all-gather and Ulysses are shown at their best (docs/parallel.md says what is assumed)."""

SIZES = {"K": 1 << 10, "M": 1 << 20}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of ``plan`` beside SPEC and ``--table``."""
    command.add_argument("--q-len", type=_tokens, required=True, metavar="N", help="tokens: 1048576, 1M (of 1,048,576) or 64K")
    command.add_argument(
        "--world",
        type=_worlds,
        required=True,
        metavar="N[,N..]",
        help="ranks; one number: it, a quarter of it, and so on down to 4",
    )
    command.add_argument("--heads", type=count, metavar="N", help="query heads (default: those of the pattern, else 32)")
    command.add_argument("--kv-heads", type=count, metavar="N", help="key heads (default 8)")
    command.add_argument("--head-dim", type=count, default=128, metavar="N", help="width of a head (default 128)")
    command.add_argument("--itemsize", type=count, default=2, metavar="N", help="bytes of a number (default 2)")
    command.add_argument("--rate", type=float, default=300, metavar="TFLOPS", help="TFLOP/s that a rank computes (default 300)")
    command.add_argument("--bandwidth", type=float, default=50, metavar="GB", help="GB/s that a rank receives (default 50)")
    command.add_argument(
        "--chunk", type=_tokens, metavar="N", help="tokens that stay together (default: 16 chunks a rank or more)"
    )
    command.add_argument("--granule", type=_tokens, default=128, metavar="N", help="keys that are sent together (default 128)")
    command.add_argument("--json", action="store_true", help="print the report as JSON (docs/reports.md has its keys)")
    command.add_argument("--out", type=Path, metavar="PATH", help="picture to write: .png, .svg, .pdf")


def _tokens(text: str) -> int:
    """``64K``, ``16M``, ``1000``."""
    return count(text[:-1]) * SIZES[text[-1]] if text[-1:] in SIZES else count(text)


def _worlds(text: str) -> list[int]:
    """Several as they are given, of one the smaller ones too."""
    found = [count(part) for part in text.split(",")]
    while "," not in text and found[0] >= 16:
        found.insert(0, found[0] // 4)
    return found


def run(arguments: argparse.Namespace) -> int:
    """The command; the exit code."""
    import sparsedsl as sd

    pattern = load_pattern(arguments.spec)
    for option in ("rate", "bandwidth"):
        if not 0 < getattr(arguments, option) < float("inf"):
            raise ArgumentError(f"--{option} must be a positive number; got {getattr(arguments, option)}")
    words = {name: getattr(arguments, name) for name in ("heads", "kv_heads", "head_dim", "itemsize", "chunk", "granule")}
    with working("planning"):
        found = sd.parallel.simulate(
            pattern, arguments.q_len, arguments.world, flops=arguments.rate * 1e12, bandwidth=arguments.bandwidth * 1e9,
            **words, **load_tables(pattern, arguments.table),
        )  # fmt: skip
        if arguments.out is not None:
            written(arguments.out, found.plot().savefig)
    if arguments.json:
        print_json(found.to_dict())
        return 0
    print(found)
    if arguments.out is not None:
        print(f"\n{arguments.out}")
    return 0
