"""Jobs of the ``tiled`` lowering: a strip of a residue for all heads that its logits have room for, forward and backward."""

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
from sparsedsl.tiling.cost import heads_at_once
from sparsedsl.tiling.cutting import CUTTING
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

    def jobs(self, heads: range) -> Iterator[TileJob]:
        """Everything to compute for some flat heads, in the order of the queries."""
        for series in self.plan.strided_series:
            key_ranges = series.key_ranges(CUTTING.now.keys)
            for low, high in self.head_spans(series.group, heads):
                several = heads_at_once(series.height * self.run.group, high - low)
                for turn in range(series.count):
                    for head in range(low, high, several):
                        yield TileJob(self, series, key_ranges, head, min(head + several, high), turn)


def picked(logits: Tensor, base: Tensor) -> Tensor:
    """``2**(logits - base) - 2**-base``, 0 where a logit is -inf: what a softpick weighs by where it is positive."""
    return ((logits - base).exp2_() - (-base).exp2()).masked_fill_(logits == float("-inf"), 0.0)


class TileJob:
    """Strip ``turn`` of a series for the flat heads ``low .. high - 1``, whose number is ``X``. Its rows are (query, head of the
    group)."""

    def __init__(
        self, residue: ResiduePass, series: StridedSeries, key_ranges: list[KeyRange], low: int, high: int, turn: int = 0
    ) -> None:
        self.residue, self.run, self.series, self.key_ranges = residue, residue.run, series, key_ranges
        self.low, self.high, self.turn = low, high, turn
        self.height = series.height
        self.q_start = series.q_start + turn * series.step
        self.begin = self.q_start - residue.first  # first row within the residue
        self.b: Any
        self.h: Any
        self.b, self.h = divmod(low, self.run.shared)
        if high - low > 1:
            heads = torch.arange(low, high, device=residue.q.device).view(-1, 1, 1, 1)
            self.b, self.h = heads // self.run.shared, heads % self.run.shared

    # ---- views ------------------------------------------------------------------------------------------------

    def strip(self, t: Tensor) -> Tensor:
        """``(flat heads, residue rows, ..)`` -> the rows of this job ``(X, height, ..)``."""
        return t[self.low : self.high, self.begin : self.begin + self.height]

    def rows(self, t: Tensor) -> Tensor:
        """``(X, height x group, D)`` of a residue tensor ``(flat heads, residue rows, group, D)``, in the type of arithmetic."""
        return self.strip(t).flatten(1, 2).to(self.run.dtype)

    def scaled_q(self) -> Tensor:
        """The queries times their factor."""
        return self.rows(self.residue.q) * self.run.factor

    def first_key(self, key_range: KeyRange) -> int:
        """Where a key range begins for this strip, residue coordinates."""
        return key_range.start + self.turn * key_range.step

    def keys(self, t: Tensor, key_range: KeyRange) -> Tensor:
        """``(X, length, D)`` of a residue tensor ``(flat kv heads, keys, D)``."""
        start, ratio = self.first_key(key_range) - self.residue.first_key, self.residue.ratio
        first, last = self.low // ratio, (self.high - 1) // ratio
        return self.of_heads(t[first : last + 1, start : start + key_range.length])

    def of_heads(self, part: Tensor) -> Tensor:
        """Keys of the flat kv heads that this job reads, ``(kv heads, length, D)``, for each of its heads: ``(X, length, D)``."""
        ratio = self.residue.ratio
        if ratio == 1 or self.high - self.low == 1:
            return part
        return part.index_select(0, torch.arange(self.low, self.high, device=part.device) // ratio - self.low // ratio)

    # ---- tiles of masks and biases ------------------------------------------------------------------------------

    def env(self, key_range: KeyRange, low: int, high: int, transposed: bool) -> dict[str, Any]:
        """Indices of keys ``low .. high - 1`` of a key range, residue coordinates: shapes ``(1, m, 1, n)``, or ``(1, n, m, 1)``
        transposed; heads ``(X, 1, 1, 1)`` where there are several."""
        device = self.residue.q.device
        q = self.q_start + torch.arange(self.height, device=device).view(1, -1, 1, 1)
        kv = self.first_key(key_range) + low + torch.arange(high - low, device=device).view(1, 1, 1, -1)
        if transposed:
            q, kv = q.transpose(1, 2), kv.transpose(1, 3)
        return {"b": self.b, "h": self.h, "q_idx": q, "kv_idx": kv, **self.run.call.domain.lengths, **self.run.tables}

    def place(self, expr: Any, key_range: KeyRange, low: int, high: int) -> tuple[Any, ...]:
        """What the tile of an expression depends on: equal places share a tile."""
        heads = (self.low, self.high) if tells_heads_apart(expr) else None
        q, kv = self.q_start, self.first_key(key_range) + low
        return (expr, heads, self.height, high - low, *((q - kv,) if only_difference(expr) else (q, kv)))

    def mask(self, key_range: KeyRange, low: int, high: int, residual: Any, transposed: bool) -> Tensor:
        """0 where a pair of keys ``low .. high - 1`` is allowed, -inf elsewhere, ``(X or 1, m, 1, n)`` or transposed."""

        def make() -> Tensor:
            env = self.env(key_range, low, high, transposed)
            allowed = evaluate(residual, env)
            shape = joined_shape(allowed.shape, env["q_idx"].shape, env["kv_idx"].shape)
            tile = torch.zeros(shape, dtype=self.run.dtype, device=self.residue.q.device)
            return tile.masked_fill_(~allowed.expand(shape), float("-inf"))

        place, residue = self.place(residual, key_range, low, high), self.residue.plan.residue
        return self.residue.masks.get((*place, residue, self.run.dtype, self.residue.q.device, transposed), (), make)

    def bias(self, key_range: KeyRange, transposed: bool) -> Tensor:
        """The bias in units of log2 on a whole key range, -inf where a pair is masked."""
        expr: Any = self.residue.bias

        def make() -> Tensor:
            env = self.env(key_range, 0, key_range.length, transposed)
            value = clamped(evaluate(expr, env, dtype=self.run.dtype).to(self.run.dtype))
            value = value.view(*(1,) * (4 - value.ndim), *value.shape)
            tiles = [
                (low, high, self.mask(key_range, low, high, residual, transposed)) for low, high, residual in key_range.masks
            ]
            if tiles:
                shape = joined_shape(value.shape, env["q_idx"].shape, env["kv_idx"].shape)
                several = max(shape[0], *(tile.shape[0] for _, _, tile in tiles))  # masks may differ where the bias does not
                value = value.expand(several, *shape[1:]).contiguous()
            for low, high, tile in tiles:
                part = value[:, low:high] if transposed else value[..., low:high]
                part.masked_fill_(tile.isinf(), float("-inf"))
            return value.contiguous()

        places = tuple(self.place(residual, key_range, low, high) for low, high, residual in key_range.masks)
        place, residue = self.place(expr, key_range, 0, key_range.length), self.residue.plan.residue
        key = ("bias", place, places, residue, self.run.dtype, self.residue.q.device, transposed)
        return self.residue.biases.get(key, (), make)

    # ---- forward ----------------------------------------------------------------------------------------------

    def logits(self, q: Tensor, key_range: KeyRange) -> Tensor:
        """Masked logits in units of log2, or weights, ``(X, M, n)``."""
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
            self.fill(tile, key_range, rule.masked, transposed)
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
        """Compute the strip into the residue's ``out (flat heads, rows, G, Dv)`` and ``lse (flat heads, rows, G)``, the latter in log2.

        ``merge``: with what another residue has put there.
        """
        if self.run.pointwise:
            self.store_weighed(merge)
        else:
            self.store(*self.sums(self.scaled_q()), merge)

    def store_weighed(self, merge: bool) -> None:
        """The strip where weights are taken as they are: sums of weighted values, into place."""
        q = self.scaled_q()
        value = q  # assigned by the first key range
        for number, key_range in enumerate(self.key_ranges):
            weighted = product(self.logits(q, key_range), self.keys(self.residue.v, key_range))
            value = value.add_(weighted) if number else weighted
        place = self.strip(self.residue.place["out"])
        self.strip(self.residue.place["lse"]).zero_()
        value = value.view(place.shape)
        if merge:
            place.add_(value)
        else:
            place.copy_(value)

    def sums(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``sum of 2**(logit - most) * v`` and ``sum of 2**(logit - most)`` of each row, and its largest logit ``most``.

        Of a softpick ``most`` is at least 0, and weights are ``2**(logit - most) - 2**-most``: see :func:`picked`.
        """
        total = value = most = q  # assigned by the first key range
        for number, key_range in enumerate(self.key_ranges):
            s = self.logits(q, key_range)
            highest = s.amax(-1, keepdim=True)
            if self.run.picks:
                highest.clamp_(min=0.0)
            if number == 0:
                most = highest.clamp_(min=NO_KEY * torch.finfo(s.dtype).max)
            else:
                highest = torch.maximum(highest, most)
                shrink = (most - highest).exp2_()
                total.mul_(shrink)
                value.mul_(shrink)
                most = highest
            if self.run.picks:
                s = picked(s, most)
                part = s.abs().sum(-1, keepdim=True)
                s.relu_()
            else:
                s.sub_(most).exp2_()
                part = s.sum(-1, keepdim=True)
            weighted = product(s, self.keys(self.residue.v, key_range))
            total, value = (total.add_(part), value.add_(weighted)) if number else (part, weighted)
        return value, total, most

    def store(self, value: Tensor, total: Tensor, most: Tensor, merge: bool) -> None:
        """Divide by the totals, into place; an empty row, whose total is 0, becomes 0 with LSE -inf."""
        place, place_lse = self.strip(self.residue.place["out"]), self.strip(self.residue.place["lse"])
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
        place_most, place = self.strip(self.residue.place["most"]), self.strip(self.residue.place["total"])
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
        lse2, delta = (self.strip(residue.place[name]).flatten(1, 2)[:, None] for name in ("lse", "delta"))
        dq = q  # assigned by the first key range
        for number, key_range in enumerate(self.key_ranges):
            k, v = self.keys(residue.k, key_range), self.keys(residue.v, key_range)
            p = product_nt(k, q, tanh=run.rule.tanh)
            tile, kept = self.modified(p.view(p.shape[0], key_range.length, self.height, run.group), key_range, True)
            p, more = tile.reshape(p.shape), None
            if run.picks:
                more = picked(p, lse2)
                p = p.sub_(lse2).exp2_()
            elif not run.pointwise:
                p.sub_(lse2)
                if run.rule.bias is not None or run.rule.arbitrary:
                    p.clamp_(max=0.0)  # so large a logit that the LSE could not hold what was added to it
                p.exp2_()
            self.add_keys(dv, key_range, product(p if more is None else more.relu(), grad_out))
            ds = product_nt(v, grad_out)
            if run.pointwise:
                self.fill(ds.view(tile.shape), key_range, 0.0, True)
            elif more is not None:
                ds = ds.masked_fill_(more <= 0, 0.0).sub_(more.sign_().mul_(delta)).mul_(p)
            else:
                ds.sub_(delta).mul_(p)
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
        place = self.strip(residue.place["dq"])
        place.add_(dq.reshape(place.shape), alpha=run.call.scale)

    def add_keys(self, total: Tensor, key_range: KeyRange, grad: Tensor, factor: float = 1.0) -> None:
        """Add ``factor`` times ``(X, length, D)`` to the keys of this job, which heads may share."""
        start, ratio = self.first_key(key_range) - self.residue.first_key, self.residue.ratio
        if ratio == 1:
            total[self.low : self.high, start : start + key_range.length].add_(grad, alpha=factor)
            return
        for x in range(grad.shape[0]):
            total[(self.low + x) // ratio, start : start + key_range.length].add_(grad[x], alpha=factor)

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
