"""What gated slots do between scans: the softmax, back through it, and the gradients of log decays."""

from __future__ import annotations

import triton
import triton.language as tl

from sparsedsl.codegen.kernels.linear_scan import document_at, rows_at

__all__ = ["decay_gradient", "slot_weights", "weight_gradient"]


@triton.jit
def _weights(scores, seen_ptr, at, is_row, rows, group, HAS_SEEN: tl.constexpr):
    """Softmax of a block's rows, lse, and which of them see anything; what sees nothing has no weights."""
    top = tl.maximum(tl.max(scores, 1), -1e38)
    weights = tl.exp(scores - top[:, None])
    total = tl.maximum(tl.sum(weights, 1), 1e-38)
    weights /= total[:, None]
    seen = is_row
    if HAS_SEEN:
        seen = tl.load(seen_ptr + at // rows // group * rows + at % rows, mask=is_row, other=0) != 0
        weights = tl.where(seen[:, None], weights, 0.0)
    return weights, top + tl.log(total), seen


@triton.jit(do_not_specialize=["rows", "group", "lines", "lse_unseen"])
def slot_weights(
    scores_ptr, lse_ptr, seen_ptr, rows, group, lines, lse_unseen,
    SLOTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK: tl.constexpr, HAS_SEEN: tl.constexpr,
):  # fmt: skip
    """Scores -> weights, in place, and lse. A program has ``BLOCK`` of all ``lines``, ``rows`` a head; ``seen`` has a row for each of the
    ``group`` heads that share keys."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.arange(0, BLOCK_SLOTS)
    place = at[:, None] * SLOTS + slots[None, :]
    inside = (at < lines)[:, None] & (slots < SLOTS)[None, :]
    scores = tl.load(scores_ptr + place, mask=inside, other=float("-inf"))
    weights, lse, seen = _weights(scores, seen_ptr, at, at < lines, rows, group, HAS_SEEN)
    tl.store(scores_ptr + place, weights, mask=inside)
    tl.store(lse_ptr + at, tl.where(seen, lse, lse_unseen), mask=at < lines)


@triton.jit(do_not_specialize=["rows", "group", "lines", "scale"])
def weight_gradient(
    scores_ptr, terms_ptr, weights_ptr, grads_ptr, lse_grad_ptr, seen_ptr, rows, group, lines, scale,
    SLOTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK: tl.constexpr, HAS_LSE_GRAD: tl.constexpr, HAS_SEEN: tl.constexpr,
):  # fmt: skip
    """Back through the softmax: its weights, the gradients of ``score / scale``, and, in place of the gradients of the weights, the
    terms that a row adds to every log decay before it, ``score * its gradient + weight * its gradient``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.arange(0, BLOCK_SLOTS)
    place = at[:, None] * SLOTS + slots[None, :]
    inside = (at < lines)[:, None] & (slots < SLOTS)[None, :]
    scores = tl.load(scores_ptr + place, mask=inside, other=float("-inf"))
    weights, _, _ = _weights(scores, seen_ptr, at, at < lines, rows, group, HAS_SEEN)
    weight_grads = tl.load(terms_ptr + place, mask=inside, other=0.0)
    mean = tl.sum(weights * weight_grads, 1)
    if HAS_LSE_GRAD:
        mean -= tl.load(lse_grad_ptr + at, mask=at < lines, other=0.0)
    grads = weights * (weight_grads - mean[:, None])
    terms = weights * weight_grads + tl.where(inside, scores, 0.0) * grads
    tl.store(weights_ptr + place, weights, mask=inside)
    tl.store(grads_ptr + place, grads * scale, mask=inside)
    tl.store(terms_ptr + place, terms, mask=inside)


@triton.jit(do_not_specialize=["documents_stride_b", "a_first", "a_rows", "first", "keys", "heads", "chunks"])
def decay_gradient(
    terms_ptr, write_ptr, write_grad_ptr, write_grad_v_ptr, gate_ptr, documents_ptr,
    key_states_ptr, key_grads_ptr, value_states_ptr, value_grads_ptr, decay_grad_ptr,
    documents_stride_b, a_first, a_rows, first, keys, heads, chunks,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Gradients of log decays, of which the writes are ``1 - exp`` too. One program a block of slots, a chunk and a key head.

    A log decay has a part in every pair of a key before it and a query from it on. Of the pairs across the chunk's end the gradient
    is the product of the state there and that of the pass backward; from there on it changes row by row, by what begins or ends there.
    """
    PARTS: tl.constexpr = (SLOTS + BLOCK_SLOTS - 1) // BLOCK_SLOTS
    part = tl.program_id(0) % PARTS
    chunk = tl.program_id(0) // PARTS % chunks
    line = (tl.program_id(0) // PARTS // chunks).to(tl.int64)
    batch = line // heads
    slots, ranks = part * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS), tl.arange(0, BLOCK)
    is_slot = slots < SLOTS
    terms_ptr += line * GROUP * a_rows * SLOTS
    gate_ptr += line * keys * SLOTS
    end = chunk * CHUNK + CHUNK
    across = tl.zeros([BLOCK_SLOTS], tl.float32)
    state_line = line * (chunks + 1) + chunk + 1
    grad_line = line * (chunks + 1) + chunks - 1 - chunk
    for low in range(0, WIDTH, BLOCK_WIDTH):
        columns = low + tl.arange(0, BLOCK_WIDTH)
        place, inside = slots[:, None] * WIDTH + columns[None, :], is_slot[:, None] & (columns < WIDTH)[None, :]
        state = tl.load(key_states_ptr + state_line * (SLOTS * WIDTH) + place, mask=inside, other=0.0)
        across += tl.sum(state * tl.load(key_grads_ptr + grad_line * (SLOTS * WIDTH) + place, mask=inside, other=0.0), 1)
    for low in range(0, WIDTH_V, BLOCK_WIDTH):
        columns = low + tl.arange(0, BLOCK_WIDTH)
        place, inside = slots[:, None] * WIDTH_V + columns[None, :], is_slot[:, None] & (columns < WIDTH_V)[None, :]
        state = tl.load(value_states_ptr + state_line * (SLOTS * WIDTH_V) + place, mask=inside, other=0.0)
        across += tl.sum(state * tl.load(value_grads_ptr + grad_line * (SLOTS * WIDTH_V) + place, mask=inside, other=0.0), 1)
    edge = end - first
    across *= tl.exp(tl.load(gate_ptr + edge.to(tl.int64) * SLOTS + slots, mask=is_slot & (edge >= 0) & (edge < keys), other=0.0))
    if HAS_DOCUMENTS:
        documents_ptr += batch * documents_stride_b
        same = document_at(documents_ptr, end - 1, first, keys) == document_at(documents_ptr, end, first, keys)
        across = tl.where(same, across, 0.0)
    for back in range(BLOCK, CHUNK + BLOCK, BLOCK):
        at = end - back
        writes = rows_at(write_ptr + line * keys * SLOTS, at, ranks, first, keys, SLOTS, slots, SLOTS)
        write_grads = rows_at(write_grad_ptr + line * keys * SLOTS, at, ranks, first, keys, SLOTS, slots, SLOTS)
        write_grads += rows_at(write_grad_v_ptr + line * keys * SLOTS, at, ranks, first, keys, SLOTS, slots, SLOTS)
        terms = -writes * write_grads
        for one in range(GROUP):
            terms += rows_at(terms_ptr + one * a_rows.to(tl.int64) * SLOTS, at, ranks, a_first, a_rows, SLOTS, slots, SLOTS)
        found = tl.cumsum(terms, 0, reverse=True) + across[None, :] - (1 - writes) * write_grads
        row = at - first + ranks
        inside = ((row >= 0) & (row < keys))[:, None] & is_slot[None, :]
        tl.store(decay_grad_ptr + line * keys * SLOTS + row.to(tl.int64)[:, None] * SLOTS + slots[None, :], found, mask=inside)
        across += tl.sum(terms, 0)
