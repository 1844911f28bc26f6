"""The fast way of attention: along lists, over full tiles, through scans; whatever a backend has for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch

from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.pattern import Pattern, attend
from sparsedsl.lang.symbols import SCORE
from sparsedsl.program.axes import unit_of
from sparsedsl.program.branches import Attend, Compact, Joint, Linear, Recall
from sparsedsl.program.decided import assume, pairs_decided_by
from sparsedsl.program.node import Node
from sparsedsl.program.select import Select
from sparsedsl.run.choosing.at_picks import picked_scores
from sparsedsl.run.choosing.scores import ScoreSource
from sparsedsl.run.choosing.weights import weights_of
from sparsedsl.run.differentiable import differentiable
from sparsedsl.run.inputs import check_call
from sparsedsl.run.picked.picks import Picks
from sparsedsl.run.programs.block_choices import WholeTiles, split, whole_tiles
from sparsedsl.run.programs.call import ProgramCall
from sparsedsl.run.programs.candidates import unit_rule
from sparsedsl.run.programs.kernels import Kernels
from sparsedsl.run.programs.listed_choices import ListedChoices
from sparsedsl.run.programs.parts import NEVER, alike, merged, spread
from sparsedsl.run.programs.runner import means
from sparsedsl.run.sinks import sink_logit

__all__ = ["Lowered"]

Tensor = torch.Tensor
# Output, and LSE where it is wanted.
Result = tuple[Tensor, Tensor | None]
# Tokens in the smallest tile that is worth a product of its own.
SMALLEST_TILE = 16


class Lowered(ListedChoices):
    """One evaluation by ``kernels``."""

    def __init__(self, call: ProgramCall, kernels: Kernels, *, lse: bool):
        super().__init__(call)
        self.kernels = kernels
        root = call.program.root
        # Branches whose LSE somebody reads: FlexAttention has none on CPU, and the others save the work.
        self.weighed = {branch for node in call.program.order if isinstance(node, Joint) for branch in node.branches}
        self.weighed |= {root} if lse else set()

    # ---- attention ----------------------------------------------------------------------------------------------------------

    def table(self, node: Node) -> Tensor:
        """What a node gives, as a table ``(B, H, ..)`` that masks and scores read."""
        value = self.value(node)
        if isinstance(value, Picks):
            value = value.table()
        elif isinstance(value, ScoreSource):
            rows, units = value.shape[2:]
            if unit_of(node.axes[2]) == 1 and rows * units > self.kernels.most_table_entries:
                raise UnsupportedError(
                    f"{node!r} is read as a table inside of a score: {rows} queries x {units} units would have to be held. "
                    "Use larger units, or backend='reference', which holds them"
                )
            value = value.scores()
            value = torch.nn.functional.pad(value, (0, -(-self.domain.kv_len // unit_of(node.axes[3])) - units), value=NEVER)
        return spread(value, self.domain.heads)

    @means(Attend)
    def _attend(self, node: Attend) -> Any:
        q, k, v = alike(*(self.value(x) for x in (node.x, node.y, node.z)))
        if q.shape[1] % k.shape[1]:
            raise ShapeError(f"attend(): {q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
        choices = [s for s in node.selections if s.units[0] == 1]
        if node.normaliser is not None:
            return self._per_chunk_of_picks(node, q, k, v)
        if not choices or self.kernels.whole_tables:
            return self._by_tables(node, q, k, v)
        return self._by_lists(node, choices, q, k, v)

    def _by_tables(self, node: Attend, q: Tensor, k: Tensor, v: Tensor) -> Result:
        """Choices for blocks of queries, and orders, as tables of an ordinary pattern."""
        pattern, tables = self.concrete_pattern(node.pattern)
        units = {choice.units for choice in node.selections}
        if self.kernels.whole_tiles and len(units) == 1:
            found = self._by_blocks(pattern, *units.pop(), q, k, v, tables)
            if found is not None:
                return found
        scale, wanted = self.call.scale, node in self.weighed
        return self.kernels.attend(pattern, q, k, v, tables, q_offset=self.domain.q_offset, scale=scale, lse=wanted)

    def _by_blocks(
        self, pattern: Pattern, q_unit: int, kv_unit: int, q: Tensor, k: Tensor, v: Tensor, tables: dict[str, Tensor]
    ) -> Result | None:
        """What is the same for all pairs of two blocks as full tiles, the rest as an ordinary mask, one softmax over both."""
        parts = split(pattern.mask.expr, q_unit, kv_unit)
        if parts is None or min(q_unit, kv_unit) < SMALLEST_TILE:
            return None
        whole = Pattern(Mask(parts[0]), pattern.score, None, pattern.scale)
        domain = replace(self.domain, tables={name: tables[name] for name in whole.tables})
        rule = unit_rule(parts[0], domain, q_unit, kv_unit, self.domain.heads, {}, q.device)
        lists = whole_tiles(rule, domain, self.domain.heads, q_unit, kv_unit)
        call = check_call(whole, q, k, v, domain.tables, q_offset=self.domain.q_offset, scale=self.call.scale)
        found: list[Any] = [differentiable(WholeTiles(whole, lists), call)]
        if parts[1] != sympy.false or pattern.sink is not None:
            rest = Pattern(Mask(parts[1]), pattern.score, pattern.sink, pattern.scale)
            own = {name: tables[name] for name in rest.tables}
            found.append(self.kernels.attend(rest, q, k, v, own, q_offset=self.domain.q_offset, scale=self.call.scale, lse=True))
        return found[0] if len(found) == 1 else merged(found)

    def _by_lists(self, node: Attend, choices: list[Select], q: Tensor, k: Tensor, v: Tensor) -> Result:
        """Choices for single queries: what attends in any case by itself, what a choice adds along its lists, one softmax over both."""
        mask, score = node.pattern.mask, node.pattern.score
        dynamic = [name for name, bound in mask.bound.items() if isinstance(bound, Node)]
        beside = [name for name in dynamic if name != choices[0].label]
        added, removed = pairs_decided_by(mask, dynamic[0])
        lacks = [
            f"a choice for single queries, {choices[0].label}, beside {' and '.join(beside)} in one mask" if beside else "",
            "a modified score beside a choice for single queries" if score.expr != SCORE else "",
            "pairs that attend where nothing was chosen" if removed.expr != sympy.false else "",
        ]
        if any(lacks):
            raise UnsupportedError(
                f"backend {self.kernels.backend!r} has no lists for {' and '.join(filter(None, lacks))}: "
                f"{node.pattern.text.splitlines()[-1]}. Use backend='reference' or 'flex', which read choices as tables; choose for "
                "blocks of queries, by summaries of them; or, of two choices, choose once, by the sum of the scores"
            )
        always = Mask(assume(mask.expr, {dynamic[0]: False}))
        parts: list[Any] = []
        if always.expr != sympy.false:
            plain = Pattern(always, score, None, node.pattern.scale)
            given = {name: self.call.tables[name] for name in plain.tables}
            parts.append(
                self.kernels.attend(plain, q, k, v, given, q_offset=self.domain.q_offset, scale=self.call.scale, lse=True)
            )
        parts.append(self._picked(node, choices[0], q, k, v, added.expr))
        if node.pattern.sink is not None:
            call = check_call(attend(True), q, k, v, {}, q_offset=self.domain.q_offset)
            logit = sink_logit(node.pattern, call, self.call.tables, self.call.dtype)
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
    ) -> Result:
        scale = self.call.scale or node.pattern.scale or q.shape[3] ** -0.5
        picks, kv_unit = self.value(choice), choice.units[1]
        needed = self.kernels.inside(inside, choice.among, kv_unit, self.domain, q.device)
        return self.kernels.picked(
            q, k, v, picks, scale=scale, q_offset=self.domain.q_offset, inside=needed, weights=weights, one=one
        )

    def _per_chunk_of_picks(self, node: Attend, q: Tensor, k: Tensor, v: Tensor) -> Result:
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

    @means(Recall)
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

    @means(Linear)
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
