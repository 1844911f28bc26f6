"""The fast way of every node: scores stay sources that give blocks, choices come out as lists, and attention follows the lists."""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatchmethod
from typing import Any

import sympy
import torch

from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.pattern import Pattern, attend
from sparsedsl.lang.symbols import SCORE
from sparsedsl.program.axes import unit_of
from sparsedsl.program.branches import Attend, Compact, Joint, Linear, Recall, assume
from sparsedsl.program.node import Node
from sparsedsl.program.orders import Inverse, Order, Tokens
from sparsedsl.program.scores import (
    Antidiagonal,
    Bound,
    Dot,
    Grouped,
    Gumbel,
    Plus,
    Probe,
    Regroup,
    Smooth,
    Softmax,
)
from sparsedsl.program.select import Select, Threshold, TopK, TopP
from sparsedsl.program.tensors import Summary
from sparsedsl.run.choosing import counts, orders, proxies
from sparsedsl.run.choosing.antidiagonal import antidiagonal
from sparsedsl.run.choosing.at_picks import picked_scores
from sparsedsl.run.choosing.candidates import Candidates, PairRule
from sparsedsl.run.choosing.composed_scores import BoundScores, GroupedScores, SumScores
from sparsedsl.run.choosing.derived import RegroupedScores, softmax_scores
from sparsedsl.run.choosing.mass_rules import threshold, top_p
from sparsedsl.run.choosing.rules import top_k
from sparsedsl.run.choosing.scores import DotScores, ScoreSource
from sparsedsl.run.choosing.weights import weights_of
from sparsedsl.run.differentiable import differentiable
from sparsedsl.run.inputs import check_call
from sparsedsl.run.picked.picks import Picks
from sparsedsl.run.programs.block_choices import WholeTiles, split, whole_tiles
from sparsedsl.run.programs.call import ProgramCall
from sparsedsl.run.programs.candidates import candidates_of, unit_rule
from sparsedsl.run.programs.kernels import Kernels
from sparsedsl.run.programs.reference import Reference, merged, spread
from sparsedsl.run.sinks import sink_logit

__all__ = ["Lowered"]

Tensor = torch.Tensor
NEVER = float("-inf")
# Tokens in the smallest tile that is worth a product of its own.
SMALLEST_TILE = 16


class Lowered(Reference):
    """One evaluation by ``kernels``. What the reference says of tensors, sums and mixes holds; the rest is written here anew."""

    def __init__(self, call: ProgramCall, kernels: Kernels, *, lse: bool):
        super().__init__(call)
        self.kernels = kernels
        root = call.program.root
        # Branches whose LSE somebody reads: FlexAttention has none on CPU, and the others save the work.
        self.weighed = {branch for node in call.program.order if isinstance(node, Joint) for branch in node.branches}
        self.weighed |= {root} if lse else set()

    @singledispatchmethod
    def run(self, node: Any) -> Any:
        """The value of one node from those of its inputs."""
        return super().run(node)

    # ---- tensors ------------------------------------------------------------------------------------------------------

    def as_given(self, x: Tensor) -> Tensor:
        """Inputs keep their type: half precision is cast piece by piece, where it is used."""
        return x

    @run.register
    def _summary(self, node: Summary) -> Tensor:
        return proxies.pooled(self.value(node.x), node.unit, node.how, node.pad)

    # ---- scores, as sources -------------------------------------------------------------------------------------------

    @run.register
    def _dot(self, node: Dot) -> ScoreSource:
        x, y = self.value(node.x), self.value(node.y)
        return DotScores(*_alike(x, y), self._scale(node.scale, x))

    @run.register
    def _bound(self, node: Bound) -> ScoreSource:
        x, y = self.value(node.x), self.value(node.y)
        return BoundScores(x, *proxies.bounds(y, node.unit), self._scale(node.scale, x))

    @run.register
    def _antidiagonal(self, node: Antidiagonal) -> ScoreSource:
        self._check_aligned(node.block, "antidiagonal()")
        x, y = self.value(node.x), self.value(node.y)
        return antidiagonal(x, y, stride=node.stride, block=node.block, q_offset=self.domain.q_offset)

    @run.register
    def _softmax(self, node: Softmax) -> ScoreSource:
        source = self.value(node.scores)
        return softmax_scores(source, self._allowed(node.among, node, source))

    @run.register
    def _regroup(self, node: Regroup) -> ScoreSource:
        return RegroupedScores(self.value(node.scores), node.unit, node.how)

    @run.register
    def _plus(self, node: Plus) -> ScoreSource:
        return SumScores((self.value(node.first), self.value(node.second)))

    @run.register
    def _gumbel(self, node: Gumbel) -> ScoreSource:
        source = self.value(node.scores)
        return SumScores((source, self.noise(node, source.shape)))

    @run.register
    def _grouped(self, node: Grouped) -> ScoreSource:
        return GroupedScores(self.value(node.x), self.call.k.shape[1] if node.heads == "kv_heads" else 1, node.how)  # type: ignore[arg-type]

    # ---- key scores, orders and subsets ---------------------------------------------------------------------------------

    @run.register
    def _probe(self, node: Probe) -> Tensor:
        x, y = self.value(node.x), self.value(node.y)
        keys, rows = y.shape[2], min(node.rows, x.shape[2])
        normalised = keys // node.complete * node.complete
        kept = min(self.domain.q_offset + x.shape[2] - rows, normalised) if node.keep == "before" else normalised
        scale = self._scale(node.scale, x)
        mass = proxies.probe(
            x, y, rows=rows, causal=node.causal, scale=scale, keys_normalised=normalised, keys_kept=kept,
            q_offset=self.domain.q_offset,
        )  # fmt: skip
        return torch.nn.functional.pad(mass, (0, keys - kept))

    @run.register
    def _smooth(self, node: Smooth) -> Tensor:
        x = self.value(node.x)
        kept = x.shape[2] - (self._probing(node) if self._before(node) else 0)
        return torch.nn.functional.pad(proxies.smooth(x[:, :, :kept], node.pool), (0, x.shape[2] - kept))

    @run.register
    def _order(self, node: Order) -> Tensor:
        return orders.segment_sort(self.value(node.scores), node.segment, descending=node.descending)

    @run.register
    def _inverse(self, node: Inverse) -> Tensor:
        return orders.inverse(self.value(node.order))

    @run.register
    def _tokens(self, node: Tokens) -> list[Tensor]:
        scores, by, heads = self.value(node.scores), self.value(node.by)[:, 0], self.call.q.shape[1]
        self._check_square("keep_tokens()")
        total = scores.shape[2]
        before = max(total - node.always, 0)
        if node.tail is not None:
            count = counts.tail_count(by[:, :before], node.tail, min(node.least, before))
        else:
            count = counts.cover_count(by[:, :before], node.cover, least=min(node.least, before))  # type: ignore[arg-type]
        kept, sizes = orders.keep_tokens(scores[:, :, :before], count, always=total - before, total=total)
        # Programs on the kept tokens need their number: the one place where a GPU is waited for.
        return [spread(index[:, :size], heads, dim=0) for index, size in zip(kept, sizes.tolist(), strict=True)]

    # ---- choices, as lists ------------------------------------------------------------------------------------------------

    def _allowed(self, mask: Mask, node: Any, source: ScoreSource) -> Candidates:
        rows, columns = unit_of(node.axes[2]), unit_of(node.axes[3])
        self._check_aligned(rows, f"{node.function}()")
        return candidates_of(mask.expr, self.domain, rows, columns, source.shape[1], self.call.q.device)

    def _forced(self, node: Any, candidates: Candidates, source: ScoreSource) -> PairRule | None:
        if node.forced is None:
            return None
        expr, tables = self.concrete(node.forced)
        rule = unit_rule(
            expr, self.domain, unit_of(node.axes[2]), unit_of(node.axes[3]), source.shape[1], tables, self.call.q.device
        )
        if candidates.allowed is None:
            return rule
        allowed = candidates.allowed
        return lambda rows, units: rule(rows, units) & allowed(rows, units)

    def _choose(self, node: Any, choose: Any, *numbers: Any, **words: Any) -> Picks:
        source = self.value(node.scores)
        candidates = Candidates() if node.among is None else self._allowed(node.among, node, source)
        q_unit, kv_unit = node.units
        forced = self._forced(node, candidates, source)
        picks = choose(
            source,
            *numbers,
            candidates,
            forced=forced,
            q_unit=q_unit,
            kv_unit=kv_unit,
            first=self.domain.q_offset // q_unit,
            **words,
        )
        return replace(picks, units=-(-self.domain.kv_len // kv_unit))

    @run.register
    def _top_k(self, node: TopK) -> Picks:
        source = self.value(node.scores)
        extra = source.shape[3] if node.extra and node.forced is not None else None
        return self._choose(node, top_k, node.count, forced_extra=extra)

    @run.register
    def _top_p(self, node: TopP) -> Picks:
        measure = "share" if node.scores.is_mass else "softmax"
        words = {"inclusive": node.inclusive, "unmet": node.unmet, "forced_in_mass": node.forced_in_mass}
        return self._choose(node, top_p, node.share, measure=measure, **words)

    @run.register
    def _threshold(self, node: Threshold) -> Picks:
        return self._choose(node, threshold, node.least, measure="share" if node.scores.is_mass else "score")

    # ---- attention ----------------------------------------------------------------------------------------------------------

    def table(self, node: Node) -> Tensor:
        """What a node gives, as a table ``(B, H, ..)`` that masks and scores read."""
        value = self.value(node)
        if isinstance(value, Picks):
            value = value.table()
        elif isinstance(value, ScoreSource):
            rows, units = value.shape[2:]
            if unit_of(node.axes[2]) == 1 and rows * units > self.kernels.most_table_entries:  # type: ignore[attr-defined]
                raise UnsupportedError(
                    f"{node!r} is read as a table inside of a score: {rows} queries x {units} units would have to be held. "
                    "Use larger units, or backend='reference', which holds them"
                )
            value = value.scores()
            value = torch.nn.functional.pad(value, (0, -(-self.domain.kv_len // unit_of(node.axes[3])) - units), value=NEVER)
        return spread(value, self.domain.heads)

    @run.register
    def _attend(self, node: Attend) -> tuple[Tensor, Tensor]:
        q, k, v = (self.value(x) for x in (node.x, node.y, node.z))
        if q.shape[1] % k.shape[1]:
            raise ShapeError(f"attend(): {q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
        choices = [s for s in node.selections if s.units[0] == 1]
        if node.normaliser is not None:
            return self._per_chunk_of_picks(node, q, k, v)
        if not choices or self.kernels.whole_tables:
            return self._by_tables(node, q, k, v)
        return self._by_lists(node, choices, q, k, v)

    def _by_tables(self, node: Attend, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Choices for blocks of queries, and orders, as tables of an ordinary pattern."""
        parts = [self.concrete(node.pattern.mask), self.concrete(node.pattern.score)]
        mask, score = (type(whole)(expr) for whole, (expr, _) in zip((node.pattern.mask, node.pattern.score), parts, strict=True))
        pattern, tables = Pattern(mask, score, node.pattern.sink, node.pattern.scale), parts[0][1] | parts[1][1]
        units = {choice.units for choice in node.selections}
        if self.kernels.whole_tiles and len(units) == 1:
            found = self._by_blocks(pattern, *units.pop(), q, k, v, tables)
            if found is not None:
                return found
        return self._static(node, pattern, q, k, v, tables)

    def _by_blocks(
        self, pattern: Pattern, q_unit: int, kv_unit: int, q: Tensor, k: Tensor, v: Tensor, tables: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """What is the same for all pairs of two blocks as full tiles, the rest as an ordinary mask, one softmax over both."""
        parts = split(pattern.mask.expr, q_unit, kv_unit)
        if parts is None or min(q_unit, kv_unit) < SMALLEST_TILE:
            return None
        whole = Pattern(Mask(parts[0]), pattern.score, None, pattern.scale)
        given = {name: tables[name] if name in tables else self.call.tables[name] for name in pattern.tables}
        domain = replace(self.domain, tables={name: given[name] for name in whole.tables})
        rule = unit_rule(parts[0], domain, q_unit, kv_unit, self.domain.heads, {}, q.device)
        lists = whole_tiles(rule, domain, self.domain.heads, q_unit, kv_unit)
        call = check_call(whole, q, k, v, domain.tables, q_offset=self.domain.q_offset, scale=self.call.scale)
        found: list[Any] = [differentiable(WholeTiles(whole, lists), call)]
        if parts[1] != sympy.false or pattern.sink is not None:
            rest = Pattern(Mask(parts[1]), pattern.score, pattern.sink, pattern.scale)
            own = {name: given[name] for name in rest.tables}
            found.append(self.kernels.attend(rest, q, k, v, own, q_offset=self.domain.q_offset, scale=self.call.scale, lse=True))
        return found[0] if len(found) == 1 else merged(found)

    def _static(
        self, node: Attend, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, tables: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        given = {name: tables[name] if name in tables else self.call.tables[name] for name in pattern.tables}
        wanted = node in self.weighed
        return self.kernels.attend(pattern, q, k, v, given, q_offset=self.domain.q_offset, scale=self.call.scale, lse=wanted)

    def _by_lists(self, node: Attend, choices: list[Select], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Choices for single queries: what attends in any case by itself, what a choice adds along its lists, one softmax over both."""
        mask, score = node.pattern.mask, node.pattern.score
        dynamic = [name for name, bound in mask.bound.items() if isinstance(bound, Node)]
        if len(dynamic) > 1 or score.expr != SCORE:
            what = (
                f"a mask with {len(dynamic)} choices"
                if len(dynamic) > 1
                else "a modified score beside a choice for single queries"
            )
            raise UnsupportedError(
                f"backend {self.kernels.backend!r} has no lists for {what}: {node.pattern.text.splitlines()[-1]}. Write one branch for each "
                "choice and put them together with joint(), or use backend='reference' or 'flex'"
            )
        always = Mask(assume(mask.expr, {dynamic[0]: False}))
        added = sympy.And(assume(mask.expr, {dynamic[0]: True}), sympy.Not(always.expr))
        parts: list[Any] = []
        if always.expr != sympy.false:
            plain = Pattern(always, score, None, node.pattern.scale)
            given = {name: self.call.tables[name] for name in plain.tables}
            parts.append(
                self.kernels.attend(plain, q, k, v, given, q_offset=self.domain.q_offset, scale=self.call.scale, lse=True)
            )
        parts.append(self._picked(node, choices[0], q, k, v, added))
        if node.pattern.sink is not None:
            plain = check_call(attend(True), q, k, v, {}, q_offset=self.domain.q_offset)
            logit = sink_logit(node.pattern, plain, self.call.tables, self.call.dtype)
            parts.append((torch.zeros_like(parts[0][0]), logit))
        return parts[0] if len(parts) == 1 else merged(parts)

    def _picked(
        self,
        node: Attend,
        choice: Select,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        inside: Any,
        weights: Tensor | None = None,
        one: bool = False,
    ) -> tuple[Tensor, Tensor]:
        scale = self.call.scale or node.pattern.scale or q.shape[3] ** -0.5
        picks, kv_unit = self.value(choice), choice.units[1]
        needed = self.kernels.inside(inside, choice.among, kv_unit, self.domain)
        return self.kernels.picked(
            q, k, v, picks, scale=scale, q_offset=self.domain.q_offset, inside=needed, weights=weights, one=one
        )

    def _per_chunk_of_picks(self, node: Attend, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rule = node.normaliser
        assert rule is not None
        if node.pattern.has_score:
            raise UnsupportedError("per_chunk() takes logits as they are; leave score= out, or use one softmax over all")
        picks, source = self.value(rule.picks), self.value(rule.scores)
        weights, log_total = weights_of(picked_scores(source, picks), rule.weights)  # type: ignore[arg-type]
        name = next(name for name, bound in node.pattern.mask.bound.items() if bound is rule.picks)
        inside = assume(node.pattern.mask.expr, {name: True})
        if self.kernels.whole_tables:
            scale = self.call.scale or node.pattern.scale or q.shape[3] ** -0.5
            one = rule.inner == "softmax1"
            out = self.kernels.two_passes(
                q, k, v, picks, weights, inside, scale=scale, q_offset=self.domain.q_offset, one=one, tables=self.call.tables
            )
            return out, spread(log_total, q.shape[1])
        out, _ = self._picked(node, rule.picks, q, k, v, inside, weights, rule.inner == "softmax1")
        return out, spread(log_total, q.shape[1])

    # ---- other branches --------------------------------------------------------------------------------------------------------

    @run.register
    def _recall(self, node: Recall) -> tuple[Tensor, Tensor]:
        memory, q = node.memory, self.value(node.x)
        k, v, gate = (self.value(x) for x in (memory.y, memory.z, memory.gate))
        documents = None if memory.documents is None else self.value(memory.documents)
        out, lse, _ = self.kernels.slots(
            q, k, v, gate, delay=memory.delay, temperature=memory.temperature,
            scale=self.call.scale or node.scale or q.shape[3] ** -0.5, empty=memory.empty, q_offset=self.domain.q_offset,
            state=self.call.state.get(node.label), documents=documents,
        )  # fmt: skip
        return out, lse

    @run.register
    def _linear(self, node: Linear) -> tuple[Tensor, None]:
        q, k, v = (self.value(x) for x in (node.x, node.y, node.z))
        if len(node.decay) != q.shape[1]:
            raise ShapeError(
                f"linear() was declared with {len(node.decay)} decays; q has {q.shape[1]} heads: one for each is wanted"
            )
        documents = None if node.documents is None else self.value(node.documents)
        out, _ = self.kernels.linear(
            q, k, v, torch.tensor(node.decay, dtype=self.call.dtype, device=q.device),
            scale=self.call.scale or node.scale or q.shape[3] ** -0.5, q_offset=self.domain.q_offset,
            state=self.call.state.get(node.label), documents=documents,
        )  # fmt: skip
        return out, None

    def inside(self, node: Compact, inner: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """What runs on the kept tokens of one batch entry."""
        return type(self)(self.inner_call(node, inner), self.kernels, lse=node in self.weighed).value(node.inside)


def _alike(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both of one type: products of mixed precision are made in the wider one."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)
