"""Jobs of the ``tiled`` lowering: the strips of a residue, one product or a batch of small ones at a time, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.mask_clauses import only_difference
from sparsedsl.backends.tiled.operands import GradientAccumulators, Operands
from sparsedsl.backends.tiled.score_rules import clamped
from sparsedsl.lang.shapes import joined_shape
from sparsedsl.lang.steps import evaluate
from sparsedsl.lang.symbols import BATCH, HEAD
from sparsedsl.lang.tables import table_reads
from sparsedsl.runtime.gemm import product, product_nt, product_tn
from sparsedsl.tiling.cost import chunk_keys, strips_at_once
from sparsedsl.tiling.schedule import KeyRange, ResiduePlan, StridedSeries

__all__ = ["ResiduePass", "TileJob"]

Tensor = torch.Tensor
# Stands in for the maximum of a row that has no key yet, as a part of the largest number: no logit is lower, and -inf minus it stays
# -inf.
NO_KEY = -0.75
# Less than any total that is not 0.
TINY = 1e-30
# Bytes of biases kept during one pass, where they are new with every pass.
KEPT_BYTES = 64 << 20


@functools.lru_cache(maxsize=1024)
def tells_heads_apart(expr: Any) -> bool:
    """Whether an expression reads ``b`` or ``h``."""
    return bool(expr.free_symbols & {BATCH, HEAD})


@functools.lru_cache(maxsize=4096)
def _cut(series: StridedSeries, rows: int) -> tuple[list[KeyRange], int]:
    """The key ranges of a strip of so many rows, and how many strips are taken at once."""
    key_ranges = series.key_ranges(chunk_keys(rows))
    return key_ranges, strips_at_once(rows, max(key_range.length for key_range in key_ranges))


class ResiduePass:
    """One residue of a pass: views of the operands in residue coordinates, and its jobs of work."""

    def __init__(self, run: Operands, plan: ResiduePlan) -> None:
        self.run, self.plan, residue = run, plan, plan.residue
        self.first = plan.first
        begin = plan.first * residue.q_step + residue.q_start - run.call.domain.q_offset
        self.rows = slice(begin, begin + (plan.rows - 1) * residue.q_step + 1, residue.q_step)
        self.first_key, last = plan.keys
        self.keys = slice(
            self.first_key * residue.kv_step + residue.kv_start,
            (last - 1) * residue.kv_step + residue.kv_start + 1,
            residue.kv_step,
        )
        self.q = run.q[:, :, self.rows].flatten(0, 1)
        # Keys in steps are copied once a residue: all copies together are one copy of k and v.
        self.k, self.v = run.keys(self.keys)
        # Strips are made for so many heads a key/value head.
        self.ratio = run.shared * run.batch // self.k.shape[0]
        # Masks that all strips of a series share, found again without asking what they depend on.
        self.known: dict[tuple[Any, ...], Tensor] = {}
        # What jobs write to or read beside q, k and v, by name: (flat heads, residue rows, ..).
        self.place = {name: t.flatten(0, 1)[:, self.rows] for name, t in run.by_row.items()}
        self.bias = None if run.rule.bias is None else residue.inside(run.rule.bias)
        self.masks = run.schedule.masks
        # A bias without tables is the same at every call.
        new = self.bias is not None and bool(table_reads(self.bias))
        self.biases: Cache[Tensor] = Cache(tiles=True, most=KEPT_BYTES) if new else self.masks

    def head_spans(self, group: int, heads: range) -> Iterator[tuple[int, int]]:
        """First and last + 1 of the flat heads that a group of the mask covers, as far as they are in ``heads``, without gaps."""
        for low, high in self._head_spans(group):
            low, high = max(low, heads.start), min(high, heads.stop)
            if low < high:
                yield low, high

    def _head_spans(self, group: int) -> Iterator[tuple[int, int]]:
        run = self.run
        # A scattered residue may tell fewer heads apart than the whole mask does.
        group_batch, group_heads = run.schedule.groups if self.plan.lists is None else self.plan.lists.shape[:2]
        b, h = divmod(group, group_heads)
        batches = range(run.batch) if group_batch == 1 else range(b, b + 1)
        if group_heads == 1:
            yield batches.start * run.shared, batches.stop * run.shared
            return
        for batch in batches:
            yield batch * run.shared + h, batch * run.shared + h + 1

    def jobs(self, heads: range, most_heads: int) -> Iterator[TileJob]:
        """Everything to compute for some flat heads, head by head, in the order of the queries; at most ``most_heads`` at once."""
        for number, series in enumerate(self.plan.strided_series):
            rows = series.height * self.run.group
            key_ranges, at_once = _cut(series, rows)
            for low, high in self.head_spans(series.group, heads):
                if at_once == 1 or (series.count > 1 and series.count >= high - low):
                    for head in range(low, high):
                        for t in range(0, series.count, at_once):
                            yield TileJob(self, number, series, key_ranges, head, head + 1, t, min(t + at_once, series.count))
                else:
                    several = min(at_once, most_heads)
                    for t in range(series.count):
                        for head in range(low, high, several):
                            yield TileJob(self, number, series, key_ranges, head, min(head + several, high), t, t + 1)


class TileJob:
    """Strips ``t_low .. t_high - 1`` of a series for flat heads ``low .. high - 1``: several strips of one head, or one strip of several.

    ``X`` is their number. Rows of a strip are (query, head of the group).
    """

    def __init__(
        self,
        residue: ResiduePass,
        number: int,
        series: StridedSeries,
        key_ranges: list[KeyRange],
        low: int,
        high: int,
        t_low: int,
        t_high: int,
    ) -> None:
        self.residue, self.run, self.number, self.series, self.key_ranges = residue, residue.run, number, series, key_ranges
        self.low, self.high, self.t_low, self.t_high = low, high, t_low, t_high
        self.count = max(high - low, t_high - t_low)
        self.height = series.height
        self.begin = series.q_start + t_low * series.step - residue.first  # first row within the residue
        self.b: Any
        self.h: Any
        self.b, self.h = divmod(low, self.run.shared)
        if high - low > 1:
            heads = torch.arange(low, high, device=residue.q.device).view(-1, 1, 1, 1)
            self.b, self.h = heads // self.run.shared, heads % self.run.shared

    # ---- views ------------------------------------------------------------------------------------------------

    def strips(self, t: Tensor) -> Tensor:
        """``(flat heads, residue rows, ..)`` -> the rows of this job ``(X, height, ..)``; strips must follow each other or be one."""
        if self.t_high - self.t_low == 1:
            return t[self.low : self.high, self.begin : self.begin + self.height]
        row = t.stride(1)
        base = t[self.low, self.begin :]
        return base.as_strided((self.count, self.height, *t.shape[2:]), (self.series.step * row, row, *t.stride()[2:]))

    def rows(self, t: Tensor) -> Tensor:
        """``(X, height x group, D)`` of a residue tensor ``(flat heads, residue rows, group, D)``, in the type of arithmetic."""
        return self.strips(t).flatten(1, 2).to(self.run.dtype)

    def scaled_q(self) -> Tensor:
        """The queries times their factor."""
        return self.rows(self.residue.q) * self.run.factor

    def keys(self, t: Tensor, key_range: KeyRange) -> Tensor:
        """``(X, length, D)`` of a residue tensor ``(flat kv heads, keys, D)``."""
        start = key_range.start + self.t_low * key_range.step - self.residue.first_key
        ratio = self.residue.ratio
        if self.t_high - self.t_low == 1:
            first, last = self.low // ratio, (self.high - 1) // ratio
            part = t[first : last + 1, start : start + key_range.length]
            if ratio == 1 or self.high - self.low == 1:
                return part
            heads = torch.arange(self.low, self.high, device=t.device) // ratio - first
            return part.index_select(0, heads)
        base = t[self.low // ratio, start:]
        return base.as_strided((self.count, key_range.length, t.shape[2]), (key_range.step * t.stride(1), t.stride(1), 1))

    # ---- tiles of masks and biases ------------------------------------------------------------------------------

    def env(self, key_range: KeyRange, low: int, high: int, transposed: bool) -> dict[str, Any]:
        """Indices of keys ``low .. high - 1`` of a key range, residue coordinates: shapes ``(X, m, 1, n)``, or ``(X, n, m, 1)``
        transposed."""
        device = self.residue.q.device
        turn = torch.arange(self.t_low, self.t_high, device=device).view(-1, 1, 1, 1)
        q = self.series.q_start + turn * self.series.step + torch.arange(self.height, device=device).view(1, -1, 1, 1)
        kv = key_range.start + low + turn * key_range.step + torch.arange(high - low, device=device)
        if transposed:
            q, kv = q.transpose(1, 2), kv.transpose(1, 3)
        return {"b": self.b, "h": self.h, "q_idx": q, "kv_idx": kv, **self.run.call.domain.lengths, **self.run.tables}

    def place(self, expr: Any, key_range: KeyRange, low: int, high: int) -> tuple[bool, tuple[Any, ...]]:
        """Whether ``expr`` is the same for all strips of the job, and what its tile depends on: equal places share a tile."""
        shared = self.t_high - self.t_low == 1 or key_range.step == self.series.step
        heads = (self.low, self.high) if tells_heads_apart(expr) else None
        size = (self.height, high - low)
        q = self.series.q_start + self.t_low * self.series.step
        kv = key_range.start + self.t_low * key_range.step + low
        if shared and only_difference(expr):
            return True, (expr, heads, size, q - kv)
        turns = None if self.t_high - self.t_low == 1 else (self.t_high - self.t_low, self.series.step, key_range.step)
        return False, (expr, heads, size, q, kv, turns)

    def tile_env(self, shared: bool, key_range: KeyRange, low: int, high: int, transposed: bool) -> dict[str, Any]:
        """:meth:`env`, of the first strip only where the others are like it."""
        env = self.env(key_range, low, high, transposed)
        return {**env, "q_idx": env["q_idx"][:1], "kv_idx": env["kv_idx"][:1]} if shared else env

    def mask(self, key_range: KeyRange, low: int, high: int, residual: Any, transposed: bool) -> Tensor:
        """0 where a pair of keys ``low .. high - 1`` is allowed, -inf elsewhere, ``(X or 1, m, 1, n)`` or transposed."""
        quick = (self.number, key_range.start, low, high, transposed)
        known = self.residue.known.get(quick)
        if known is not None:
            return known
        shared, place = self.place(residual, key_range, low, high)

        def make() -> Tensor:
            env = self.tile_env(shared, key_range, low, high, transposed)
            allowed = evaluate(residual, env)
            shape = joined_shape(allowed.shape, env["q_idx"].shape, env["kv_idx"].shape)
            tile = torch.zeros(shape, dtype=self.run.dtype, device=self.residue.q.device)
            return tile.masked_fill_(~allowed.expand(shape), float("-inf"))

        tile = self.residue.masks.get(
            (*place, self.residue.plan.residue, self.run.dtype, self.residue.q.device, transposed), (), make
        )
        if self.series.count > 1 and key_range.step == self.series.step and shared and not tells_heads_apart(residual):
            self.residue.known[quick] = tile
        return tile

    def bias(self, key_range: KeyRange, transposed: bool) -> Tensor:
        """The bias in units of log2 on a whole key range, -inf where a pair is masked."""
        expr: Any = self.residue.bias
        shared, place = self.place(expr, key_range, 0, key_range.length)
        masks = [(low, high, residual, self.place(residual, key_range, low, high)) for low, high, residual in key_range.masks]
        shared = shared and all(m[3][0] for m in masks)
        if not shared:
            place = (place, self.t_low, self.t_high, self.number)

        def make() -> Tensor:
            env = self.tile_env(shared, key_range, 0, key_range.length, transposed)
            value = clamped(evaluate(expr, env, dtype=self.run.dtype).to(self.run.dtype))
            value = value.view(*(1,) * (4 - value.ndim), *value.shape)
            tiles = [(low, high, self.mask(key_range, low, high, residual, transposed)) for low, high, residual, _ in masks]
            if tiles:
                shape = joined_shape(value.shape, env["q_idx"].shape, env["kv_idx"].shape)
                several = max(shape[0], *(tile.shape[0] for _, _, tile in tiles))  # masks may differ where the bias does not
                value = value.expand(several, *shape[1:]).contiguous()
            for low, high, tile in tiles:
                part = value[:, low:high] if transposed else value[..., low:high]
                part.masked_fill_(tile.isinf(), float("-inf"))
            return value.contiguous()

        key = (
            "bias",
            place,
            masks and tuple(m[3] for m in masks),
            self.run.dtype,
            self.residue.q.device,
            self.residue.plan.residue,
            transposed,
        )
        return self.residue.biases.get((*key[:2], tuple(key[2]), *key[3:]), (), make)

    # ---- forward ----------------------------------------------------------------------------------------------

    def logits(self, q: Tensor, key_range: KeyRange) -> Tensor:
        """Masked logits in units of log2, ``(X, M, n)``."""
        s = product_nt(q, self.keys(self.residue.k, key_range), tanh=self.run.rule.tanh)
        tile, _ = self.modified(s.view(s.shape[0], self.height, self.run.group, key_range.length), key_range, False)
        return tile.reshape(s.shape)

    def modified(self, tile: Tensor, key_range: KeyRange, transposed: bool) -> tuple[Tensor, Any]:
        """Score rule and mask on a tile of products ``(X, m, G, n)``, or ``(X, n, m, G)`` transposed: in place where possible.

        Transposed tiles are those of the backward pass: with what the rule keeps for it. A score may be anything where a pair is masked,
        so what is not plain is overwritten there, not added to.
        """
        rule, kept = self.run.rule, None
        if rule.bias is not None:
            return tile.add_(self.bias(key_range, transposed)), None
        if rule.arbitrary:
            self.fill(tile, key_range, 1.0, transposed)
        env = self.score_env(key_range, transposed) if rule.arbitrary else {}
        if transposed:
            tile, kept = rule.logits_kept(tile, env, self.run.leaves)
        else:
            tile = rule.logits(tile, env)
        if rule.arbitrary:
            self.fill(tile, key_range, float("-inf"), transposed)
            return tile, kept
        for low, high, residual in key_range.masks:
            place = tile[:, low:high] if transposed else tile[..., low:high]
            place.add_(self.mask(key_range, low, high, residual, transposed))
        return tile, kept

    def fill(self, tile: Tensor, key_range: KeyRange, value: float, transposed: bool) -> None:
        """Overwrite the masked pairs of a tile."""
        for low, high, residual in key_range.masks:
            place = tile[:, low:high] if transposed else tile[..., low:high]
            place.masked_fill_(self.mask(key_range, low, high, residual, transposed).isinf(), value)

    def score_env(self, key_range: KeyRange, transposed: bool) -> dict[str, Any]:
        """Positions, as score expressions read them."""
        env, residue = self.env(key_range, 0, key_range.length, transposed), self.residue.plan.residue
        env["q_idx"] = env["q_idx"] * residue.q_step + residue.q_start
        env["kv_idx"] = env["kv_idx"] * residue.kv_step + residue.kv_start
        return env

    def forward(self, *, merge: bool) -> None:
        """Compute the strips into the residue's ``out (flat heads, rows, G, Dv)`` and ``lse (flat heads, rows, G)``, the latter in log2.

        ``merge``: with what another residue has put there.
        """
        self.store(*self.sums(self.scaled_q()), merge)

    def sums(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``sum of 2**(logit - most) * v`` and ``sum of 2**(logit - most)`` of each row, and its largest logit ``most``."""
        total = value = most = q  # assigned by the first key range
        for number, key_range in enumerate(self.key_ranges):
            s = self.logits(q, key_range)
            highest = s.amax(-1, keepdim=True)
            if number == 0:
                most = highest.clamp_(min=NO_KEY * torch.finfo(s.dtype).max)
            else:
                highest = torch.maximum(highest, most)
                shrink = (most - highest).exp2_()
                total.mul_(shrink)
                value.mul_(shrink)
                most = highest
            s.sub_(most).exp2_()
            part, weighted = s.sum(-1, keepdim=True), product(s, self.keys(self.residue.v, key_range))
            total, value = (total.add_(part), value.add_(weighted)) if number else (part, weighted)
        return value, total, most

    def store(self, value: Tensor, total: Tensor, most: Tensor, merge: bool) -> None:
        """Divide by the totals, into place; an empty row, whose total is 0, becomes 0 with LSE -inf."""
        place, place_lse = self.strips(self.residue.place["out"]), self.strips(self.residue.place["lse"])
        value, total = value.view(place.shape), total.view(*place_lse.shape)
        found = total.log2().add_(most.view(place_lse.shape))
        total = total.clamp_(min=TINY)[..., None]
        if not merge:
            torch.div(value, total, out=place)
            place_lse.copy_(found)
            return
        both = torch.logaddexp2(place_lse, found)
        safe = torch.where(both == float("-inf"), 0.0, both)
        place.mul_((place_lse - safe).exp2_()[..., None]).add_(value.div_(total).mul_((found - safe).exp2_()[..., None]))
        place_lse.copy_(both)

    # ---- backward ---------------------------------------------------------------------------------------------

    def add_totals(self) -> None:
        """Join this job's largest logits and sums relative to them with those in the residue's ``most`` and ``total``."""
        _, total, most = self.sums(self.scaled_q())
        place_most, place = self.strips(self.residue.place["most"]), self.strips(self.residue.place["total"])
        most, total = most.view(place.shape), total.view(place.shape)
        larger = torch.maximum(place_most, most)
        place.mul_((place_most - larger).exp2_()).add_(total.mul_((most - larger).exp2_()))
        place_most.copy_(larger)

    def backward(self, accumulators: GradientAccumulators) -> None:
        """Add this job's gradients to the residue's ``dq`` and to ``accumulators``.

        Tiles are (keys, rows) here: four of the five products then read rows as they lie.
        """
        run, residue = self.run, self.residue
        dk, dv = accumulators.of(residue, residue.keys)
        q = self.scaled_q()
        grad_out = self.rows(residue.place["grad_out"]).contiguous()
        lse2, delta = (self.strips(residue.place[name]).flatten(1, 2)[:, None] for name in ("lse", "delta"))
        dq = q  # assigned by the first key range
        for number, key_range in enumerate(self.key_ranges):
            k, v = self.keys(residue.k, key_range), self.keys(residue.v, key_range)
            p = product_nt(k, q, tanh=run.rule.tanh)
            tile, kept = self.modified(p.view(p.shape[0], key_range.length, self.height, run.group), key_range, True)
            p = tile.reshape(p.shape).sub_(lse2)
            if run.rule.bias is not None or run.rule.arbitrary:
                p.clamp_(max=0.0)  # so large a logit that the LSE could not hold what was added to it
            p.exp2_()
            self.add_keys(dv, key_range, product(p, grad_out))
            ds = product_nt(v, grad_out).sub_(delta).mul_(p)
            tile = ds.view(tile.shape)
            if run.rule.bias is not None:
                if run.leaves:
                    self.bias_backward(key_range, tile, accumulators)
            else:
                tile, tables = run.rule.gradients(tile, kept, run.leaves)
                accumulators.add_tables(tuple(tables.get(name) for name in run.leaves))
                if run.rule.arbitrary:
                    self.fill(tile, key_range, 0.0, True)
                ds = tile.reshape(ds.shape)
            self.add_keys(dk, key_range, product(ds, q), run.call.scale / run.factor)
            part = product_tn(ds, k)
            dq = dq.add_(part) if number else part
        place = self.strips(residue.place["dq"])
        place.add_(dq.reshape(place.shape), alpha=run.call.scale)

    def add_keys(self, total: Tensor, key_range: KeyRange, grad: Tensor, factor: float = 1.0) -> None:
        """Add ``factor`` times ``(X, length, D)`` to the keys of this job; strips may share keys, and heads may."""
        start = key_range.start + self.t_low * key_range.step - self.residue.first_key
        ratio = self.residue.ratio
        if self.t_high - self.t_low == 1 and ratio == 1:
            total[self.low : self.high, start : start + key_range.length].add_(grad, alpha=factor)
            return
        for x in range(grad.shape[0]):
            head = (self.low + x if self.t_high - self.t_low == 1 else self.low) // ratio
            at = start + (0 if self.t_high - self.t_low == 1 else x * key_range.step)
            total[head, at : at + key_range.length].add_(grad[x], alpha=factor)

    def bias_backward(self, key_range: KeyRange, grad: Tensor, accumulators: GradientAccumulators) -> None:
        """Gradients of the tables that the bias reads, from those by the logits ``(X, n, m, G)``."""
        run = self.run
        env = {**self.env(key_range, 0, key_range.length, True), **run.leaves}
        with torch.enable_grad():
            value = evaluate(self.residue.bias, env, dtype=torch.float64)
            value = value.view(*(1,) * (4 - value.ndim), *value.shape)
        if value.requires_grad:
            wanted = grad.double().sum_to_size(value.shape)
            accumulators.add_tables(torch.autograd.grad(value, list(run.leaves.values()), wanted, allow_unused=True))
