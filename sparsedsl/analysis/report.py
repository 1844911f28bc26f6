"""``sd.analyse``: everything that can be said about a pattern at given lengths before it runs, as one printable object."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

import sympy
import torch

from sparsedsl.analysis.bounds import check_reads, index_ranges, value_ranges
from sparsedsl.analysis.domain import Domain, check_size
from sparsedsl.analysis.effort import EFFORT
from sparsedsl.analysis.exactness import exact_domain
from sparsedsl.analysis.head_counts import count_heads
from sparsedsl.analysis.lists import BlockLists
from sparsedsl.analysis.mask_clauses import clauses
from sparsedsl.analysis.program_report import ProgramAnalysis, analyse_program, lengths_text
from sparsedsl.analysis.proofs import REFUTED, Verdict, Witness, causality
from sparsedsl.analysis.rows import RowCounts
from sparsedsl.analysis.tiles import block_pair, classify
from sparsedsl.analysis.totals import Totals, listed_totals, numbers_alone, repeated_totals
from sparsedsl.errors import ShapeError, TableError
from sparsedsl.lang.advice import meant, surplus
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.pattern import Pattern, as_pattern
from sparsedsl.lang.printing import expression_text
from sparsedsl.lang.symbols import BATCH, HEAD, KV_IDX, Q_IDX
from sparsedsl.lang.tables import by_kept_name, declared, table_reads
from sparsedsl.plain_values import Reported
from sparsedsl.program.graph import Program, as_program
from sparsedsl.program.node import Node
from sparsedsl.quantities import bytes_text, factor_text, flops_text, seconds_text, share_text

__all__ = ["ITEM_BYTES", "Analysis", "analyse", "analyze", "bind_for_analysis"]

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Analysis(Reported):
    """What :func:`analyse` found. Counts are over ``batch x heads``; FLOPs count a multiply-add as two.

    ``totals``: tiles counted by class. ``lists``: tile lists, one per (batch, head) the mask can tell apart.
    ``density``: allowed pairs / all pairs; an estimate from sampled rows if ``density_exact`` is False. ``flops``: forward pass over all
    listed tiles; ``flops_backward`` likewise, ``flops_dense``: forward with every tile listed. ``bytes``: forward traffic if every listed
    tile loads its keys and values once and queries and outputs move once. ``partial_share``: partial / listed tiles. ``imbalance``: most /
    mean listed tiles of a tile row. ``empty_rows``: rows that may attend to nothing, ``empty_row`` one of them as (b, h, q_idx).

    ``tables``: the values that were read, by name.

    >>> import sparsedsl as sd
    >>> found = sd.analyse(sd.kv_idx <= sd.q_idx, 256)
    >>> found.lists.full.total, found.lists.partial.total, found.empty_rows
    (1, 2, 0)
    """

    pattern: Pattern
    q_len: int
    kv_len: int
    q_offset: int
    batch: int
    heads: int
    head_dim: int
    head_dim_v: int
    dtype: str
    totals: Totals
    density: float
    density_exact: bool
    flops: int
    flops_backward: int
    flops_dense: int
    bytes: int
    partial_share: float
    imbalance: float
    causal: Verdict
    empty_rows: int
    empty_row: tuple[int, int, int] | None
    warnings: tuple[str, ...]
    seconds: float = field(repr=False)
    block: tuple[int, int]
    tables: Mapping[str, torch.Tensor] = field(repr=False)
    _list: Callable[[], BlockLists] = field(repr=False)

    @functools.cached_property
    def lists(self) -> BlockLists:
        """The tile lists, made when first asked for where there were too many tiles to list them all.

        Raises :class:`~sparsedsl.UnsupportedError` where they do not fit into memory.
        """
        return self._list()

    def facts(self) -> list[tuple[str, str]]:
        """What it says beside the pattern: names and words; those without a name go on."""
        totals = self.totals
        batch, heads, rows, columns = totals.shape
        block_q, block_kv = self.block
        saving = f"{factor_text(self.flops_dense / self.flops)} less than dense" if self.flops else "nothing to compute"
        example = f", e.g. (b, h, q_idx) = {self.empty_row}" if self.empty_row else ""
        groups = f", lists for {batch} x {heads} (batch, heads)" if batch * heads > 1 else ""
        approx = "" if self.density_exact else "about "
        listed, total = totals.listed, batch * heads * rows * columns
        widths = f"{self.head_dim}" if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        kind = f"{self.dtype}, batch {self.batch}, heads {self.heads}, head_dim {widths}"
        return [
            ("queries x keys", lengths_text(self.q_len, self.kv_len, self.q_offset)),
            ("allowed pairs", f"{approx}{share_text(self.density)} of all"),
            ("tiles", f"{listed:,} of {total:,} listed ({share_text(listed / total)}), {block_q} x {block_kv} tokens{groups}"),
            ("", f"{totals.full:,} full, {totals.partial:,} partial ({share_text(self.partial_share)})"),
            ("tile lists", f"{bytes_text(totals.nbytes)}, {self._made()}"),
            ("row imbalance", f"{factor_text(self.imbalance)} (most / mean tiles in a row)"),
            ("forward", f"{flops_text(self.flops)}, {saving}; backward {flops_text(self.flops_backward)}"),
            ("traffic", f"{bytes_text(self.bytes)} forward ({kind})"),
            ("causal", str(self.causal)),
            ("empty rows", f"{approx}{self.empty_rows:,}{example}"),
        ]

    def __str__(self) -> str:
        facts = [f"  {name:16} {words}" for name, words in self.facts()]
        return "\n".join([*declared(str(self.pattern), self.tables), *facts, *(f"  ! {warning}" for warning in self.warnings)])

    def _made(self) -> str:
        made = "made and counted" if "lists" in self.__dict__ else "not made; counted from what repeats"
        return f"{made} in {seconds_text(self.seconds)}"

    def _repr_html_(self) -> str:
        from sparsedsl.html_card import card
        from sparsedsl.lang.thumbnail import thumbnail

        lengths = {"q_len": self.q_len, "kv_len": self.kv_len, "q_offset": self.q_offset}
        picture = thumbnail(self.pattern.mask.expr, self.tables, **lengths)
        code = "\n".join(declared(str(self.pattern), self.tables))
        return card("Analysis", code, self.facts(), picture, self.warnings)


def bind_for_analysis(pattern: Pattern, tables: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tables by name, those given before those bound at declaration."""
    tables = dict(by_kept_name(tables, pattern.tables))
    unknown = set(tables) - set(pattern.tables)
    if unknown:
        known = [*pattern.tables, *inspect.signature(analyse).parameters]
        raise TableError(surplus(unknown, known, f"the pattern reads {', '.join(pattern.tables) or 'no table'}"))
    given = pattern.bound | tables
    missing = [name for name in pattern.tables if name not in given]
    if missing:
        own = [name for name in missing if name in inspect.signature(analyse).parameters]
        more = f". {own[0]} is a word of analyse() too: bind it, pattern.bind({own[0]}=tensor)" if own else ""
        raise TableError(
            f"missing table{'s' * (len(missing) > 1)} {', '.join(missing)}: pass {', '.join(f'{n}=tensor' for n in missing)}{more}"
        )
    return {name: given[name] for name in pattern.tables}


@overload
def analyse(
    pattern: Pattern, q_len: int, kv_len: int | None = None, block_size: int | tuple[int, int] = 128, *, q_offset: int = 0,
    batch: int = 1, heads: int | None = None, head_dim: int = 64, head_dim_v: int | None = None, dtype: Any = "bfloat16",
    kv_heads: int | None = None, sizes: Mapping[str, int] | None = None, **tables: Any,
) -> Analysis: ...  # fmt: skip
@overload
def analyse(
    pattern: Program | Node, q_len: int, kv_len: int | None = None, block_size: int | tuple[int, int] = 128, *, q_offset: int = 0,
    batch: int = 1, heads: int | None = None, head_dim: int = 64, head_dim_v: int | None = None, dtype: Any = "bfloat16",
    kv_heads: int | None = None, sizes: Mapping[str, int] | None = None, **tables: Any,
) -> ProgramAnalysis: ...  # fmt: skip
@overload
def analyse(
    pattern: Any, q_len: int, kv_len: int | None = None, block_size: int | tuple[int, int] = 128, *, q_offset: int = 0,
    batch: int = 1, heads: int | None = None, head_dim: int = 64, head_dim_v: int | None = None, dtype: Any = "bfloat16",
    kv_heads: int | None = None, sizes: Mapping[str, int] | None = None, **tables: Any,
) -> Analysis | ProgramAnalysis: ...  # fmt: skip
def analyse(
    pattern: Any,
    q_len: int,
    kv_len: int | None = None,
    block_size: int | tuple[int, int] = 128,
    *,
    q_offset: int = 0,
    batch: int = 1,
    heads: int | None = None,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    dtype: Any = "bfloat16",
    kv_heads: int | None = None,
    sizes: Mapping[str, int] | None = None,
    **tables: Any,
) -> Analysis | ProgramAnalysis:
    """Everything that can be said about a pattern or a program at these lengths before it runs.

    Args:
        pattern: a Mask, a Pattern, or a node of a program.
        q_len, kv_len: number of queries and keys in tokens; ``kv_len`` defaults to ``q_offset + q_len``. (In a formula ``sd.q_len`` is the
            position after the last query, ``q_offset + q_len``.)
        block_size: tokens per tile, one number or a pair (q, kv).
        q_offset: position of the first query.
        batch, heads, head_dim, head_dim_v, dtype: what the costs are counted for; ``heads`` are query heads, by default as many as
            the pattern is written for (``alibi(8)``, tables read by ``h``), else 1.
        kv_heads, sizes: of programs: key/value heads, default ``heads``, and the sizes of axes with names of their own.
        tables: a tensor for each table that is not bound to the pattern.

    Returns:
        :class:`Analysis`, of a program :class:`~sparsedsl.analysis.program_report.ProgramAnalysis`; ``print`` it for a report.

    Raises:
        ShapeError: a length or size below 1, or other heads than the pattern is written for.
        TableError: a table is missing, surplus or too short, or holds values that arithmetic would take beyond 2**60.
        UnsupportedError: the lists of a mask that does not repeat do not fit into memory.

    The (q_len x kv_len) grid never exists: cost and memory follow the listed tiles. Beyond 2**26 tiles, those of a mask that repeats
    (windows, sinks, chunks, strides, dilation, any bounds; no table that positions choose from) are counted without listing them, at any
    length; ``lists`` are then made when asked for. Where a density cannot be had in closed form and
    the partial tiles hold more than 2**27 pairs, rows are sampled and the report says "about".

    >>> import sparsedsl as sd
    >>> found = sd.analyse((sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 1024), 65536)
    >>> found.lists.listed, round(found.density, 6), found.causal == sd.PROVED
    (4572, 0.015503, True)
    """
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise ShapeError(f"dtype must be one of {', '.join(ITEM_BYTES)}; got {dtype!r}{meant(name, ITEM_BYTES)}")
    for what, value in (("head_dim", head_dim), ("head_dim_v", head_dim if head_dim_v is None else head_dim_v), ("q_len", q_len)):
        check_size(what, value, 1)
    check_size("q_offset", q_offset, 0)
    program = as_program(pattern)
    if program is not None:
        return analyse_program(
            program, q_len, kv_len, q_offset=q_offset, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
            head_dim_v=head_dim_v, item=ITEM_BYTES[name], sizes=sizes, **tables,
        )  # fmt: skip
    pattern, pair = as_pattern(pattern), block_pair(block_size)
    bound = bind_for_analysis(pattern, tables)
    heads = count_heads((pattern,), bound, heads)
    domain = Domain(q_len, q_offset + q_len if kv_len is None else kv_len, q_offset, batch, heads, bound)
    exact = exact_domain(pattern.exprs, domain)
    check_reads(pattern, domain)
    mask = pattern.mask.expr
    with torch.no_grad():
        start = time.perf_counter()
        totals, lists = _count(mask, exact, pair)
        seconds = time.perf_counter() - start
        rows = totals.rows.scaled(batch * heads // (totals.shape[0] * totals.shape[1]))
        causal = _causality(pattern, exact, pair)
    cost = _cost(totals, domain, head_dim, head_dim if head_dim_v is None else head_dim_v, ITEM_BYTES[name])
    empty_row = None
    if rows.first_empty is not None:
        b, h = divmod(rows.first_empty[0], totals.shape[1])
        empty_row = (b, h, rows.first_empty[1] + q_offset)
    found = Analysis(
        pattern, domain.rows, domain.kv_len, q_offset, batch, heads, head_dim, head_dim_v or head_dim, name, totals,
        density=rows.allowed / (rows.rows * domain.kv_len), density_exact=rows.exact, **cost,
        partial_share=totals.partial / max(totals.listed, 1), imbalance=totals.imbalance, causal=causal,
        empty_rows=rows.empty, empty_row=empty_row, warnings=tuple(_warnings(pattern, domain, rows, causal)), seconds=seconds, block=pair,
        tables=bound,
        _list=functools.partial(classify, mask, exact, pair),
    )  # fmt: skip
    if lists is not None:
        found.__dict__["lists"] = lists
    return found


# As it is spelt on the other side of the Atlantic.
analyze = analyse


def _count(mask: Any, domain: Domain, block: tuple[int, int]) -> tuple[Totals, BlockLists | None]:
    """The totals, and the lists where they were made for them."""
    tiles = domain.groups(mask).count * -(-domain.rows // block[0]) * -(-domain.kv_len // block[1])
    totals = repeated_totals(mask, domain, block) if tiles > EFFORT.now.listed else None
    if totals is not None:
        return totals, None
    lists = classify(mask, domain, block)
    return listed_totals(mask, domain, lists), lists


def _cost(totals: Totals, domain: Domain, head_dim: int, head_dim_v: int, item: int) -> dict[str, int]:
    """FLOPs and bytes over batch x heads; groups that share a list each do its work."""
    share = domain.batch * domain.heads // (totals.shape[0] * totals.shape[1])
    dense = domain.batch * domain.heads * domain.rows * domain.kv_len
    width, pairs = head_dim + head_dim_v, totals.pairs_of(domain.batch, domain.heads)
    return {
        "flops": 2 * width * pairs,
        "flops_backward": 2 * (3 * head_dim + 2 * head_dim_v) * pairs,
        "flops_dense": 2 * width * dense,
        "bytes": item * width * (totals.loaded * share + domain.batch * domain.heads * domain.rows),
    }


def _causality(pattern: Pattern, domain: Domain, block: tuple[int, int]) -> Verdict:
    """Proved for all lengths if the solver can; else decided exactly at these lengths and tables."""
    verdict = causality(pattern.mask)
    if verdict.status == "PROVED":
        return verdict
    later = sympy.And(pattern.mask.expr, sympy.Ge(KV_IDX - Q_IDX, 1))
    totals, lists = _count(later, domain, block)
    if totals.listed == 0:
        if verdict.status == "REFUTED":
            return Verdict("PROVED", reason=f"at these lengths and tables only; elsewhere REFUTED at {verdict.witness}")
        return Verdict("PROVED", reason="at these lengths and tables, by exhausting the tiles")
    return Verdict("REFUTED", _point(later, domain, totals, lists, block))


def _point(mask: Any, domain: Domain, totals: Totals, lists: BlockLists | None, block: tuple[int, int]) -> Witness:
    """Some pair of the first listed tile that satisfies ``mask``."""
    top = left = 0
    if lists is None:  # the same question about a square that is known to hold such a pair
        assert totals.example is not None
        group, square = totals.example
        top, left = square.row, square.column
        b, h = divmod(group, totals.shape[1])
        moved = numbers_alone(mask, domain, b, h)
        assert moved is not None
        lists = classify(moved.xreplace({Q_IDX: Q_IDX + top, KV_IDX: KV_IDX + left}), Domain(square.rows, square.keys), block)
        line, column = _first_tile(lists)
        row = line
    else:
        line, column = _first_tile(lists)
        group, row = divmod(line, lists.shape[2])
        b, h = divmod(group, lists.shape[1])
    first_q, first_kv = top + row * block[0], left + column * block[1]
    q = torch.arange(first_q, min(first_q + block[0], domain.rows), device=domain.device) + domain.q_offset
    kv = torch.arange(first_kv, min(first_kv + block[1], domain.kv_len), device=domain.device)
    env = {"b": b, "h": h, "q_idx": q[:, None], "kv_idx": kv} | domain.lengths | dict(domain.tables)
    i, j = (int(x) for x in evaluate(mask, env).expand(q.numel(), kv.numel()).nonzero()[0])
    read = {read.spec.name for read in table_reads(mask)}
    return Witness(b, h, int(q[i]), int(kv[j]), tables={n: t for n, t in domain.tables.items() if n in read})


def _first_tile(lists: BlockLists) -> tuple[int, int]:
    """Line and column of a listed tile."""
    part = lists.full if lists.full.total else lists.partial
    return int(part.owners()[0]), int(part.columns[0])


def _warnings(pattern: Pattern, domain: Domain, rows: RowCounts, causal: Verdict) -> list[str]:
    found = list(pattern.warnings)
    if pattern.causal and causal == REFUTED:
        found.append(f"it declares causal=True, and is not: {causal.witness}")
    mask = pattern.mask.expr
    free = mask.free_symbols
    for symbol, size, word in ((BATCH, domain.batch, "batch"), (HEAD, domain.heads, "heads")):
        if symbol in free and size == 1:
            found.append(f"the mask depends on `{symbol}` but {word}=1: this is the report of {symbol}=0 alone; pass {word}=")
    pairs = rows.rows * domain.kv_len
    if rows.exact and rows.allowed == 0:
        found.append("the mask allows no pair at these lengths")
    elif rows.exact and rows.allowed == pairs:
        found.append("the mask allows every pair at these lengths: dense attention does the same")
    elif rows.empty:
        they = "they give out 0 and lse -inf" if pattern.has_lse else "they give 0"
        found.append(f"{'' if rows.exact else 'about '}{rows.empty:,} rows may attend to nothing; {they}")
    if causal.status == "REFUTED":
        found.append(f"a query sees a later position: {causal.witness}")
    intervals = index_ranges(domain, value_ranges(domain))
    for clause in clauses(mask):
        for bound in clause.bounds:
            if bound.couples and bound.same_function and bound.high is not None and bound.q_part == Q_IDX:
                reach, limit = intervals.range(Q_IDX - KV_IDX)[1], intervals.range(bound.high)[0]
                if limit >= reach and limit != float("inf"):
                    found.append(f"q_idx - kv_idx <= {bound.high} always holds: the window is not smaller than the sequence")
    found += [f"{text} reaches {value:,}, beyond 32 bits" for text, value in _overflows(pattern, intervals)]
    if pattern.score.expr.has(-sympy.oo):
        found.append("the score drops pairs with -inf: tiles of such pairs are computed all the same; say it in the mask")
    return list(dict.fromkeys(found))


def _overflows(pattern: Pattern, intervals: Any) -> list[tuple[str, int]]:
    """Integer subexpressions whose values leave 32 bits somewhere in the domain."""
    found = []
    for expr in pattern.exprs:
        for node in sympy.preorder_traversal(expr):
            if isinstance(node, sympy.Expr) and node.is_integer and not node.is_Atom:
                low, high = intervals.range(node)
                widest = max(abs(low), abs(high))
                if INT32_MAX < widest < float("inf"):
                    found.append((expression_text(node), int(widest)))
    return found
