"""Units of work of the ``tiled`` lowering: the strips of a lane, one product or a batch of small ones at a time, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.clauses import only_difference
from sparsedsl.backends.tiled.operands import Gains, Operands
from sparsedsl.backends.tiled.score_rules import clamped
from sparsedsl.lang.shapes import joined_shape
from sparsedsl.lang.steps import evaluate
from sparsedsl.lang.symbols import BATCH, HEAD
from sparsedsl.lang.tables import table_reads
from sparsedsl.runtime.gemm import product, product_nt, product_tn, single, single_nt
from sparsedsl.tiling.cost import chunk_keys, strips_at_once
from sparsedsl.tiling.schedule import Family, LanePlan, Segment

__all__ = ["Lane", "Unit"]

Tensor = torch.Tensor
# Stands in for the maximum of a row that has no key yet, as a part of the largest number: no logit is lower, and -inf minus it stays
# -inf.
NO_KEY = -0.75
# Less than any total that is not 0.
TINY = 1e-30
# Totals of 2**logit between these have all their digits, and so have the products with v unless v is below 1e-25.
SAFE_TOTAL = (2.0**-40, 2.0**90)
# Bytes of biases kept during one pass, where they are new with every pass.
KEPT_BYTES = 64 << 20


@functools.lru_cache(maxsize=1024)
def tells_heads_apart(expr: Any) -> bool:
    """Whether an expression reads ``b`` or ``h``."""
    return bool(expr.free_symbols & {BATCH, HEAD})


@functools.lru_cache(maxsize=4096)
def _cut(family: Family, rows: int) -> tuple[list[Segment], int]:
    """The segments of a strip of so many rows, and how many strips are taken at once."""
    segments = family.segments(chunk_keys(rows))
    return segments, strips_at_once(rows, max(segment.length for segment in segments))


class Lane:
    """One lane of a pass: views of the operands in lane coordinates, and its units of work."""

    def __init__(self, run: Operands, plan: LanePlan) -> None:
        self.run, self.plan, lane = run, plan, plan.lane
        self.first = plan.first
        begin = plan.first * lane.q_step + lane.q_start - run.call.domain.q_offset
        self.rows = slice(begin, begin + (plan.rows - 1) * lane.q_step + 1, lane.q_step)
        self.first_key, last = plan.keys
        self.keys = slice(
            self.first_key * lane.kv_step + lane.kv_start, (last - 1) * lane.kv_step + lane.kv_start + 1, lane.kv_step
        )
        self.q = run.q[:, :, self.rows].flatten(0, 1)
        # Keys in steps are copied once a lane: all copies together are one copy of k and v.
        self.k, self.v = run.keys(self.keys)
        # Strips are made for so many heads a key/value head.
        self.ratio = run.shared * run.batch // self.k.shape[0]
        # Masks that all strips of a family share, found again without asking what they depend on.
        self.known: dict[tuple[Any, ...], Tensor] = {}
        # What units write to or read beside q, k and v, by name: (flat heads, lane rows, ..).
        self.place = {name: t.flatten(0, 1)[:, self.rows] for name, t in run.by_row.items()}
        self.bias = None if run.rule.bias is None else lane.inside(run.rule.bias)
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
        # A scattered lane may tell fewer heads apart than the whole mask does.
        group_batch, group_heads = run.schedule.groups if self.plan.lists is None else self.plan.lists.shape[:2]
        b, h = divmod(group, group_heads)
        batches = range(run.batch) if group_batch == 1 else range(b, b + 1)
        if group_heads == 1:
            yield batches.start * run.shared, batches.stop * run.shared
            return
        for batch in batches:
            yield batch * run.shared + h, batch * run.shared + h + 1

    def units(self, heads: range, most_heads: int) -> Iterator[Unit]:
        """Everything to compute for some flat heads, head by head, in the order of the queries; at most ``most_heads`` at once."""
        for number, family in enumerate(self.plan.families):
            rows = family.height * self.run.group
            segments, at_once = _cut(family, rows)
            for low, high in self.head_spans(family.group, heads):
                if at_once == 1 or (family.count > 1 and family.count >= high - low):
                    for head in range(low, high):
                        for t in range(0, family.count, at_once):
                            yield Unit(self, number, family, segments, head, head + 1, t, min(t + at_once, family.count))
                else:
                    several = min(at_once, most_heads)
                    for t in range(family.count):
                        for head in range(low, high, several):
                            yield Unit(self, number, family, segments, head, min(head + several, high), t, t + 1)


def is_safe(value: Tensor, total: Tensor) -> bool:
    """Whether sums without the maximum have all their digits, in every row."""
    ends = torch.aminmax(total)
    low, high = float(ends[0]), float(ends[1])
    return low >= SAFE_TOTAL[0] and high <= SAFE_TOTAL[1] and (high <= 2.0**50 or bool(value.sum().isfinite()))


class Unit:
    """Strips ``t_low .. t_high - 1`` of a family for flat heads ``low .. high - 1``: several strips of one head, or one strip of several.

    ``X`` is their number. Rows of a strip are (query, head of the group).
    """

    def __init__(
        self, lane: Lane, number: int, family: Family, segments: list[Segment], low: int, high: int, t_low: int, t_high: int
    ) -> None:
        self.lane, self.run, self.number, self.family, self.segments = lane, lane.run, number, family, segments
        self.low, self.high, self.t_low, self.t_high = low, high, t_low, t_high
        self.count = max(high - low, t_high - t_low)
        self.height = family.height
        self.begin = family.q_start + t_low * family.step - lane.first  # first row within the lane
        self.b: Any
        self.h: Any
        self.b, self.h = divmod(low, self.run.shared)
        if high - low > 1:
            heads = torch.arange(low, high, device=lane.q.device).view(-1, 1, 1, 1)
            self.b, self.h = heads // self.run.shared, heads % self.run.shared

    # ---- views ------------------------------------------------------------------------------------------------

    def strips(self, t: Tensor) -> Tensor:
        """``(flat heads, lane rows, ..)`` -> the rows of this unit ``(X, height, ..)``; strips must follow each other or be one."""
        if self.t_high - self.t_low == 1:
            return t[self.low : self.high, self.begin : self.begin + self.height]
        row = t.stride(1)
        base = t[self.low, self.begin :]
        return base.as_strided((self.count, self.height, *t.shape[2:]), (self.family.step * row, row, *t.stride()[2:]))

    def rows(self, t: Tensor) -> Tensor:
        """``(X, height x group, D)`` of a lane tensor ``(flat heads, lane rows, group, D)``, in the type of arithmetic."""
        return self.strips(t).flatten(1, 2).to(self.run.dtype)

    def scaled_q(self) -> Tensor:
        """The queries times their factor."""
        return self.rows(self.lane.q) * self.run.factor

    def key_rows(self, t: Tensor, segment: Segment) -> Tensor:
        """``(length, D)`` of a lane tensor ``(flat kv heads, keys, D)``, of a unit that is a single strip of a single head."""
        start = segment.start + self.t_low * segment.step - self.lane.first_key
        return t[self.low // self.lane.ratio, start : start + segment.length]

    def keys(self, t: Tensor, segment: Segment) -> Tensor:
        """``(X, length, D)`` of a lane tensor ``(flat kv heads, keys, D)``."""
        start = segment.start + self.t_low * segment.step - self.lane.first_key
        ratio = self.lane.ratio
        if self.t_high - self.t_low == 1:
            first, last = self.low // ratio, (self.high - 1) // ratio
            part = t[first : last + 1, start : start + segment.length]
            if ratio == 1 or self.high - self.low == 1:
                return part
            heads = torch.arange(self.low, self.high, device=t.device) // ratio - first
            return part.index_select(0, heads)
        base = t[self.low // ratio, start:]
        return base.as_strided((self.count, segment.length, t.shape[2]), (segment.step * t.stride(1), t.stride(1), 1))

    # ---- tiles of masks and biases ------------------------------------------------------------------------------

    def env(self, segment: Segment, low: int, high: int, transposed: bool) -> dict[str, Any]:
        """Indices of keys ``low .. high - 1`` of a segment, lane coordinates: shapes ``(X, m, 1, n)``, or ``(X, n, m, 1)`` transposed."""
        device = self.lane.q.device
        turn = torch.arange(self.t_low, self.t_high, device=device).view(-1, 1, 1, 1)
        q = self.family.q_start + turn * self.family.step + torch.arange(self.height, device=device).view(1, -1, 1, 1)
        kv = segment.start + low + turn * segment.step + torch.arange(high - low, device=device)
        if transposed:
            q, kv = q.transpose(1, 2), kv.transpose(1, 3)
        return {"b": self.b, "h": self.h, "q_idx": q, "kv_idx": kv, **self.run.call.domain.lengths, **self.run.tables}

    def place(self, expr: Any, segment: Segment, low: int, high: int) -> tuple[bool, tuple[Any, ...]]:
        """Whether ``expr`` is the same for all strips of the unit, and what its tile depends on: equal places share a tile."""
        shared = self.t_high - self.t_low == 1 or segment.step == self.family.step
        heads = (self.low, self.high) if tells_heads_apart(expr) else None
        size = (self.height, high - low)
        q = self.family.q_start + self.t_low * self.family.step
        kv = segment.start + self.t_low * segment.step + low
        if shared and only_difference(expr):
            return True, (expr, heads, size, q - kv)
        turns = None if self.t_high - self.t_low == 1 else (self.t_high - self.t_low, self.family.step, segment.step)
        return False, (expr, heads, size, q, kv, turns)

    def tile_env(self, shared: bool, segment: Segment, low: int, high: int, transposed: bool) -> dict[str, Any]:
        """:meth:`env`, of the first strip only where the others are like it."""
        env = self.env(segment, low, high, transposed)
        return {**env, "q_idx": env["q_idx"][:1], "kv_idx": env["kv_idx"][:1]} if shared else env

    def mask(self, segment: Segment, low: int, high: int, residual: Any, transposed: bool) -> Tensor:
        """0 where a pair of keys ``low .. high - 1`` is allowed, -inf elsewhere, ``(X or 1, m, 1, n)`` or transposed."""
        quick = (self.number, segment.start, low, high, transposed)
        known = self.lane.known.get(quick)
        if known is not None:
            return known
        shared, place = self.place(residual, segment, low, high)

        def make() -> Tensor:
            env = self.tile_env(shared, segment, low, high, transposed)
            allowed = evaluate(residual, env)
            shape = joined_shape(allowed.shape, env["q_idx"].shape, env["kv_idx"].shape)
            tile = torch.zeros(shape, dtype=self.run.dtype, device=self.lane.q.device)
            return tile.masked_fill_(~allowed.expand(shape), float("-inf"))

        tile = self.lane.masks.get((*place, self.lane.plan.lane, self.run.dtype, self.lane.q.device, transposed), (), make)
        if self.family.count > 1 and segment.step == self.family.step and shared and not tells_heads_apart(residual):
            self.lane.known[quick] = tile
        return tile

    def bias(self, segment: Segment, transposed: bool) -> Tensor:
        """The bias in units of log2 on a whole segment, -inf where a pair is masked."""
        expr: Any = self.lane.bias
        shared, place = self.place(expr, segment, 0, segment.length)
        masks = [(low, high, residual, self.place(residual, segment, low, high)) for low, high, residual in segment.masks]
        shared = shared and all(m[3][0] for m in masks)
        if not shared:
            place = (place, self.t_low, self.t_high, self.number)

        def make() -> Tensor:
            env = self.tile_env(shared, segment, 0, segment.length, transposed)
            value = clamped(evaluate(expr, env, dtype=self.run.dtype).to(self.run.dtype))
            value = value.view(*(1,) * (4 - value.ndim), *value.shape)
            tiles = [(low, high, self.mask(segment, low, high, residual, transposed)) for low, high, residual, _ in masks]
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
            self.lane.q.device,
            self.lane.plan.lane,
            transposed,
        )
        return self.lane.biases.get((*key[:2], tuple(key[2]), *key[3:]), (), make)

    # ---- forward ----------------------------------------------------------------------------------------------

    def logits(self, q: Tensor, segment: Segment) -> Tensor:
        """Masked logits in units of log2, ``(X, M, n)``."""
        s = product_nt(q, self.keys(self.lane.k, segment), tanh=self.run.rule.tanh)
        tile, _ = self.modified(s.view(s.shape[0], self.height, self.run.group, segment.length), segment, False)
        return tile.reshape(s.shape)

    def modified(self, tile: Tensor, segment: Segment, transposed: bool) -> tuple[Tensor, Any]:
        """Score rule and mask on a tile of products ``(X, m, G, n)``, or ``(X, n, m, G)`` transposed: in place where possible.

        Transposed tiles are those of the backward pass: with what the rule keeps for it. A score may be anything where a pair is masked,
        so what is not plain is overwritten there, not added to.
        """
        rule, kept = self.run.rule, None
        if rule.bias is not None:
            return tile.add_(self.bias(segment, transposed)), None
        if rule.arbitrary:
            self.fill(tile, segment, 1.0, transposed)
        env = self.score_env(segment, transposed) if rule.arbitrary else {}
        if transposed:
            tile, kept = rule.logits_kept(tile, env, self.run.leaves)
        else:
            tile = rule.logits(tile, env)
        if rule.arbitrary:
            self.fill(tile, segment, float("-inf"), transposed)
            return tile, kept
        for low, high, residual in segment.masks:
            place = tile[:, low:high] if transposed else tile[..., low:high]
            place.add_(self.mask(segment, low, high, residual, transposed))
        return tile, kept

    def fill(self, tile: Tensor, segment: Segment, value: float, transposed: bool) -> None:
        """Overwrite the masked pairs of a tile."""
        for low, high, residual in segment.masks:
            place = tile[:, low:high] if transposed else tile[..., low:high]
            place.masked_fill_(self.mask(segment, low, high, residual, transposed).isinf(), value)

    def score_env(self, segment: Segment, transposed: bool) -> dict[str, Any]:
        """Positions, as score expressions read them."""
        env, lane = self.env(segment, 0, segment.length, transposed), self.lane.plan.lane
        env["q_idx"] = env["q_idx"] * lane.q_step + lane.q_start
        env["kv_idx"] = env["kv_idx"] * lane.kv_step + lane.kv_start
        return env

    def forward(self, *, merge: bool) -> None:
        """Compute the strips into the lane's ``out (flat heads, rows, G, Dv)`` and ``lse (flat heads, rows, G)``, the latter in log2.

        First without the maximum of each row, which saves two of four passes over the logits. Rows whose total shows that they needed it
        are computed again with it; each row by itself, so that no row's digits depend on what other rows hold. ``merge``: with what
        another lane has put there.
        """
        if self.count == 1 and not merge and self.lane.q.device.type == "cpu" and self._forward_alone():
            return
        q = self.scaled_q()
        most: Tensor | None = None
        if q.device.type != "cpu":  # where looking at the totals would mean to wait for them
            value, total, most = self.sums(q, True)
        else:
            value, total, _ = self.sums(q, False)
            if not is_safe(value, total):
                again, total_again, most = self.sums(q, True)
                needed = ~((total >= SAFE_TOTAL[0]) & (total <= SAFE_TOTAL[1]) & value.isfinite().all(-1, keepdim=True))
                value = torch.where(needed, again, value)
                total = torch.where(needed, total_again, total)
                most = torch.where(needed, most, 0.0) if most is not None else None
        self.store(value, total, most, merge)

    def _forward_alone(self) -> bool:
        """:meth:`forward` of one strip of one head without the maximum, in as few operations as there can be: threads take turns at
        calling torch. False, with nothing written, if some row needs its maximum."""
        lane, run, rows = self.lane, self.run, slice(self.begin, self.begin + self.height)
        q = lane.q[self.low, rows]
        q = (q[:, 0] if run.group == 1 else q.flatten(0, 1)).to(run.dtype) * run.factor
        total = value = q  # assigned by the first segment
        plain = run.rule.bias is None and not run.rule.arbitrary and not run.rule.tanh  # the products are the logits
        for number, segment in enumerate(self.segments):
            s = single_nt(q, self.key_rows(lane.k, segment), tanh=run.rule.tanh)
            if segment.masks or not plain:
                tile, _ = self.modified(s.view(1, self.height, run.group, segment.length), segment, False)
                s = tile.reshape(s.shape)
            s.exp2_()
            part, weighted = s.sum(1), single(s, self.key_rows(lane.v, segment))
            total, value = (total.add_(part), value.add_(weighted)) if number else (part, weighted)
        if not is_safe(value, total):
            return False
        place, place_lse = lane.place["out"][self.low, rows], lane.place["lse"][self.low, rows]
        total = total.view(place_lse.shape)
        torch.div(value.view(place.shape), total[..., None], out=place)
        torch.log2(total, out=place_lse)
        return True

    def sums(self, q: Tensor, shifted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """``sum of 2**(logit - most) * v`` and ``sum of 2**(logit - most)`` of each row, and its largest logit ``most`` (None: 0)."""
        most: Tensor | None = None
        total = value = q  # assigned by the first segment
        for number, segment in enumerate(self.segments):
            s = self.logits(q, segment)
            if shifted:
                highest = s.amax(-1, keepdim=True)
                if most is None:
                    most = highest.clamp_(min=NO_KEY * torch.finfo(s.dtype).max)
                else:
                    highest = torch.maximum(highest, most)
                    shrink = (most - highest).exp2_()
                    total.mul_(shrink)
                    value.mul_(shrink)
                    most = highest
                s.sub_(most)
            s.exp2_()
            part, weighted = s.sum(-1, keepdim=True), product(s, self.keys(self.lane.v, segment))
            total, value = (total.add_(part), value.add_(weighted)) if number else (part, weighted)
        return value, total, most

    def store(self, value: Tensor, total: Tensor, most: Tensor | None, merge: bool) -> None:
        """Divide by the totals, into place; an empty row, whose total is 0, becomes 0 with LSE -inf."""
        place, place_lse = self.strips(self.lane.place["out"]), self.strips(self.lane.place["lse"])
        value, total = value.view(place.shape), total.view(*place_lse.shape)
        found = total.log2()
        if most is not None:
            found.add_(most.view(found.shape))
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
        """Join this unit's largest logits and sums relative to them with those in the lane's ``most`` and ``total``."""
        _, total, most = self.sums(self.scaled_q(), True)
        assert most is not None
        place_most, place = self.strips(self.lane.place["most"]), self.strips(self.lane.place["total"])
        most, total = most.view(place.shape), total.view(place.shape)
        larger = torch.maximum(place_most, most)
        place.mul_((place_most - larger).exp2_()).add_(total.mul_((most - larger).exp2_()))
        place_most.copy_(larger)

    def backward(self, gains: Gains) -> None:
        """Add this unit's gradients to the lane's ``dq`` and to ``gains``.

        Tiles are (keys, rows) here: four of the five products then read rows as they lie.
        """
        run, lane = self.run, self.lane
        dk, dv = gains.of(lane, lane.keys)
        q = self.scaled_q()
        grad_out = self.rows(lane.place["grad_out"]).contiguous()
        lse2, delta = (self.strips(lane.place[name]).flatten(1, 2)[:, None] for name in ("lse", "delta"))
        dq = q  # assigned by the first segment
        for number, segment in enumerate(self.segments):
            k, v = self.keys(lane.k, segment), self.keys(lane.v, segment)
            p = product_nt(k, q, tanh=run.rule.tanh)
            tile, kept = self.modified(p.view(p.shape[0], segment.length, self.height, run.group), segment, True)
            p = tile.reshape(p.shape).sub_(lse2)
            if run.rule.bias is not None or run.rule.arbitrary:
                p.clamp_(max=0.0)  # so large a logit that the LSE could not hold what was added to it
            p.exp2_()
            self.add_keys(dv, segment, product(p, grad_out))
            ds = product_nt(v, grad_out).sub_(delta).mul_(p)
            tile = ds.view(tile.shape)
            if run.rule.bias is not None:
                if run.leaves:
                    self.bias_backward(segment, tile, gains)
            else:
                tile, tables = run.rule.gradients(tile, kept, run.leaves)
                gains.add_tables(tuple(tables.get(name) for name in run.leaves))
                if run.rule.arbitrary:
                    self.fill(tile, segment, 0.0, True)
                ds = tile.reshape(ds.shape)
            self.add_keys(dk, segment, product(ds, q), run.call.scale / run.factor)
            part = product_tn(ds, k)
            dq = dq.add_(part) if number else part
        place = self.strips(lane.place["dq"])
        place.add_(dq.reshape(place.shape), alpha=run.call.scale)

    def add_keys(self, total: Tensor, segment: Segment, grad: Tensor, factor: float = 1.0) -> None:
        """Add ``factor`` times ``(X, length, D)`` to the keys of this unit; strips may share keys, and heads may."""
        start = segment.start + self.t_low * segment.step - self.lane.first_key
        ratio = self.lane.ratio
        if self.t_high - self.t_low == 1 and ratio == 1:
            total[self.low : self.high, start : start + segment.length].add_(grad, alpha=factor)
            return
        for x in range(grad.shape[0]):
            head = (self.low + x if self.t_high - self.t_low == 1 else self.low) // ratio
            at = start + (0 if self.t_high - self.t_low == 1 else x * segment.step)
            total[head, at : at + segment.length].add_(grad[x], alpha=factor)

    def bias_backward(self, segment: Segment, grad: Tensor, gains: Gains) -> None:
        """Gradients of the tables that the bias reads, from those by the logits ``(X, n, m, G)``."""
        run = self.run
        env = {**self.env(segment, 0, segment.length, True), **run.leaves}
        with torch.enable_grad():
            value = evaluate(self.lane.bias, env, dtype=torch.float64)
            value = value.view(*(1,) * (4 - value.ndim), *value.shape)
        if value.requires_grad:
            wanted = grad.double().sum_to_size(value.shape)
            gains.add_tables(torch.autograd.grad(value, list(run.leaves.values()), wanted, allow_unused=True))
