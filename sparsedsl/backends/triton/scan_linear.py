"""Decayed linear attention on Triton kernels: what ``linear.linear_scan`` computes, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsedsl.backends.triton.config_choice import target_of
from sparsedsl.backends.triton.launching import in_tiles
from sparsedsl.backends.triton.scan_pass import ScanTiles, carried, filled, launch, operands, plain, precision_of, refuse
from sparsedsl.gpu.loading import interpreted
from sparsedsl.gpu.targets import Target
from sparsedsl.runtime.autograd import only_first_derivatives
from sparsedsl.runtime.scan_calls import check_linear

__all__ = ["linear_scan_triton", "linear_tiles"]

Tensor = torch.Tensor


def linear_scan_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    q_offset: int = 0,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    tiles: ScanTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """``linear_scan`` on a GPU, or where Triton interprets kernels: the same arguments, results, refusals and gradients.

    Deterministic; sums and states in float32; k and v are never copied for the query heads that share them. A new length compiles
    nothing. Memory beside inputs and results: a float32 state ``(D, Dv)`` a query head and ``tiles.chunk`` positions, forward; two of
    them, backward.

    Args:
        tiles: how it is cut and launched; by default :func:`linear_tiles`. The others are described at ``linear_scan``.

    Raises:
        ShapeError: as ``linear_scan``.
        UnsupportedError: float64, a head_dim above 256, no GPU and no interpreter.

    Example:
        >>> x = torch.ones(1, 1, 4, 1, dtype=torch.float64)
        >>> linear_scan_triton(x, x, x, torch.tensor([0.5]).log(), scale=1.0)
        Traceback (most recent call last):
            ...
        sparsedsl.errors.UnsupportedError: linear_scan_triton: states are float32, too coarse for float64 inputs; use linear_scan
    """
    call = check_linear(q, k, v, log_decay, scale=scale, q_offset=q_offset, state=state, documents=documents)
    widths = {"head_dim": q.shape[3], "the head_dim of v": v.shape[3]}
    refuse("linear_scan_triton", q, widths, "linear_scan")
    tiles = tiles or linear_tiles(q.dtype, q.shape[3], v.shape[3], target_of(q.device))
    number = None if call.number is None else call.number.to(torch.int32)
    job = _LinearCall(log_decay.detach().float().contiguous(), call.scale, call.q_offset, number, tiles)
    out, last = _LinearScan.apply(job, q, k, v, state)
    return out, last


def linear_tiles(dtype: torch.dtype, width: int, width_v: int, target: Target) -> ScanTiles:
    """Tiles that spill nothing on the targets that kernels are built for; chosen by compiling, not by the clock."""
    if interpreted():
        return ScanTiles(32, 16, 16, 4)
    widest, half = filled(max(width, width_v)), dtype != torch.float32
    # A thread of an AMD processor has twice the registers, and half as many if there are eight warps.
    most = 4 if target.backend == "hip" else 8
    return ScanTiles(
        chunk=256 if half else 128, block=32 if half and widest <= 64 else 16, columns=32 if widest <= 128 else 16,
        warps=4 if widest <= (128 if half else 64) else most,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _LinearCall:
    """A call without the tensors that autograd keeps. ``documents``: the number of each position's document, int32."""

    log_decay: Tensor
    scale: float
    q_offset: int
    documents: Tensor | None
    tiles: ScanTiles


@dataclass(frozen=True, eq=False)
class _LinearPass:
    """One direction of a scan over ``length`` positions: rows of b and c begin at ``first``, each read by ``shared`` heads with decays."""

    job: _LinearCall
    b: Tensor
    c: Tensor
    length: int
    first: int
    shared: int
    reverse: bool

    def values(self) -> dict[str, Any]:
        """Arguments that all kernels of the pass have."""
        documents, tiles = self.job.documents, self.job.tiles
        several = documents is not None and documents.shape[0] > 1
        return {
            "log_decay_ptr": self.job.log_decay, "documents_ptr": self.job.log_decay if documents is None else documents,
            "documents_stride_b": documents.stride(0) if documents is not None and several else 0,
            "first": self.first, "rows": self.b.shape[2], "length": self.length, "chunks": in_tiles(self.length, tiles.chunk),
            "SHARED": self.shared, "CHUNK": tiles.chunk, "BLOCK": tiles.block, "REVERSE": self.reverse,
            "HAS_DOCUMENTS": documents is not None, "PRECISION": precision_of(self.b),
        }  # fmt: skip

    def states(self, initial: Tensor | None) -> Tensor:
        """The state before each chunk and after the last ``(B * heads, chunks + 1, width of b, width of c)``, heads with decays."""
        from sparsedsl.codegen.kernels import linear_scan as kernels

        tiles, batch, width_b, width_c = self.job.tiles, self.b.shape[0], self.b.shape[3], self.c.shape[3]
        heads, chunks = self.job.log_decay.shape[0], in_tiles(self.length, tiles.chunk)
        states = self.b.new_empty((batch * heads, chunks + 1, width_b, width_c), dtype=torch.float32)
        factors = states.new_empty((batch * heads, chunks, 1))
        block_b, block_c = min(filled(width_b), 32), min(filled(width_c), 64)
        values = self.values() | operands(b=self.b, c=self.c) | {
            "states_ptr": states, "factors_ptr": factors, "heads": heads, "WIDTH_B": width_b, "WIDTH_C": width_c, "BLOCK_B": block_b,
            "BLOCK_C": block_c,
        }  # fmt: skip
        parts = in_tiles(width_b, block_b) * in_tiles(width_c, block_c)
        launch(kernels.sum_chunks, parts * chunks * batch * heads, values, warps=4)
        return carried(kernels.carry, states, factors, initial)

    def read(self, a: Tensor, y: Tensor, states: Tensor, *, a_first: int, summed: int, transposed: bool, scale: float) -> Tensor:
        """Fill ``y``, whose rows and heads are those of ``a``. ``transposed``: the rows of a state belong to c, of this pass, not to a."""
        from sparsedsl.codegen.kernels import linear_scan as kernels

        tiles, (batch, heads, rows, width), width_c = self.job.tiles, a.shape, self.c.shape[3]
        first_chunk, count = 0, in_tiles(self.length, tiles.chunk)
        if not self.reverse:  # nobody asks for what lies before the queries or after them
            first_chunk = a_first // tiles.chunk
            count = (a_first + rows - 1) // tiles.chunk - first_chunk + 1 if rows else 0
        block_c = min(filled(width_c), tiles.columns)
        values = self.values() | operands(a=a, b=self.b, c=self.c, y=y) | {
            "states_ptr": states, "a_first": a_first, "a_rows": rows, "heads": heads, "first_chunk": first_chunk,
            "read_chunk_count": count, "scale": scale, "SUMMED": summed, "WIDTH_A": width, "WIDTH_C": width_c, "BLOCK_A": filled(width),
            "BLOCK_C": block_c, "TRANSPOSED": transposed,
        }  # fmt: skip
        launch(kernels.read_chunks, in_tiles(width_c, block_c) * count * batch * heads, values, warps=tiles.warps)
        return y


class _LinearScan(torch.autograd.Function):
    """Inputs: a job, q, k, v, and the state or None."""

    @staticmethod
    def forward(job: _LinearCall, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = plain(q, k, v)
        (batch, heads, q_len, width), width_v = q.shape, v.shape[3]
        forward = _LinearPass(job, k, v, k.shape[2], 0, heads // k.shape[1], reverse=False)
        states = forward.states(None if state is None else state.detach().float())
        out = q.new_empty((batch, heads, q_len, width_v))
        forward.read(q, out, states, a_first=job.q_offset, summed=1, transposed=False, scale=job.scale)
        return out, states[:, -1].clone().view(batch, heads, width, width_v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.job = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @only_first_derivatives
    def backward(ctx: Any, grad_out: Tensor | None, grad_last: Tensor | None) -> Any:
        job, (q, k, v, state) = ctx.job, ctx.saved_tensors
        q, k, v = plain(q, k, v)
        group, length = q.shape[1] // k.shape[1], k.shape[2]
        (grad_out,) = plain(q.new_zeros((*q.shape[:3], v.shape[3])) if grad_out is None else grad_out)
        _, need_q, need_k, need_v, need_state = ctx.needs_input_grad
        grad_q = grad_k = grad_v = grad_state = None
        if need_q:
            forward = _LinearPass(job, k, v, length, 0, group, reverse=False)
            states = forward.states(None if state is None else state.detach().float())
            by_value = replace(forward, b=v, c=k)
            grad_q = by_value.read(
                grad_out, torch.empty_like(q), states, a_first=job.q_offset, summed=1, transposed=True, scale=job.scale
            )
        # The pass backward carries gradients of the state divided by the scale, so that everything read from it is multiplied once.
        backward = _LinearPass(job, q, grad_out, length, job.q_offset, 1, reverse=True)
        states = backward.states(None if grad_last is None else grad_last.detach().float() / job.scale)
        kind = k.dtype if group == 1 else torch.float32  # sums over a group's heads are rounded once
        read: dict[str, Any] = {"states": states, "a_first": 0, "summed": group, "scale": job.scale}
        if need_k:
            by_value = replace(backward, b=grad_out, c=q)
            grad_k = by_value.read(v, k.new_empty(k.shape, dtype=kind), transposed=True, **read).to(k.dtype)
        if need_v:
            grad_v = backward.read(k, v.new_empty(v.shape, dtype=kind), transposed=False, **read).to(v.dtype)
        if need_state:
            grad_state = (states[:, -1].view(state.shape) * job.scale).to(state.dtype)
        return None, grad_q, grad_k, grad_v, grad_state
