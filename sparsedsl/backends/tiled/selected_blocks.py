"""A call as a sequence of blocks: what a block reads of the call's tensors, and where its results go."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from sparsedsl.backends.tiled.head_groups import Block, Lanes
from sparsedsl.backends.tiled.passes import MOST_COPIES
from sparsedsl.backends.tiled.selected_chunks import Chunks, ChunkSums
from sparsedsl.backends.tiled.selected_invert import Inverted, Piece, Sizes, invert
from sparsedsl.backends.tiled.selected_passes import LOG2E, BlockPass
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.threads import share
from sparsedsl.selection.selected import Picks

__all__ = ["Inside", "Job", "backward", "forward"]

Tensor = torch.Tensor
Inside = Callable[[slice, Tensor, Tensor, Tensor], Tensor]
INF = float("inf")

BLOCK_BYTES, BLOCK_BYTES_LEAST = (
    64 << 20,
    16 << 20,
)  # what the outputs of all blocks at work, one for each pair, may take, and one of many
PIECE_NUMBERS, PIECE_NUMBERS_CPU = (
    1 << 22,
    1 << 18,
)  # what a piece may hold; a core's cache is small, and products elsewhere should be few
FEW = 1 << 22  # numbers in all pieces together that are not worth a second thread


@dataclass(frozen=True, eq=False)
class Job:
    """A call without its tensors, which autograd keeps."""

    picks: Picks
    scale: float
    q_offset: int
    inside: Inside | None
    one: bool


def forward(job: Job, q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """``out (B, Hq, Sq, Dv)`` and ``lse (B, Hq, Sq)``."""
    run = _Run(job, q, k, v, weights)
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    lse = q.new_full(q.shape[:3], run.lse_of_nothing, dtype=run.dtype)

    def work(block: Block) -> None:
        block_out, block_lse = run.pass_over(block).forward()
        run.put(out, block, block_out)
        run.put(lse, block, block_lse / LOG2E)

    run.side_by_side(functools.partial(work, block) for block in run.blocks(-(-run.lanes.queries // run.workers)))
    return out, lse


def backward(
    job: Job,
    want_kv: bool,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v and the weights; those of k and v only where ``want_kv``."""
    run = _Run(job, q, k, v, weights)
    grad_out = torch.zeros((), dtype=q.dtype, device=q.device).expand(out.shape) if grad_out is None else grad_out
    grad_q = torch.zeros_like(q)
    grad_weights = None if weights is None else torch.zeros_like(weights)

    def work(blocks: list[Block], sums: tuple[ChunkSums, ChunkSums] | None) -> None:
        for block in blocks:
            part = run.pass_over(block)
            grads = run.lanes.take(grad_out, block, run.dtype)
            lses = run.lanes.take(lse, block, run.dtype, beyond=INF)
            lses.masked_fill_(lses == -INF, INF)
            delta = (grads * run.lanes.take(out, block, run.dtype)).sum(2)
            slopes = None if grad_lse is None else run.lanes.take(grad_lse, block, run.dtype).masked_fill_(lses == INF, 0.0)
            if slopes is not None:
                delta -= slopes
            block_q, block_weights = part.backward(grads, lses * LOG2E, delta, sums)
            run.put(grad_q, block, block_q.mul_(job.scale))
            if block_weights is not None and grad_weights is not None:
                if slopes is not None:  # lse = log(sum of weights)
                    shares = (slopes * (-lses).exp())[:-1, :, None]
                    block_weights += shares.masked_fill(part.inverted.beyond[:, None], 0.0)
                run.add_weights(grad_weights, block, block_weights)

    parts, copies = run.parts()
    sums = [(ChunkSums(run.chunks[0]), ChunkSums(run.chunks[1])) if want_kv else None for _ in range(copies)]
    run.side_by_side(functools.partial(work, part, sums[number % copies]) for number, part in enumerate(parts))
    if sums[0] is None:
        return grad_q, None, None, grad_weights
    keys, values = sums[0]
    for other in sums[1:]:
        if other is not None:
            keys.join(other[0])
            values.join(other[1])
    return grad_q, keys.whole(1 / LOG2E), values.whole(), grad_weights


@dataclass(frozen=True, eq=False)
class _Run:
    """A call with its tensors."""

    job: Job
    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor | None

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """That of accumulation."""
        return accumulated(self.q.dtype)

    @property
    def lse_of_nothing(self) -> float:
        """The LSE of a query without a list."""
        return 0.0 if self.job.one and self.weights is None else -INF

    @functools.cached_property
    def indices(self) -> Tensor:
        """No list is longer than there are chunks."""
        return self.job.picks.indices[..., : self.job.picks.units]

    @functools.cached_property
    def lanes(self) -> Lanes:
        """How its heads are grouped."""
        return Lanes.of(self.q, self.k.shape[1], self.indices.shape[1])

    @functools.cached_property
    def chunks(self) -> tuple[Chunks, Chunks]:
        """Those of k and v."""
        unit, units = self.job.picks.kv_unit, self.job.picks.units
        return Chunks(self.k, unit, units, self.dtype), Chunks(self.v, unit, units, self.dtype)

    @functools.cached_property
    def workers(self) -> int:
        """Threads that compute, each a block of its own."""
        if self.q.device.type != "cpu":
            return 1
        lanes, tokens, width = self.lanes, self.job.picks.kv_unit, self.q.shape[3] + self.v.shape[3]
        pairs = lanes.queries * self.indices.shape[3]
        chunks = min(pairs, self.k.shape[0] * self.k.shape[1] * self.job.picks.units)
        numbers = pairs * lanes.heads * (tokens + width) + chunks * tokens * width
        return 1 if numbers < FEW else torch.get_num_threads()

    def blocks(self, most: int, *, one_lane: bool = False) -> Iterator[Block]:
        """All blocks, none if all lists are empty, each of at most about ``most`` queries and what its scratch may take."""
        slots, (head_dim, head_dim_v) = self.indices.shape[3], (self.q.shape[3], self.v.shape[3])
        if not slots:
            return
        numbers = slots * (max(head_dim, head_dim_v) + 4) + head_dim + head_dim_v
        room = max(BLOCK_BYTES // self.workers, BLOCK_BYTES_LEAST) // (self.lanes.heads * numbers * self.dtype.itemsize)
        yield from self.lanes.blocks(min(room, most), one_lane=one_lane or self.job.inside is not None)

    def parts(self) -> tuple[list[list[Block]], int]:
        """The blocks as parts of a backward pass that may run side by side, and how many copies of the sums of k and v that takes.

        Either each part has key/value heads, and rows of the weights, of its own, or queries and a copy of its own. What is in a part
        and the order of its blocks are fixed, and so are the sums.
        """
        lanes = self.lanes
        if self.workers == 1:
            return [list(self.blocks(lanes.queries))], 1
        apart = self.k.shape[1] if self.weights is None else math.gcd(self.k.shape[1], self.weights.shape[1])
        parts: dict[tuple[int, ...], list[Block]] = {}
        if lanes.batch * apart >= self.workers:
            for block in self.blocks(lanes.queries, one_lane=True):
                parts.setdefault((block.batch.start, block.lanes.start * apart // lanes.count), []).append(block)
            return list(parts.values()), 1
        copies = min(self.workers, MOST_COPIES)
        step = -(-lanes.rows // copies)
        for block in self.blocks(step, one_lane=True):
            parts.setdefault((block.rows.start * copies // lanes.rows,), []).append(block)
        return list(parts.values()), max(len(parts), 1)

    def side_by_side(self, work: Iterable[Callable[[], None]]) -> None:
        """Run pieces of work, each on one core."""
        if self.q.device.type == "cpu" and torch.get_num_threads() > 1:
            share(work, self.workers)
            return
        with torch.no_grad(), torch.autocast(self.q.device.type, enabled=False):
            for piece in work:
                piece()

    def pass_over(self, block: Block) -> BlockPass:
        """A block with what it reads."""
        (keys, values), heads = self.chunks, self.lanes.heads
        sizes = Sizes(
            tokens=keys.tokens,
            units=keys.units,
            ragged=self.k.shape[2] % keys.tokens > 0,
            heads=heads,
            width=self.q.shape[3] + self.v.shape[3],
        )
        most = PIECE_NUMBERS_CPU if self.q.device.type == "cpu" else PIECE_NUMBERS
        inverted = invert(self.lanes.lists(self.indices, block), self.lanes.kv_lines(block, self.q.device), sizes, most)
        q = self.lanes.take(self.q, block, self.dtype).mul_(self.job.scale * LOG2E)
        weights = None if self.weights is None else self._weights_of(self.weights, block, inverted)
        bias = None if self.job.inside is None else functools.partial(self._bias, self.job.inside, block, inverted)
        return BlockPass(inverted, q, keys, values, weights, bias, self.job.one)

    def put(self, x: Tensor, block: Block, values: Tensor) -> None:
        """Write ``values (queries, heads, ...)`` into ``x (B, Hq, Sq, ...)``."""
        part = self.lanes.view(x, block)
        part.copy_(values.view(part.shape))

    def add_weights(self, grad: Tensor, block: Block, values: Tensor) -> None:
        """Add ``values (queries, heads, W)`` to the gradient of the weights, head by head in their order."""
        values = values.view(*block.sizes, self.lanes.heads, -1).transpose(2, 3).flatten(1, 2)
        part = grad[block.at_batch, :, block.at_rows, : values.shape[3]]
        for number, head in enumerate(self._weight_heads(grad, block)):
            part[:, head] += values[:, number]

    def _weight_heads(self, weights: Tensor, block: Block) -> list[int]:
        """The row of the weights that each query head of a block reads."""
        return [head * weights.shape[1] // self.q.shape[1] for head in self.lanes.heads_of(block)]

    def _weights_of(self, weights: Tensor, block: Block, inverted: Inverted) -> Tensor:
        """``(queries, heads, W)``, 0 after the ends of lists."""
        part = weights[block.at_batch, self._weight_heads(weights, block), block.at_rows, : self.indices.shape[3]]
        part = part.unflatten(1, (-1, self.lanes.heads)).transpose(2, 3).flatten(0, 2).to(self.dtype)
        return part.masked_fill(inverted.beyond[:, None], 0.0)

    def _bias(self, inside: Inside, block: Block, inverted: Inverted, piece: Piece) -> Tensor:
        """0 or -inf for ``(places, heads or 1, tokens)``. A block has one lane here; a place without a pair asks for the last query."""
        device, keys = self.q.device, self.chunks[0]
        query = inverted.queries[piece.places].clamp(max=block.queries - 1)
        start = torch.tensor([keys.start(number) for number in piece.chunks], device=device)
        tokens = start[:, None] + torch.arange(keys.length(piece), device=device)
        heads = torch.tensor(self.lanes.heads_of(block), device=device)
        positions = query + (self.job.q_offset + block.rows.start)
        allowed = inside(block.at_batch, heads, positions, tokens.repeat_interleave(piece.load, dim=0))
        allowed = allowed.movedim(0, 1) if allowed.ndim == 3 else allowed[:, None]
        return torch.zeros(allowed.shape, dtype=self.dtype, device=device).masked_fill_(~allowed, -INF)
