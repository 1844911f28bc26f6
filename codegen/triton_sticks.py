"""Breaking sticks, as Triton source: tiles of keys from the last to the first, and what is left to each.

Of what the keys after it have left, a key takes the sigmoid of its logit. What is left is carried from tile to tile as a logarithm, in
units of log2; within a tile it is a product with a triangle of ones. The backward pass needs, of each query and tile of keys, what later
tiles left and what earlier ones came to: the first is written by a kernel of its own, ``left``, the second by ``grad_q`` on its way from
the first tile to the last. ``grad_kv`` reads both. Kernels that share these numbers have tiles of equally many keys.
"""

from __future__ import annotations

from collections.abc import Callable

from sparsedsl.codegen.triton_loops import Loop
from sparsedsl.codegen.triton_writer import Writer

__all__ = [
    "add_scratch",
    "begin_down",
    "breaks_and_gradients",
    "down",
    "load_scratch",
    "store_scratch",
    "up",
    "write_break",
    "write_passed",
    "write_triangle",
]

# Tiles between two looks at whether anything is left: within so many, loads are pipelined.
TILES_AT_ONCE = 8


def begin_down(writer: Writer) -> None:
    """What a walk from the last key to the first begins with."""
    writer.source.line("# The logarithm of what is left to each query, in units of log2.")
    writer.source.line("left = tl.zeros([BLOCK_M], tl.float32)")


def write_triangle(writer: Writer, places: str, *, later: bool, turned: bool = False) -> None:
    """Ones of the pairs of keys of a tile: ``after``, whose product sums over later keys, or ``ahead``, over earlier ones."""
    other, own = (f"{places}[None, :]", f"{places}[:, None]") if turned else (f"{places}[:, None]", f"{places}[None, :]")
    name, sign = ("after", ">") if later else ("ahead", "<")
    writer.source.line(f"{name} = ({other} {sign} {own}).to(tl.float32)")


def down(writer: Writer, loop: Loop, split: bool, step: Callable[[], None]) -> None:
    """The tiles of a program, or of its share of the keys, from the last to the first, until nothing is left to any query."""
    source = writer.source
    source.line("# From the last tile to the first, until no query has anything left that a float could hold.")
    if split:
        source.line("lowest = every_tiles * share // splits")
        source.line("below = every_tiles * (share + 1) // splits")
    else:
        source.line("below = every_tiles")
    lowest = "lowest" if split else "0"
    alive = "tl.max(tl.where(left < NOTHING, 0, 1), 0) > 0"
    with source.block(f"while (below > {lowest}) & ({alive}):"):
        source.line(f"stop = tl.maximum(below - {TILES_AT_ONCE}, {lowest})")
        with source.block("for i in range(stop, below):"):
            source.line("n = below - 1 - (i - stop)")
            loop.tile(source, "every", "n")
            step()
        source.line("below = stop")


def up(writer: Writer, loop: Loop, step: Callable[[], None]) -> None:
    """All tiles of a program from the first of which something is left to a query, to the last."""
    source = writer.source
    source.line("# Tiles that have nothing left to take come first, if there are any.")
    source.line("below = tl.cast(0, tl.int32)")
    source.line("alive = tl.cast(0, tl.int32)")
    with source.block("while (below < every_tiles) & (alive == 0):"):
        loop.tile(source, "every", "below")
        load_scratch(writer, "left", "row", "inside")
        source.line("alive = tl.max(tl.where(left < NOTHING, 0, 1), 0)")
        source.line("below += 1 - alive")
    with source.block("for i in range(below, every_tiles):"):
        loop.tile(source, "every", "i")
        step()


def write_break(writer: Writer, row: str, *, turned: bool = False) -> None:
    """From logits ``x`` to weights ``p`` of the keys of a tile; ``left``: what later tiles left. Masked logits are -inf."""
    source = writer.source
    write_passed(writer)
    factors = "after, passed" if turned else "passed, after"
    source.line(f"later = tl.dot({factors}, input_precision=SUMS)")
    source.line(f"p = tl.exp2(tl.where(z > 0, 0.0, z) - more + (later + left{row}))")


def write_passed(writer: Writer) -> None:
    """From logits ``x`` to ``passed``: of each key the logarithm of what it leaves; masked keys leave all.

    It is bounded: 2**-1000 leaves nothing either, and products with it are exact.
    """
    source = writer.source
    source.line("z = x * LOG2E")
    source.line("power = tl.exp2(-tl.abs(z))")
    source.line("more = _log2_of_one_more(power)")
    source.line("passed = tl.where(z > 0, -z, 0.0) - more")
    source.line("passed = tl.where(passed < -1000.0, -1000.0, passed)")


def breaks_and_gradients(writer: Writer, row: str, products: Callable[[], None], *, turned: bool) -> None:
    """Weights ``p`` and the gradients ``dx`` of logits ``x``: ``g p (1 - s)``, less ``s`` times the sum of ``g p`` over all earlier keys.

    ``earlier``: that sum over earlier tiles; ``products`` writes ``dp``, the gradients ``g`` of the weights.
    """
    source = writer.source
    write_break(writer, row, turned=turned)
    products()
    source.line("# What is masked has no part in it, whatever its product with the gradient is.")
    source.line("given = tl.where(p == 0, 0.0, p * dp)")
    factors = "ahead, given" if turned else "given, ahead"
    source.line(f"before = tl.dot({factors}, input_precision=SUMS) + earlier{row}")
    source.line("large = 1.0 / (1.0 + power)")
    source.line("small = power * large")
    source.line("dx = given * tl.where(z > 0, small, large) - before * tl.where(z > 0, large, small)")


# ---- what the kernels of the backward pass tell each other -----------------------------------------------------------------------------


def add_scratch(writer: Writer) -> None:
    """Arguments: both numbers of each query and tile of keys, ``(heads at work, tiles, rows)``, and the first of these heads."""
    names = ("left",) if writer.name == "left" else ("left", "earlier")
    writer.add(*((f"{name}_ptr", "*fp32") for name in names), ("columns", "i32"), ("first_line", "i32"))


def load_scratch(
    writer: Writer, name: str, row: str, exists: str, *, line: str = "bh - first_line", column: str = "column"
) -> None:
    """``name``: one of both numbers for some queries and a tile of keys; for rows that do not exist nothing is left."""
    other = 'float("-inf")' if name == "left" else "0.0"
    mask = f", mask={exists}, other={other}" if exists else ""
    writer.source.line(f"{name} = tl.load({name}_ptr + {_place(line, column)} + {row}{mask})")


def store_scratch(writer: Writer, name: str) -> None:
    """Write the number of the queries of a program and the present tile."""
    writer.source.line(f"tl.store({name}_ptr + {_place('bh - first_line', 'column')} + row, {name}, mask=inside)")


def _place(line: str, column: str) -> str:
    return f"(tl.cast({line}, tl.int64) * columns + {column}) * rows"
