"""From products to logits, weights and their gradients, as Triton source: what depends on a pattern's score."""

from __future__ import annotations

from collections.abc import Callable

import sympy

from sparsedsl.codegen.derivatives import derivative
from sparsedsl.codegen.gradient_axes import LearnedRead, rolled_score
from sparsedsl.codegen.score_ramp import Ramp
from sparsedsl.codegen.triton_expression import each_unit, write_expression, write_expressions
from sparsedsl.codegen.triton_loops import Loop
from sparsedsl.codegen.triton_sticks import breaks_and_gradients
from sparsedsl.codegen.triton_writer import Writer
from sparsedsl.lang.symbols import SCORE

__all__ = [
    "gradients_of",
    "level_of",
    "number_of",
    "predicate",
    "weights_and_gradients",
    "write_factor",
    "write_logits",
    "write_ramp",
]


def write_factor(writer: Writer) -> None:
    """From products to exponents, where that is one factor."""
    if writer.plain:
        writer.source.line("factor = scale * LOG2E")
    elif writer.ramp is not None:
        writer.source.line(f"factor = scale * LOG2E{_gain(writer, writer.ramp)}")


def _gain(writer: Writer, ramp: Ramp) -> str:
    """What a ramp multiplies products by."""
    return "" if ramp.gain == 1 else f" * ({number_of(writer, ramp.gain)})"


def write_ramp(writer: Writer, name: str, places: str, by: sympy.Expr) -> None:
    """``name``: what of the exponent changes along one axis of the tile, whose ``places`` count from its first."""
    writer.source.line(f"{name} = {places}.to(tl.float32) * (LOG2E * ({number_of(writer, by)}))")


def level_of(writer: Writer, q: str, kv: str) -> str:
    """The exponent at a query ``q`` and a key ``kv``, without the product."""
    ramp = writer.ramp
    assert ramp is not None
    by_query, by_key, fixed = (number_of(writer, part) for part in (ramp.by_query, ramp.by_key, ramp.fixed))
    if ramp.by_query + ramp.by_key == 0:  # far from the first position the difference is what is exact
        text = f"({by_key}) * ({kv} - {q}).to(tl.float32)"
    else:
        text = f"({by_key}) * {kv}.to(tl.float32) + ({by_query}) * {q}.to(tl.float32)"
    return f"LOG2E * ({text}{'' if ramp.fixed == 0 else f' + ({fixed})'})"


def number_of(writer: Writer, expr: sympy.Expr) -> str:
    """The text of an expression that reads no position."""
    return write_expression(writer.source, expr, writer.names("queries"), real="tl.float32")


def write_logits(writer: Writer, place: str, condition: str) -> None:
    """From products ``s`` to logits: ``s`` itself where scores are plain, else ``x``; masked pairs are -inf.

    Those of a ramp are in units of log2, and lack what does not change along the second axis of the tile.
    """
    if writer.plain:
        if condition:
            writer.source.line(f's = tl.where({condition}, s, float("-inf"))')
        return
    if writer.ramp is not None:
        writer.source.line(f"x = s * factor + {'(ramp + level)[:, None]' if place == 'turned' else 'ramp[None, :]'}")
        if condition:
            writer.source.line(f'x = tl.where({condition}, x, float("-inf"))')
        return
    expr = rolled_score(writer.pattern)
    if SCORE in expr.free_symbols:
        writer.source.line("score = s * scale")
    text = write_expression(writer.source, expr, writer.names(place), real="tl.float32")
    write_logit(writer, text, condition)


def write_logit(writer: Writer, text: str, condition: str) -> None:
    """``x``: the logits, or weights, that ``text`` gives, a whole tile of them also where it gives one number a row or an integer."""
    expr = writer.pattern.score.expr
    if SCORE not in expr.free_symbols:
        text = f"tl.zeros_like(s) + ({text})"
    writer.source.line(f"x = {text}")
    if condition:
        masked = "0.0" if writer.pointwise else 'float("-inf")'
        writer.source.line(f"x = tl.where({condition}, x, {masked})")


# ---- the backward pass --------------------------------------------------------------------------------

Products = Callable[[], None]


def gradients_of(writer: Writer, loop: Loop, kind: str, place: str, learned: list[LearnedRead], products: Products) -> None:
    """From products ``s``: weights ``p``, gradients ``ds`` of the scaled products and ``d_...`` of learned reads.

    ``products`` writes the products ``dp`` of values and gradients, and what needs the weights alone.
    """
    source = writer.source
    row = "[None, :]" if place == "turned" else "[:, None]"
    condition = loop.condition(source, writer.names(place)) if kind == "partial" else ""
    if writer.breaks and place == "turned":  # keys that do not exist must leave all
        condition = f"({condition}) & inside[:, None]"
    weights_and_gradients(writer, condition, place, row, learned, products)


def weights_and_gradients(
    writer: Writer, condition: str, place: str, row: str, learned: list[LearnedRead], products: Products
) -> None:
    """The same for a condition at hand; ``row``: how a vector over queries is spread over the tile."""
    source, expr = writer.source, rolled_score(writer.pattern)
    if writer.plain:
        write_logits(writer, place, condition)
        source.line(f"p = tl.exp2(s * factor - base{row})")
        products()
        source.line(f"ds = p * (dp - delta{row})")
        return
    if writer.ramp is not None:
        turned = place == "turned"
        source.line(f"level = {level_of(writer, '(q_offset + start)', 'ref') if turned else level_of(writer, 'q_idx', 'start')}")
        write_logits(writer, place, condition)
        source.line(f"p = tl.exp2(x - (base - {'across' if turned else 'level'}){row})")
        products()
        source.line(f"ds = p * (dp - delta{row}){_gain(writer, writer.ramp)}")
        return
    if condition:
        source.line(f"allowed = {condition}")
    slopes = {one.name: derivative(expr, one.read) for one in learned}
    by = {"ds": derivative(expr, SCORE)} | {f"d_{one.name}": slopes[one.name] for one in learned if not one.units}
    if SCORE in sympy.Tuple(expr, *by.values(), *slopes.values()).free_symbols:
        source.line("score = s * scale")
    text, *texts = write_expressions(source, (expr, *by.values()), writer.names(place), real="tl.float32")
    write_logit(writer, text, "allowed" if condition else "")
    if writer.pointwise:
        if place == "turned":  # the gradients of values are made there alone
            source.line("p = x")
        products()
        source.line("dx = tl.where(allowed, dp, 0.0)" if condition else "dx = dp")
    elif writer.breaks:
        breaks_and_gradients(writer, row, products, turned=place == "turned")
    elif writer.picks:
        _picked(writer, place, row, products)
    else:
        source.line(f"p = tl.exp2(x * LOG2E - base{row})" if writer.in_log2 else f"p = tl.exp2((x - base{row}) * LOG2E)")
        products()
        source.line(f"dx = p * (dp - delta{row})")
    for (name, slope), slope_text in zip(by.items(), texts, strict=True):
        source.line(f"{name} = {_by_chain(slope, slope_text, condition)}")
    running = [one for one in learned if one.units]
    if running:
        _gradients_of_units(writer, place, condition, running, [slopes[one.name] for one in running])


def _by_chain(slope: sympy.Expr, text: str, condition: str) -> str:
    if slope == 1:
        return "dx"
    # the slope may be anything where a pair is masked
    return f"tl.where(allowed, dx * ({text}), 0.0)" if condition else f"dx * ({text})"


def _gradients_of_units(writer: Writer, place: str, condition: str, reads: list[LearnedRead], slopes: list[sympy.Expr]) -> None:
    """Add the gradients of reads by the index of a sum to their own totals, which have a column for each unit."""
    source, units = writer.source, reads[0].units
    assert units is not None
    with each_unit(source, units, slopes, writer.names(place), real="tl.float32") as (unit, texts):
        here = f"(units == {unit})[None, :]"
        for one, slope, text in zip(reads, slopes, texts, strict=True):
            source.line(f"{one.name} += tl.where({here}, tl.sum({_by_chain(slope, text, condition)}, 1)[:, None], 0.0)")


def _picked(writer: Writer, place: str, row: str, products: Products) -> None:
    """Weights ``p`` of a softpick, and the gradients ``dx`` of its logits."""
    source, base = writer.source, "base" if writer.in_log2 else "base * LOG2E"
    source.line(f"power = tl.exp2(x * LOG2E - ({base}){row})")
    source.line(f'more = tl.where(x == float("-inf"), 0.0, power - tl.exp2(-({base})){row})')
    if place == "turned":
        source.line("p = tl.maximum(more, 0.0)")
    products()
    source.line(f"dx = power * tl.where(more > 0, dp - delta{row}, tl.where(more < 0, delta{row}, 0.0))")


def predicate(writer: Writer, place: str) -> str:
    """The whole condition of a pair, the lengths included, for kernels that visit tiles in an order of their own."""
    q, kv = ("[:, None]", "[None, :]") if place == "tile" else ("[None, :]", "[:, None]")
    inside = f"(row{q} < rows) & (kv_idx{kv} < kv_len)"
    mask = writer.pattern.mask.expr
    if mask == sympy.true:
        return inside
    if mask == sympy.false:
        return f"{inside} & (row{q} < 0)"
    return f"({write_expression(writer.source, mask, writer.names(place), real='tl.float64')}) & {inside}"
