"""Linear attention whose decays come with the data on Triton kernels: what ``scan_gated`` computes, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sparsedsl.backends.triton.config_choice import target_of
from sparsedsl.backends.triton.launching import in_tiles
from sparsedsl.backends.triton.limits import LIMITS
from sparsedsl.backends.triton.scan_pass import ScanTiles, filled, launch, operands, plain, precision_of, refuse
from sparsedsl.gpu.loading import interpreted
from sparsedsl.gpu.targets import Target
from sparsedsl.runtime.autograd import only_first_derivatives
from sparsedsl.runtime.call import wants_grad
from sparsedsl.runtime.scan_calls import GatedCall, check_gated

__all__ = ["gated_scan_triton", "gated_tiles"]

Tensor = torch.Tensor


def gated_scan_triton(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None = None, erase: Tensor | None = None, *, scale: float,
    q_offset: int = 0, state: Tensor | None = None, documents: Tensor | None = None, tiles: ScanTiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``gated_scan`` on a GPU, or where Triton interprets kernels: the same arguments, results, refusals and gradients.

    Deterministic; sums and states in float32; no tensor is copied for the heads that share it. A new length compiles nothing. Memory
    beside inputs and results, in float32: a state ``(D, Dv)`` and a square of ``tiles.chunk`` rows for each such chunk and head of results
    (by the delta rule another, and a value a key); backward twice that.

    Args:
        tiles: how it is cut and launched; by default :func:`gated_tiles`. The others are described at ``gated_scan``.

    Raises:
        ShapeError: as ``gated_scan``.
        UnsupportedError: float64, a head_dim above 256, no GPU and no interpreter.

    Example:
        >>> x = torch.ones(1, 1, 4, 1, dtype=torch.float64)
        >>> gated_scan_triton(x, x, x, torch.zeros(1, 1, 4), scale=1.0)
        Traceback (most recent call last):
            ...
        sparsedsl.errors.UnsupportedError: gated_scan_triton: states are float32, too coarse for float64 inputs; use gated_scan
    """
    call = check_gated(q, k, v, log_decay, beta, erase, scale=scale, q_offset=q_offset, state=state, documents=documents)
    refuse("gated_scan_triton", q, {"head_dim": q.shape[3], "the head_dim of v": v.shape[3]}, "gated_scan")
    vector = log_decay.ndim == 4
    tiles = tiles or gated_tiles(q.dtype, q.shape[3], v.shape[3], vector=vector, target=target_of(q.device))
    number = None if call.number is None else call.number.to(torch.int32)
    job = _GatedJob(call, number, tiles)
    given = [t for t in (q, k, v, log_decay, beta, erase, state) if t is not None]
    if not wants_grad(*given) and k.shape[2] <= LIMITS.now.scan_steps:
        return _GatedPass.of(job, q, k, v, log_decay, beta, erase).steps(state)
    out, last = _GatedScan.apply(job, q, k, v, log_decay, beta, erase, state)
    return out, last


def gated_tiles(dtype: torch.dtype, width: int, width_v: int, *, vector: bool, target: Target) -> ScanTiles:
    """Tiles for a scan of ``chunk`` rows at a time; ``block`` channels of keys and ``columns`` of values. Chosen by compiling, not by the
    clock: what spills least on the targets that kernels are built for."""
    if interpreted():
        return ScanTiles(16, 16, 16, 4)
    small = vector or dtype == torch.float32 or max(width, width_v) > 128
    # A thread of an AMD processor has twice the registers, and half as many if there are eight warps.
    return ScanTiles(chunk=32, block=16, columns=16 if small else 32, warps=4 if target.backend == "hip" else 8)


@dataclass(frozen=True, eq=False)
class _GatedJob:
    """A call without the tensors that autograd keeps. ``documents``: the number of each key's document, int32."""

    call: GatedCall
    documents: Tensor | None
    tiles: ScanTiles


@dataclass(frozen=True, eq=False)
class _GatedPass:
    """The tensors of a call as kernels read them: log decays ``(1 or B, Hg, Skv)`` or with channels, and beta, contiguous in float32."""

    job: _GatedJob
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor | None
    erase: Tensor | None

    @staticmethod
    def of(
        job: _GatedJob, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, erase: Tensor | None
    ) -> _GatedPass:
        q, k, v = plain(q, k, v)
        beta = None if beta is None else beta.detach().float().contiguous()
        erase = None if erase is None else plain(erase)[0]
        return _GatedPass(job, q, k, v, log_decay.detach().float().contiguous(), beta, erase)

    @property
    def heads(self) -> int:
        """Heads of results."""
        return max(self.q.shape[1], self.job.call.states)

    @property
    def lines(self) -> int:
        """States of all batch entries."""
        return self.q.shape[0] * self.job.call.states

    @property
    def chunks(self) -> int:
        return in_tiles(self.k.shape[2], self.job.tiles.chunk)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.q.shape[0], self.job.call.states, self.q.shape[3], self.v.shape[3]

    def empty(self, *shape: int) -> Tensor:
        """For numbers in float32."""
        return self.q.new_empty(shape, dtype=torch.float32)

    def values(self) -> dict[str, Any]:
        """Arguments that all kernels have."""
        tiles, states, documents = self.job.tiles, self.job.call.states, self.job.documents
        g, beta, batch = self.log_decay, self.beta, self.q.shape[0]
        erase = self.k if self.erase is None else self.erase.expand(batch, -1, -1, -1)

        def alone(t: Tensor | None) -> int:
            return 0 if t is None or t.shape[0] < batch else t.stride(0)

        return operands(q=self.q, k=self.k, erase=erase, v=self.v) | {
            "gate_ptr": g, "beta_ptr": g if beta is None else beta, "documents_ptr": g if documents is None else documents,
            "gate_stride_b": alone(g), "beta_stride_b": alone(beta), "documents_stride_b": alone(documents),
            "q_first": self.job.call.q_offset, "q_rows": self.q.shape[2], "length": self.k.shape[2], "heads": states,
            "chunks": self.chunks, "width": self.q.shape[3], "width_v": self.v.shape[3], "scale": self.job.call.scale,
            "READERS": self.heads // states if self.q.shape[2] else 0,
            "Q_SHARED": self.heads // self.q.shape[1], "K_SHARED": states // self.k.shape[1],
            "ERASE_SHARED": states // erase.shape[1], "ERASES": self.erase is not None, "V_SHARED": states // self.v.shape[1],
            "GATE_SHARED": states // g.shape[1], "BETA_SHARED": 1 if beta is None else states // beta.shape[1],
            "WIDTH": self.q.shape[3], "WIDTH_V": self.v.shape[3], "WHOLE": filled(self.q.shape[3]),
            "BLOCK": min(filled(self.q.shape[3]), tiles.block), "COLUMNS": min(filled(self.v.shape[3]), tiles.columns),
            "CHUNK": tiles.chunk, "levels": tiles.chunk.bit_length() - 1, "VECTOR": g.ndim == 4, "DELTA": beta is not None,
            "HAS_DOCUMENTS": documents is not None,
            "PRECISION": "tf32" if "tf32" in map(precision_of, (self.q, self.k, erase, self.v)) else "ieee",
        }  # fmt: skip

    @property
    def parts(self) -> int:
        """Blocks of columns of a state."""
        return in_tiles(self.v.shape[3], min(filled(self.v.shape[3]), self.job.tiles.columns))

    def steps(self, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """Results and last state, token by token."""
        from sparsedsl.codegen.kernels import gated_scan as kernels

        out, last = (
            self.q.new_empty((self.q.shape[0], self.heads, self.q.shape[2], self.v.shape[3])),
            self.empty(*self.state_shape),
        )
        first = last if initial is None else initial.detach().float().contiguous()
        values = self.values() | {"initial_ptr": first, "HAS_INITIAL": initial is not None, "states_ptr": last, "out_ptr": out}
        launch(kernels.step, self.parts * self.lines, values, warps=self.job.tiles.warps)
        return out, last

    def written(self, initial: Tensor | None) -> dict[str, Any]:
        """Values for the kernels that read: pairs, the inverse of the delta rule, u, the states before each chunk and after the last."""
        from sparsedsl.codegen.kernels import gated_scan as kernels

        chunk, chunks, warps = self.job.tiles.chunk, self.chunks, self.job.tiles.warps
        (_, _, width, width_v), delta = self.state_shape, self.beta is not None
        values = self.values()
        states = self.empty(self.lines, chunks + 1, width, width_v)
        pairs = self.empty(self.lines, values["READERS"], chunks, chunk, chunk)
        solve = self.empty(self.lines, chunks, chunk, chunk) if delta else pairs
        u = self.empty(self.q.shape[0], self.job.call.states, self.k.shape[2], width_v) if delta else self.v
        values |= operands(u=u) | {"ALIGN": values["ALIGN"]} | {
            "U_SHARED": 1 if delta else values["V_SHARED"], "pairs_ptr": pairs, "solve_ptr": solve, "written_ptr": u, "states_ptr": states,
            "initial_ptr": states if initial is None else initial.detach().float().contiguous(), "HAS_INITIAL": initial is not None,
        }  # fmt: skip
        if delta or values["READERS"]:
            launch(kernels.make_pairs, chunks * self.lines, values, warps=warps)
        launch(kernels.write_states, self.parts * self.lines, values, warps=warps)
        return values

    def read(self, values: dict[str, Any]) -> Tensor:
        """The results."""
        from sparsedsl.codegen.kernels import gated_scan as kernels

        first, rows, chunk = self.job.call.q_offset, self.q.shape[2], self.job.tiles.chunk
        out = self.q.new_empty((self.q.shape[0], self.heads, rows, self.v.shape[3]))
        count = (first + rows - 1) // chunk - first // chunk + 1 if rows else 0
        values = values | {"out_ptr": out, "first_chunk": first // chunk, "read_chunk_count": count}
        launch(kernels.read_states, self.parts * count * self.q.shape[0] * self.heads, values, warps=self.job.tiles.warps)
        return out

    def gradients(self, values: dict[str, Any], d_out: Tensor, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of q, k, v, log decays, beta, what erases, as the tensors are shared by heads and batch entries, and of the first state in
        float32."""
        from sparsedsl.codegen.kernels import gated_gradients as kernels

        (batch, states, width, width_v), length, warps = self.state_shape, self.k.shape[2], self.job.tiles.warps
        vector, blocks = values["VECTOR"], in_tiles(width, values["BLOCK"])
        kinds = [  # what several heads add up is rounded once
            t.dtype if t.shape[1] == heads else torch.float32
            for t, heads in ((self.q, self.heads), (self.k, states), (self.v, states))
        ]
        d_q = self.q.new_empty((batch, self.heads, self.q.shape[2], width), dtype=kinds[0])
        d_k = self.k.new_empty((batch, states, length, width), dtype=kinds[1])
        d_v = self.v.new_empty((batch, states, length, width_v), dtype=kinds[2])
        d_gate = self.empty(batch, states, *((length, width) if vector else (blocks, length)))
        d_beta = None if self.beta is None else self.empty(batch, states, blocks, length)
        d_erase = None if self.erase is None else self.empty(batch, states, length, width)
        d_states = torch.empty_like(values["states_ptr"])
        through = d_states if d_beta is None else torch.empty_like(values["written_ptr"])
        values = values | operands(d_out=d_out) | {
            "ALIGN": min(values["ALIGN"], operands(d_out=d_out)["ALIGN"]), "d_last_ptr": d_states if d_last is None else d_last,
            "HAS_LAST": d_last is not None, "d_states_ptr": d_states, "through_ptr": through, "d_q_ptr": d_q, "d_k_ptr": d_k,
            "d_v_ptr": d_v, "d_erase_ptr": d_k if d_erase is None else d_erase,
            "d_gate_ptr": d_gate, "d_beta_ptr": d_gate if d_beta is None else d_beta,
        }  # fmt: skip
        launch(kernels.carry_back, self.parts * self.lines, values, warps=warps)
        launch(kernels.slopes, blocks * self.chunks * self.lines, values, warps=warps)
        found = (
            (d_q, self.q), (d_k, self.k), (d_v, self.v), (d_gate if vector else d_gate.sum(2), self.log_decay),
            (None if d_beta is None else d_beta.sum(2), self.beta), (d_erase, self.erase),
        )  # fmt: skip
        return *(None if t is None or d is None else _joined(d, t) for d, t in found), d_states[:, 0].view(self.state_shape)


def _joined(grad: Tensor, t: Tensor) -> Tensor:
    """The gradient of a tensor whose heads, and batch entries, serve several states."""
    if grad.shape[1] > t.shape[1]:
        grad = grad.unflatten(1, (t.shape[1], -1)).sum(2)
    return (grad.sum(0, keepdim=True) if grad.shape[0] > t.shape[0] else grad).to(t.dtype)


class _GatedScan(torch.autograd.Function):
    """Inputs: a job, q, k, v, log decays, beta or None, what erases or None, and the state or None."""

    @staticmethod
    def forward(
        job: _GatedJob,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor | None,
        erase: Tensor | None,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        forward = _GatedPass.of(job, q, k, v, log_decay, beta, erase)
        values = forward.written(state)
        return forward.read(values), values["states_ptr"][:, -1].clone().view(forward.state_shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.job = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @only_first_derivatives
    def backward(ctx: Any, grad_out: Tensor | None, grad_last: Tensor | None) -> Any:
        *tensors, state = ctx.saved_tensors
        if grad_out is None and grad_last is None:
            return (None,) * 8
        again = _GatedPass.of(ctx.job, *tensors)
        if grad_out is None:
            grad_out = again.q.new_zeros(again.q.shape[0], again.heads, again.q.shape[2], again.v.shape[3])
        (grad_out,) = plain(grad_out)
        found = again.gradients(
            again.written(state), grad_out, None if grad_last is None else grad_last.detach().float().contiguous()
        )
        *grads, by_state = found
        named = [None if t is None or g is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)]
        return None, *named, None if state is None or by_state is None else by_state.to(state.dtype)
