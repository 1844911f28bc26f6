"""What a backend has for the attentions of a program: the kernels that are called, and what they are told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch

from sparsedsl.analysis.caches import Cache
from sparsedsl.backends.tiled.scan_linear import linear_scan
from sparsedsl.backends.tiled.scan_slots import slot_scan
from sparsedsl.backends.tiled.selected import selected_attention
from sparsedsl.errors import UnsupportedError
from sparsedsl.execute.compiled import Attention
from sparsedsl.execute.mask_split import split_node
from sparsedsl.lang.expressions import Mask, Score, as_mask, b, h, kv_idx, q_idx, table
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.steps import evaluate
from sparsedsl.lang.symbols import SCORE
from sparsedsl.program.branches import Attend
from sparsedsl.program.graph import Program
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.heads import spread
from sparsedsl.selection.selected_call import SelectedCall

__all__ = ["FlexKernels", "Kernels", "TorchKernels", "TritonKernels", "kernels_of", "triton_refusal"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class Kernels:
    """Base: attention over static masks by the ordinary lowerings."""

    backend: str
    # Whether choices for single queries are handed over as whole tables.
    whole_tables: bool = False
    # Whether lists of full tiles are run as they are.
    whole_tiles: bool = False

    def attend(
        self,
        pattern: Pattern,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tables: Mapping[str, Tensor],
        *,
        q_offset: int,
        scale: Any,
        lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over a mask that reads tables only: ``out``, and the LSE where it is wanted."""
        attention = self.attention(pattern, new_tables=bool(tables))
        result = attention.attend_now(q, k, v, tables, q_offset=q_offset, return_lse=lse, scale=scale)
        return result if lse else (result, None)

    def attention(self, pattern: Pattern, *, new_tables: bool) -> Any:
        """The compiled pattern, remembered with its lists. ``new_tables``: it reads tables, which may be others at every call."""
        backend = self.lowering(new_tables=new_tables)
        return _ATTENTIONS.get((pattern, backend, new_tables), [], lambda: Attention(pattern, backend, minimal=not new_tables))

    def lowering(self, *, new_tables: bool) -> str:
        """What plain attention runs on."""
        return self.backend

    def selected(self, q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall) -> tuple[Tensor, Tensor]:
        """Attention along lists: see :func:`~sparsedsl.backends.tiled.selected.selected_attention`."""
        return selected_attention(q, k, v, selected)

    def two_passes(self, q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall) -> Tensor:
        """Weighed chunks where choices are tables: see :class:`FlexKernels`."""
        raise UnsupportedError(f"backend {self.backend!r} weighs chunks along lists; only 'flex' does it in two passes")

    def slots(self, *tensors: Any, **words: Any) -> Any:
        """See :func:`~sparsedsl.backends.tiled.scan_slots.slot_scan`."""
        return slot_scan(*tensors, **words)

    def linear(self, *tensors: Any, **words: Any) -> Any:
        """See :func:`~sparsedsl.backends.tiled.scan_linear.linear_scan`."""
        return linear_scan(*tensors, **words)


_ATTENTIONS: Cache[Any] = Cache()


class TorchKernels(Kernels):
    """Plain torch, on any device."""

    def lowering(self, *, new_tables: bool) -> str:
        """For ``auto`` not FlexAttention where tables are new: weighing it up would cost lists of its own at every call."""
        return "tiled" if self.backend == "auto" and new_tables else self.backend


class FlexKernels(Kernels):
    """FlexAttention: it reads choices as tables, and weighs chunks in a second pass."""

    def two_passes(self, q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall) -> Tensor:
        """``sum_c w_c softmax_c(logits) V`` as one softmax over all picked chunks with ``logit + log w_c - lse_c``.

        The first pass makes ``lse_c`` of every chunk, the second is FlexAttention with a bias of queries x chunks: for short sequences.
        """
        picks, one, offset = selected.blocks, selected.one, selected.domain.q_offset
        assert selected.weights is not None
        plain = chunk_lses(q, k, selected)
        lses = torch.logaddexp(plain, torch.zeros_like(plain)) if one else plain
        weight = spread(picks.scattered(selected.weights), q.shape[1])
        row, column = q_idx - offset, kv_idx // picks.kv_unit
        chosen = table("chosen_units", dtype=bool)[b, h, row, column]
        bias = table("unit_bias", dtype=float, learned=True)[b, h, row, column]
        pattern = Pattern(as_mask(chosen) & Mask(selected.mask), Score(selected.score) + bias, None, selected.scale)
        usable = (weight > 0) & (lses > float("-inf"))
        values = torch.where(usable, torch.log(torch.where(usable, weight, 1.0)) - torch.where(usable, lses, 0.0), float("-inf"))
        given = {name: value for name, value in selected.tables.items() if name in pattern.tables}
        given |= {"chosen_units": usable, "unit_bias": values.to(q.dtype)}
        out, _ = self.attend(pattern, q, k, v, given, q_offset=offset, scale=None, lse=False)
        shares = torch.where(usable, weight * torch.exp(torch.where(usable, plain - lses, 0.0)), 0.0)
        return out * shares.sum(-1, keepdim=True).to(out.dtype)

    def slots(self, *tensors: Any, **words: Any) -> Any:
        """FlexAttention knows no recurrence."""
        raise UnsupportedError(_no_recurrence("slots()"))

    def linear(self, *tensors: Any, **words: Any) -> Any:
        """FlexAttention knows no recurrence."""
        raise UnsupportedError(_no_recurrence("linear()"))


def chunk_lses(q: Tensor, k: Tensor, selected: SelectedCall) -> Tensor:
    """LSE of the logits in every chunk, ``(B, Hq, Sq, chunks)``, one chunk after the other."""
    batch, heads, rows, _ = q.shape
    dtype, unit, offset = accumulated(q.dtype), selected.blocks.kv_unit, selected.domain.q_offset
    env: dict[str, Any] = {**selected.domain.lengths, **selected.tables}
    env["b"] = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
    env["h"] = torch.arange(heads, device=q.device).view(-1, 1, 1)
    env["q_idx"] = torch.arange(offset, offset + rows, device=q.device)[:, None]
    found = []
    for start in range(0, k.shape[2], unit):
        keys = spread(k[:, :, start : start + unit], heads).to(dtype)
        logits = q.to(dtype) @ keys.transpose(-1, -2) * selected.scale
        env["kv_idx"] = torch.arange(start, start + keys.shape[2], device=q.device)
        allowed = evaluate(selected.mask, env)
        if selected.score != SCORE:  # which may be anything where a pair is masked, and have any derivative
            env["score"] = torch.where(allowed, logits, 1.0)
            logits = evaluate(selected.score, env, dtype=dtype).to(dtype).expand(logits.shape)
        found.append(torch.where(allowed, logits, float("-inf")).logsumexp(-1))
    return torch.stack(found, dim=-1)


def _no_recurrence(what: str) -> str:
    return f"backend 'flex' cannot run {what}: FlexAttention has no state that runs along the keys. Use backend='tiled', 'triton' or 'auto'"


class TritonKernels(Kernels):
    """Generated kernels, and those of ``codegen/kernels``."""

    def selected(self, q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall) -> tuple[Tensor, Tensor]:
        """As kernels: adjacent queries share the union of their chunks."""
        return self._modules["selected"](q, k, v, selected)

    def slots(self, *tensors: Any, **words: Any) -> Any:
        """As kernels."""
        return self._modules["slots"](*tensors, **words)

    def linear(self, *tensors: Any, **words: Any) -> Any:
        """As kernels."""
        return self._modules["linear"](*tensors, **words)

    @cached_property
    def _modules(self) -> dict[str, Any]:
        from sparsedsl.backends.triton.scan_linear import linear_scan_triton
        from sparsedsl.backends.triton.scan_slots import slot_scan_triton
        from sparsedsl.backends.triton.selected import selected_attention

        return {"selected": selected_attention, "slots": slot_scan_triton, "linear": linear_scan_triton}


def kernels_of(backend: str, *, triton: bool) -> Kernels:
    """The kernels of a backend. ``triton``: whether ``auto`` may use generated kernels for this call."""
    if backend == "flex":
        return FlexKernels("flex", whole_tables=True)
    if backend == "triton" or (backend == "auto" and triton):
        return TritonKernels(backend)
    return TorchKernels(backend, whole_tiles=True)


def triton_refusal(program: Program, dtype: torch.dtype, widest: int) -> str | None:
    """Why the kernels that follow lists cannot run a program, as far as its declaration tells, or None.

    ``dtype``: of q, k and v; ``widest``: of their heads.
    """
    from sparsedsl.backends.triton.selected import refusal, written

    for node in program.everything:
        parts = split_node(node) if isinstance(node, Attend) else None
        if not isinstance(node, Attend) or parts is None or parts.selected == sympy.false:
            continue
        unit = math.gcd(*(choice.units[1] for choice in parts.choices))
        lacks = refusal(dtype, widest, unit, weighted=node.normaliser is not None)
        if lacks is None:
            try:
                written(parts.selected, node.pattern.score.expr, tuple(symbol.name for symbol in parts.symbols), {})
            except UnsupportedError as error:
                lacks = str(error).split(". Use ")[0]
        if lacks is not None:
            return f"{program.labels[node]}: {lacks}"
    return None
