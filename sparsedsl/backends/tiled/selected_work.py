"""A call as a sequence of blocks: what a block reads of the call's tensors, and where its results go."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import sympy
import torch

from sparsedsl.backends.tiled.decoding import decode_selected
from sparsedsl.backends.tiled.head_groups import Block, HeadGroups
from sparsedsl.backends.tiled.limits import LIMITS
from sparsedsl.backends.tiled.passes import FAR_LSE
from sparsedsl.backends.tiled.score_rules import LN2, LOG2E, ScoreRule, score_rule
from sparsedsl.backends.tiled.selected_chunks import Chunks, ChunkSums
from sparsedsl.backends.tiled.selected_invert import Inverted, Sizes, invert
from sparsedsl.backends.tiled.selected_passes import BlockPass
from sparsedsl.backends.tiled.selected_tiles import PairTiles
from sparsedsl.lang.symbols import SCORE
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.threads import share
from sparsedsl.selection.selected_call import SelectedCall

__all__ = ["backward", "forward"]

Tensor = torch.Tensor
INF = float("inf")
# Threads that hold gradients of all keys each, where there are fewer heads than threads.
MOST_COPIES = 4


def forward(job: SelectedCall, q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """``out (B, Hq, Sq, Dv)`` and ``lse (B, Hq, Sq)``."""
    if q.shape[2] == 1 and (found := decode_selected(job, q, k, v, weights)) is not None:
        return found
    run = _SelectedRun(job, q, k, v, weights)
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    lse = q.new_full(q.shape[:3], run.lse_of_nothing, dtype=run.dtype)

    def work(block: Block) -> None:
        block_out, block_lse = run.pass_over(block).forward()
        run.put(out, block, block_out)
        run.put(lse, block, block_lse * LN2)

    run.side_by_side(functools.partial(work, block) for block in run.blocks(-(-run.head_groups.queries // run.workers)))
    return out, lse


def backward(
    job: SelectedCall,
    want_kv: bool,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    learned: tuple[str, ...] = (),
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, list[Tensor]]:
    """Gradients of q, k, v, the weights and the tables named in ``learned``; those of k and v only where ``want_kv``."""
    run = _SelectedRun(job, q, k, v, weights)
    grad_out = torch.zeros((), dtype=q.dtype, device=q.device).expand(out.shape) if grad_out is None else grad_out
    grad_q = torch.zeros_like(q)
    grad_weights = None if weights is None else torch.zeros_like(weights)
    # In float64, where torch adds in a fixed order whatever the number of threads.
    leaves = {name: job.tables[name].detach().double().requires_grad_() for name in learned}

    def work(blocks: list[Block], sums: tuple[ChunkSums, ChunkSums] | None, accumulators: dict[str, Tensor]) -> None:
        for block in blocks:
            part = run.pass_over(block, leaves, accumulators)
            grads = run.head_groups.take(grad_out, block, run.dtype)
            lses = run.head_groups.take(lse, block, run.dtype, beyond=INF)
            lses.masked_fill_(lses == -INF, INF)
            delta = (grads * run.head_groups.take(out, block, run.dtype)).sum(2)
            slopes = None if grad_lse is None else run.head_groups.take(grad_lse, block, run.dtype).masked_fill_(lses == INF, 0.0)
            if slopes is not None:
                delta -= slopes
            lses2 = lses * LOG2E
            far = run.far(lses)
            if far is not None:
                largest, totals = part.totals()
                lses2[:-1] = torch.where(far, largest, lses2[:-1])
                # Gradients are linear in what comes from outside: a factor of all weights of a row is one of these.
                factor = torch.where(far, totals.reciprocal(), 1.0)
                grads[:-1] *= factor[..., None]
                delta[:-1] *= factor
            block_q, block_weights = part.backward(grads, lses2, delta, sums)
            run.put(grad_q, block, block_q.mul_(job.scale))
            if block_weights is not None and grad_weights is not None:
                if slopes is not None:  # lse = log(sum of weights)
                    shares = (slopes * (-lses).exp())[:-1, :, None]
                    block_weights += shares.masked_fill(part.inverted.beyond[:, None], 0.0)
                run.add_weights(grad_weights, block, block_weights)

    parts, copies = run.parts()
    sums = [(ChunkSums(run.chunks[0]), ChunkSums(run.chunks[1])) if want_kv else None for _ in range(copies)]
    accumulators = [{name: torch.zeros_like(leaf) for name, leaf in leaves.items()} for _ in parts]
    run.side_by_side(
        functools.partial(work, part, sums[number % copies], accumulators[number]) for number, part in enumerate(parts)
    )
    by_tables = [
        sum((gain[name] for gain in accumulators), torch.zeros_like(leaf)).to(job.tables[name].dtype)
        for name, leaf in leaves.items()
    ]
    if sums[0] is None:
        return grad_q, None, None, grad_weights, by_tables
    keys, values = sums[0]
    for other in sums[1:]:
        if other is not None:
            keys.join(other[0])
            values.join(other[1])
    return grad_q, keys.whole(job.scale / run.factor), values.whole(), grad_weights, by_tables


@dataclass(frozen=True, eq=False)
class _SelectedRun:
    """A call with its tensors."""

    job: SelectedCall
    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor | None

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """That of accumulation."""
        return accumulated(self.q.dtype)

    @functools.cached_property
    def rule(self) -> ScoreRule:
        """How products become logits."""
        return score_rule(self.job.score)

    @property
    def factor(self) -> float:
        """What q is multiplied by before the products."""
        return self.rule.factor(self.job.scale)

    @property
    def is_plain(self) -> bool:
        """Whether products are logits, and all of them attend."""
        return self.job.mask == sympy.true and self.job.score == SCORE

    def far(self, lses: Tensor) -> Tensor | None:
        """The queries of a block, ``(queries, heads)``, whose LSE is too far from 0 to hold all digits of a sum; None: none."""
        if self.weights is not None or self.dtype == torch.float64 or self.q.device.type != "cpu":
            return None
        far = (lses[:-1].abs() > FAR_LSE) & lses[:-1].isfinite()
        return far if bool(far.any()) else None

    @property
    def lse_of_nothing(self) -> float:
        """The LSE of a query without a list."""
        return 0.0 if self.job.softmax1 and self.weights is None else -INF

    @functools.cached_property
    def indices(self) -> Tensor:
        """No list is longer than there are chunks."""
        return self.job.blocks.indices[..., : self.job.blocks.blocks]

    @functools.cached_property
    def head_groups(self) -> HeadGroups:
        """How its heads are grouped."""
        return HeadGroups.of(self.q, self.k.shape[1], self.indices.shape[1])

    @functools.cached_property
    def chunks(self) -> tuple[Chunks, Chunks]:
        """Those of k and v."""
        block, blocks = self.job.blocks.kv_block, self.job.blocks.blocks
        return Chunks(self.k, block, blocks, self.dtype), Chunks(self.v, block, blocks, self.dtype)

    @functools.cached_property
    def workers(self) -> int:
        """Threads that compute, each a block of its own."""
        if self.q.device.type != "cpu":
            return 1
        head_groups, tokens, width = self.head_groups, self.job.blocks.kv_block, self.q.shape[3] + self.v.shape[3]
        pairs = head_groups.queries * self.indices.shape[3]
        chunks = min(pairs, self.k.shape[0] * self.k.shape[1] * self.job.blocks.blocks)
        numbers = pairs * head_groups.heads * (tokens + width) + chunks * tokens * width
        return 1 if numbers < LIMITS.now.few else torch.get_num_threads()

    def blocks(self, most: int, *, one_head_group: bool = False) -> Iterator[Block]:
        """All blocks, none if all lists are empty, each of at most about ``most`` queries and what its scratch may take."""
        slots, (head_dim, head_dim_v) = self.indices.shape[3], (self.q.shape[3], self.v.shape[3])
        if not slots:
            return
        numbers = slots * (max(head_dim, head_dim_v) + 4) + head_dim + head_dim_v
        room = max(LIMITS.now.output_bytes // self.workers, LIMITS.now.output_bytes_each) // (
            self.head_groups.heads * numbers * self.dtype.itemsize
        )
        yield from self.head_groups.blocks(min(room, most), one_head_group=one_head_group)

    def parts(self) -> tuple[list[list[Block]], int]:
        """The blocks as parts of a backward pass that may run side by side, and how many copies of the sums of k and v that takes.

        Either each part has key/value heads, and rows of the weights, of its own, or queries and a copy of its own. What is in a part
        and the order of its blocks are fixed, and so are the sums.
        """
        head_groups = self.head_groups
        if self.workers == 1:
            return [list(self.blocks(head_groups.queries))], 1
        apart = self.k.shape[1] if self.weights is None else math.gcd(self.k.shape[1], self.weights.shape[1])
        parts: dict[tuple[int, ...], list[Block]] = {}
        if head_groups.batch * apart >= self.workers:
            for block in self.blocks(head_groups.queries, one_head_group=True):
                parts.setdefault((block.batch.start, block.head_groups.start * apart // head_groups.count), []).append(block)
            return list(parts.values()), 1
        copies = min(self.workers, MOST_COPIES)
        step = -(-head_groups.rows // copies)
        for block in self.blocks(step, one_head_group=True):
            parts.setdefault((block.rows.start * copies // head_groups.rows,), []).append(block)
        return list(parts.values()), max(len(parts), 1)

    def side_by_side(self, work: Iterable[Callable[[], None]]) -> None:
        """Run pieces of work, each on one core."""
        if self.q.device.type == "cpu" and torch.get_num_threads() > 1:
            share(work, self.workers)
            return
        with torch.no_grad(), torch.autocast(self.q.device.type, enabled=False):
            for piece in work:
                piece()

    def pass_over(
        self, block: Block, leaves: dict[str, Tensor] | None = None, accumulators: dict[str, Tensor] | None = None
    ) -> BlockPass:
        """A block with what it reads. ``leaves``, ``accumulators``: the learned tables, and where their gradients are added up."""
        (keys, values), heads = self.chunks, self.head_groups.heads
        sizes = Sizes(
            tokens=keys.tokens,
            blocks=keys.blocks,
            ragged=self.k.shape[2] % keys.tokens > 0,
            heads=heads,
            width=self.q.shape[3] + self.v.shape[3],
        )
        most = LIMITS.now.numbers_cpu if self.q.device.type == "cpu" else LIMITS.now.numbers
        inverted = invert(
            self.head_groups.lists(self.indices, block), self.head_groups.kv_lines(block, self.q.device), sizes, most
        )
        q = self.head_groups.take(self.q, block, self.dtype).mul_(self.factor)
        weights = None if self.weights is None else self._weights_of(self.weights, block, inverted)
        tiles = None
        if not self.is_plain:
            members = self.job.members
            bits = None if members is None else self.head_groups.lists(members[..., : self.indices.shape[3]], block)
            tiles = PairTiles(
                self.job, self.rule, self.head_groups, block, inverted, keys, bits, leaves or {}, accumulators or {}
            )
        return BlockPass(inverted, q, keys, values, weights, tiles, self.rule.tanh, self.job.softmax1)

    def put(self, x: Tensor, block: Block, values: Tensor) -> None:
        """Write ``values (queries, heads, ...)`` into ``x (B, Hq, Sq, ...)``."""
        part = self.head_groups.view(x, block)
        part.copy_(values.view(part.shape))

    def add_weights(self, grad: Tensor, block: Block, values: Tensor) -> None:
        """Add ``values (queries, heads, W)`` to the gradient of the weights, head by head in their order."""
        values = values.view(*block.sizes, self.head_groups.heads, -1).transpose(2, 3).flatten(1, 2)
        part = grad[block.at_batch, :, block.at_rows, : values.shape[3]]
        for number, head in enumerate(self._weight_heads(grad, block)):
            part[:, head] += values[:, number]

    def _weight_heads(self, weights: Tensor, block: Block) -> list[int]:
        """The row of the weights that each query head of a block reads."""
        return [head * weights.shape[1] // self.q.shape[1] for head in self.head_groups.heads_of(block)]

    def _weights_of(self, weights: Tensor, block: Block, inverted: Inverted) -> Tensor:
        """``(queries, heads, W)``, 0 after the ends of lists."""
        part = weights[block.at_batch, self._weight_heads(weights, block), block.at_rows, : self.indices.shape[3]]
        part = part.unflatten(1, (-1, self.head_groups.heads)).transpose(2, 3).flatten(0, 2).to(self.dtype)
        return part.masked_fill(inverted.beyond[:, None], 0.0)
