"""``python -m sparsedsl explain``: what a pattern costs, whether it is causal, and how it would run."""

from __future__ import annotations

import argparse

from sparsedsl.errors import PatternError
from sparsedsl.specs import load_pattern, load_tables
from sparsedsl.working import count, print_json, working

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
examples:
  python -m sparsedsl explain sparsedsl.patterns:causal --q-len 4096
  python -m sparsedsl explain sparsedsl.patterns:moba --q-len 32768 --heads 16 --json
  python -m sparsedsl explain my_patterns.py:packed --q-len 32768 --heads 16 --kv-heads 4 --table doc=doc.pt
  python -m sparsedsl explain my_patterns.py:local --q-len 1 --kv-len 8192 --q-offset 8191 --dtype bfloat16"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Those that say what the costs are counted for; lengths are the caller's."""
    command.add_argument("--batch", type=count, default=1, metavar="N", help="batch size (default 1)")
    command.add_argument("--heads", type=count, default=1, metavar="N", help="query heads (default 1)")
    command.add_argument("--kv-heads", type=count, metavar="N", help="key heads (default: as many as query heads)")
    command.add_argument("--head-dim", type=count, default=64, metavar="N", help="width of a head (default 64)")
    command.add_argument("--dtype", default="float32", help="float32, bfloat16, float16 or float64 (default float32)")
    command.add_argument("--device", default="cpu", help="where it would run: cpu or cuda (default cpu)")
    command.add_argument("--json", action="store_true", help="print the report as JSON (docs/reports.md has its keys)")


def run(arguments: argparse.Namespace) -> int:
    """The command; the exit code."""
    import sparsedsl as sd

    pattern = load_pattern(arguments.spec)
    words = {"q_offset": arguments.q_offset, "batch": arguments.batch, "heads": arguments.heads, "head_dim": arguments.head_dim}
    words |= {"dtype": arguments.dtype, **load_tables(pattern, arguments.table)}
    kv_len = arguments.kv_len or arguments.q_offset + arguments.q_len
    if arguments.block_size and isinstance(pattern, sd.Program):
        raise PatternError("--block-size: the tiles of a program follow from its choices at the call; leave it out")
    tiled = None
    with working("analysing"):
        attn = sd.compile(pattern, backend=arguments.backend)
        found = attn.explain(arguments.q_len, kv_len, kv_heads=arguments.kv_heads, device=arguments.device, **words)
        if arguments.block_size:
            tiled = sd.analyse(pattern, arguments.q_len, kv_len, arguments.block_size, **words)
        data = found.to_dict() if arguments.json else {}  # what is proved when it is asked for, too
        text = "" if arguments.json else str(found)
    if arguments.json:
        print_json(data if tiled is None else {**data, "block_size": tiled.to_dict()})
        return 0
    if tiled is not None:
        text += f"\n\nwith tiles of {'x'.join(map(str, arguments.block_size))} tokens:\n{tiled}"
    print(text)
    return 0
