"""Gated slots on Triton kernels: what ``slots.slot_scan`` computes, forward and backward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import logsigmoid

from sparsedsl.backends.triton.config_choice import target_of
from sparsedsl.backends.triton.launching import in_tiles
from sparsedsl.backends.triton.scan_pass import ScanTiles, carried, filled, launch, operands, plain, precision_of, refuse
from sparsedsl.gpu.loading import interpreted
from sparsedsl.gpu.targets import Target
from sparsedsl.runtime.autograd import only_first_derivatives
from sparsedsl.runtime.scan_calls import SlotState, check_slots

__all__ = ["slot_scan_triton", "slot_tiles"]

Tensor = torch.Tensor


def slot_scan_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    delay: int,
    temperature: float,
    scale: float,
    empty: Literal["zero_sink", "masked"] = "zero_sink",
    q_offset: int = 0,
    state: SlotState | None = None,
    documents: Tensor | None = None,
    tiles: ScanTiles | None = None,
) -> tuple[Tensor, Tensor, SlotState]:
    """``slot_scan`` on a GPU, or where Triton interprets kernels: the same arguments, results, refusals and gradients.

    Deterministic; sums and states in float32; k and v are never copied for the query heads that share them. A new length compiles
    nothing. Memory beside inputs and results: per position float32 numbers for each slot of a key head (two; backward five) and of a
    query head (one; backward four), and per ``tiles.chunk`` positions and key head two states, backward four.

    Args:
        tiles: how it is cut and launched; by default :func:`slot_tiles`. The others are described at ``slot_scan``.

    Raises:
        ShapeError: as ``slot_scan``.
        UnsupportedError: float64, a head_dim above 256, more than 128 slots, no GPU and no interpreter.

    Example:
        >>> x = torch.ones(1, 1, 3, 1, dtype=torch.float64)
        >>> slot_scan_triton(x, x, x, x, delay=1, temperature=8.0, scale=1.0)
        Traceback (most recent call last):
            ...
        sparsedsl.errors.UnsupportedError: slot_scan_triton: states are float32, too coarse for float64 inputs; use slot_scan
    """
    call = check_slots(
        q,
        k,
        v,
        gate,
        delay=delay,
        temperature=temperature,
        scale=scale,
        empty=empty,
        q_offset=q_offset,
        state=state,
        documents=documents,
    )
    widths = {"head_dim": q.shape[3], "the head_dim of v": v.shape[3], "the number of slots": gate.shape[3]}
    refuse("slot_scan_triton", q, widths, "slot_scan")
    batch, kv_heads = k.shape[:2]
    seen = None if call.seen is None else call.seen.expand(batch, kv_heads, q.shape[2]).contiguous()
    job = _SlotCall(
        call.scale, call.temperature, max(1, call.delay - call.q_offset), call.q_offset - call.delay, seen,
        -math.inf if call.masked else math.log(gate.shape[3]), None if call.number is None else call.number.to(torch.int32),
        tiles or slot_tiles(q.dtype, q.shape[3], v.shape[3], gate.shape[3], target_of(q.device)),
    )  # fmt: skip
    before = (None, None) if state is None else (call.before.keys, call.before.values)
    out, lse, keys, values = _SlotScan.apply(job, q, k, v, gate, *before)
    written = torch.ones_like(call.before.written) if k.shape[2] else call.before.written
    return out, lse, SlotState(keys, values, written)


def slot_tiles(dtype: torch.dtype, width: int, width_v: int, slots: int, target: Target) -> ScanTiles:
    """Tiles that spill nothing on the targets that kernels are built for, up to 64 slots and heads of 128; chosen by compiling, not by
    the clock. Beyond, some registers spill."""
    if interpreted():
        return ScanTiles(32, 16, 16, 4)
    # The assembler of the cards from sm_120 on keeps more of a tile in registers at a time.
    widest = 64 if isinstance(target.arch, int) and target.arch >= 120 else 128
    few = dtype != torch.float32 and max(width, width_v) <= widest and slots <= 64
    # A thread of an AMD processor has twice the registers, and half as many if there are eight warps.
    columns = 16 if dtype == torch.float32 and max(width, width_v) > 64 else 32
    return ScanTiles(chunk=128, block=16, columns=columns, warps=4 if few or target.backend == "hip" else 8)


@dataclass(frozen=True, eq=False)
class _SlotCall:
    """A call without the tensors that autograd keeps. Key 0 stands at position ``first``; query row 0 sees keys up to row ``sees``.

    ``seen (B, Hkv, Sq)``: queries for which slots hold anything of theirs, None: all. ``lse_unseen``: the lse of the others.
    ``documents``: the number of each key's document, int32.
    """

    scale: float
    temperature: float
    first: int
    sees: int
    seen: Tensor | None
    lse_unseen: float
    documents: Tensor | None
    tiles: ScanTiles


@dataclass(frozen=True, eq=False)
class _SlotPass:
    """The gates of a call: log decays and writes, float32 ``(B, Hkv, Skv, M)``, and the arguments that all kernels have."""

    job: _SlotCall
    decay: Tensor
    write: Tensor
    group: int
    precision: str

    @staticmethod
    def of(job: _SlotCall, q: Tensor, gate: Tensor) -> _SlotPass:
        decay = (logsigmoid(gate.detach().float()) / job.temperature).contiguous()
        return _SlotPass(job, decay, -torch.expm1(decay), q.shape[1] // gate.shape[1], precision_of(q))

    @property
    def query_first(self) -> int:
        """The position of query row 0: that of the newest key it sees."""
        return self.job.first + self.job.sees

    @property
    def chunks(self) -> int:
        return in_tiles(self.job.first + self.decay.shape[2], self.job.tiles.chunk)

    def values(self, *, reverse: bool) -> dict[str, Any]:
        """Forward a key head's query heads read one head of keys; in reverse a head of keys reads them."""
        documents, tiles, slots = self.job.documents, self.job.tiles, self.decay.shape[3]
        several = documents is not None and documents.shape[0] > 1
        return {
            "gate_ptr": self.decay, "documents_ptr": self.decay if documents is None else documents,
            "documents_stride_b": documents.stride(0) if documents is not None and several else 0,
            "first": self.job.first, "keys": self.decay.shape[2], "heads": self.decay.shape[1], "chunks": self.chunks,
            "SLOTS": slots, "BLOCK_SLOTS": filled(slots), "CHUNK": tiles.chunk, "BLOCK": tiles.block,
            "LEVELS": tiles.block.bit_length() - 1, "REVERSE": reverse, "HAS_DOCUMENTS": documents is not None,
            "PRECISION": self.precision, "GROUP": self.group,
        }  # fmt: skip

    def states(self, b: Tensor, c: Tensor, initial: Tensor | None, *, reverse: bool) -> Tensor:
        """The state before each chunk and after the last ``(B * Hkv, chunks + 1, M, width of b)``."""
        from sparsedsl.codegen.kernels import linear_scan, slot_scan

        lines, slots, width = self.decay.shape[0] * self.decay.shape[1], self.decay.shape[3], b.shape[3]
        states = self.decay.new_empty((lines, self.chunks + 1, slots, width))
        factors = states.new_empty((lines, self.chunks, slots))
        block_slots, block_width = min(filled(slots), 32), min(filled(width), 64)
        values = self.values(reverse=reverse) | operands(b=b) | {
            "c_ptr": c, "states_ptr": states, "factors_ptr": factors, "b_first": self.query_first if reverse else self.job.first,
            "b_rows": b.shape[2], "GROUP": self.group if reverse else 1, "WIDTH": width, "BLOCK_SLOTS": block_slots,
            "BLOCK_WIDTH": block_width,
        }  # fmt: skip
        parts = in_tiles(slots, block_slots) * in_tiles(width, block_width)
        launch(slot_scan.sum_chunks, parts * self.chunks * lines, values, warps=4)
        return carried(linear_scan.carry, states, factors, initial)

    def _reading(self, rows: int, width: int, *, reverse: bool) -> dict[str, Any]:
        """Arguments of what reads states; the rows that read begin at ``a_first``."""
        chunk = self.job.tiles.chunk
        a_first, b_first = (self.job.first, self.query_first) if reverse else (self.query_first, self.job.first)
        first_chunk, count = 0, self.chunks
        if not reverse:  # nobody asks for what lies before the queries or after them
            first_chunk = a_first // chunk
            count = (a_first + rows - 1) // chunk - first_chunk + 1 if rows else 0
        return self.values(reverse=reverse) | {
            "a_first": a_first, "a_rows": rows, "b_first": b_first, "first_chunk": first_chunk, "read_chunk_count": count,
            "heads": self.decay.shape[1] * (1 if reverse else self.group), "SHARED": 1 if reverse else self.group,
            "group": self.group if reverse else 1, "WIDTH": width,
        }  # fmt: skip

    def read_slots(self, a: Tensor, b: Tensor, c: Tensor, states: Tensor, scale: float = 1.0, *, reverse: bool = False) -> Tensor:
        """A number a row of ``a`` and slot, float32."""
        from sparsedsl.codegen.kernels import slot_scan

        batch, heads, rows, width = a.shape
        slots = self.decay.shape[3]
        y = self.decay.new_empty((batch, heads, rows, slots))
        block_slots = min(filled(slots), self.job.tiles.columns)
        values = self._reading(rows, width, reverse=reverse) | operands(a=a, b=b) | {
            "c_ptr": c, "y_ptr": y, "states_ptr": states, "b_rows": b.shape[2], "scale": scale, "BLOCK_SLOTS": block_slots,
            "BLOCK_WIDTH": filled(width),
        }  # fmt: skip
        programs = in_tiles(slots, block_slots) * values["read_chunk_count"] * batch * heads
        launch(slot_scan.read_slots, programs, values, warps=self.job.tiles.warps)
        return y

    def read_values(
        self,
        weights: Tensor,
        b: Tensor,
        c: Tensor,
        y: Tensor,
        states: Tensor,
        lse: Tensor | None = None,
        *,
        reverse: bool = False,
    ) -> Tensor:
        """Fill ``y`` with a row for each row of ``weights``; with ``lse`` those are scores, and it is filled too."""
        from sparsedsl.codegen.kernels import slot_scan

        width = b.shape[3]
        block_width = min(filled(width), self.job.tiles.columns)
        values = self._reading(weights.shape[2], width, reverse=reverse) | operands(b=b, y=y) | {
            "w_ptr": weights, "c_ptr": c, "states_ptr": states, "b_rows": b.shape[2], "BLOCK_WIDTH": block_width,
        }  # fmt: skip
        programs = in_tiles(width, block_width) * values["read_chunk_count"] * y.shape[0] * y.shape[1]
        launch(slot_scan.read_values, programs, values, warps=self.job.tiles.warps)
        return y

    def between(self, kernel: Any, scores: Tensor, **more: Any) -> None:
        """A kernel that takes the rows of scores one by one."""
        seen, slots = self.job.seen, scores.shape[3]
        lines = scores.numel() // slots
        values = {
            "scores_ptr": scores, "rows": scores.shape[2], "group": self.group, "lines": lines, "SLOTS": slots,
            "BLOCK_SLOTS": filled(slots), "BLOCK": self.job.tiles.block, "HAS_SEEN": seen is not None,
            # Triton's interpreter has no booleans in memory.
            "seen_ptr": scores if seen is None else seen.view(torch.int8),
        }  # fmt: skip
        launch(kernel, in_tiles(lines, self.job.tiles.block), values | more, warps=4)

    def decay_gradient(
        self, terms: Tensor, write_grads: tuple[Tensor, Tensor], states: dict[str, Tensor], width: int, width_v: int
    ) -> Tensor:
        """Gradient of the log decays, through what they keep and what they write. ``terms``: what rows of queries add to it."""
        from sparsedsl.codegen.kernels import slot_gates

        grad, slots = torch.empty_like(self.decay), self.decay.shape[3]
        block_slots = min(filled(slots), self.job.tiles.columns)
        values = self.values(reverse=False) | states | {
            "terms_ptr": terms, "write_ptr": self.write, "write_grad_ptr": write_grads[0], "write_grad_v_ptr": write_grads[1],
            "decay_grad_ptr": grad, "a_first": self.query_first, "a_rows": terms.shape[2], "WIDTH": width, "WIDTH_V": width_v,
            "BLOCK_SLOTS": block_slots, "BLOCK_WIDTH": 32,
        }  # fmt: skip
        programs = in_tiles(slots, block_slots) * self.chunks * grad.shape[0] * grad.shape[1]
        launch(slot_gates.decay_gradient, programs, values, warps=4)
        return grad


class _SlotScan(torch.autograd.Function):
    """Inputs: a job, q, k, v, gate, and the keys and values of the slots before, or None."""

    @staticmethod
    def forward(
        job: _SlotCall, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, keys: Tensor | None, values: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from sparsedsl.codegen.kernels import slot_gates

        q, k, v = plain(q, k, v)
        slots = _SlotPass.of(job, q, gate)
        key_states, value_states = (
            slots.states(b, slots.write, _float32(before), reverse=False) for b, before in ((k, keys), (v, values))
        )
        scores = slots.read_slots(q, k, slots.write, key_states, job.scale)
        out, lse = q.new_empty((*q.shape[:3], v.shape[3])), scores.new_empty(q.shape[:3])
        slots.between(slot_gates.slot_weights, scores, lse_ptr=lse, lse_unseen=job.lse_unseen)
        slots.read_values(scores, v, slots.write, out, value_states)
        lead = k.shape[:2]
        return out, lse, *(states[:, -1].clone().unflatten(0, lead) for states in (key_states, value_states))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.job = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @only_first_derivatives
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_keys: Tensor | None, grad_values: Tensor | None
    ) -> Any:
        from sparsedsl.codegen.kernels import slot_gates

        # States and scores again; the gradients of scores; the pass backward; the gates.
        job, (q, k, v, gate, keys, values) = ctx.job, ctx.saved_tensors
        q, k, v = plain(q, k, v)
        slots = _SlotPass.of(job, q, gate)
        write = slots.write
        (grad_out,) = plain(q.new_zeros((*q.shape[:3], v.shape[3])) if grad_out is None else grad_out)
        key_states, value_states = (
            slots.states(b, write, _float32(before), reverse=False) for b, before in ((k, keys), (v, values))
        )
        scores = slots.read_slots(q, k, write, key_states, job.scale)
        terms = slots.read_slots(grad_out, v, write, value_states)
        weights, score_grads = torch.empty_like(scores), torch.empty_like(scores)
        more = {"terms_ptr": terms, "weights_ptr": weights, "grads_ptr": score_grads, "scale": job.scale}
        more |= {
            "lse_grad_ptr": scores if grad_lse is None else grad_lse.float().contiguous(),
            "HAS_LSE_GRAD": grad_lse is not None,
        }
        slots.between(slot_gates.weight_gradient, scores, **more)
        grad_q = slots.read_values(score_grads, k, write, torch.empty_like(q), key_states)
        del scores
        key_grads = slots.states(q, score_grads, _float32(grad_keys), reverse=True)
        value_grads = slots.states(grad_out, weights, _float32(grad_values), reverse=True)
        grad_k = slots.read_values(write, q, score_grads, torch.empty_like(k), key_grads, reverse=True)
        grad_v = slots.read_values(write, grad_out, weights, torch.empty_like(v), value_grads, reverse=True)
        write_grads = (
            slots.read_slots(k, q, score_grads, key_grads, reverse=True),
            slots.read_slots(v, grad_out, weights, value_grads, reverse=True),
        )
        states = {"key_states_ptr": key_states, "key_grads_ptr": key_grads}
        states |= {"value_states_ptr": value_states, "value_grads_ptr": value_grads}
        decay_grad = slots.decay_gradient(terms, write_grads, states, k.shape[3], v.shape[3])
        grad_gate = (decay_grad * torch.sigmoid(-gate.detach().float()) / job.temperature).to(gate.dtype)
        before = (
            None if then is None else grads[:, -1].view(then.shape).to(then.dtype)
            for grads, then in ((key_grads, keys), (value_grads, values))
        )  # fmt: skip
        return None, grad_q, grad_k, grad_v, grad_gate, *before


def _float32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().float()
