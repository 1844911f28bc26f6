"""What a backend has for the attentions of a program: the kernels that are called, and what they are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.remembered import Remembered
from sparsedsl.analysis.spans import span_rows, spans
from sparsedsl.analysis.units import constant_in_units
from sparsedsl.backends.tiled.scan_linear import linear_scan
from sparsedsl.backends.tiled.scan_slots import slot_scan
from sparsedsl.backends.tiled.selected import picked_attention
from sparsedsl.errors import UnsupportedError
from sparsedsl.execute.compiled import Attention
from sparsedsl.lang.expressions import Mask, as_mask, b, h, kv_idx, q_idx, score, table
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.steps import evaluate
from sparsedsl.lang.symbols import HEAD
from sparsedsl.program.branches import Attend
from sparsedsl.program.decided import pairs_decided_by
from sparsedsl.program.graph import Program
from sparsedsl.program.select import Select
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.heads import spread
from sparsedsl.selection.selected import Picks

__all__ = ["FlexKernels", "Kernels", "TorchKernels", "TritonKernels", "kernels_of", "triton_refusal"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class Kernels:
    """Base: attention over static masks by the ordinary lowerings."""

    backend: str
    # Entries of queries x units that a score may read as a table.
    most_table_entries: int = 1 << 24
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

    def inside(self, mask: Any, choice: Select, domain: Domain, device: torch.device) -> Any:
        """Which pairs of a picked unit attend, as :meth:`picked` takes it; None where all do.

        All do if the mask is the very one that made the units candidates, and says the same of all keys of a unit and of all query heads
        that share a choice: a unit is a candidate already if one of its pairs is allowed for one of these heads.
        """
        by_head = HEAD in mask.free_symbols and choice.axes[1] != "heads"
        made = choice.among is not None and mask == choice.among.expr and constant_in_units(mask, 1, choice.units[1])
        if mask == sympy.true or (made and not by_head):
            return None
        return self.rule_inside(mask, domain, device)

    def rule_inside(self, mask: Any, domain: Domain, device: torch.device) -> Any:
        """A mask as the kernels of this backend take it."""

        def rule(batch: slice, heads: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            env: dict[str, Any] = {**domain.lengths, **domain.tables}
            env |= {"b": batch.start, "h": heads.view(-1, 1, 1), "q_idx": q[:, None], "kv_idx": kv}
            allowed = evaluate(mask, env)
            return allowed.expand(kv.shape if allowed.ndim <= 2 else (len(heads), *kv.shape))

        return rule

    def picked(self, q: Any, k: Any, v: Any, picks: Picks, **words: Any) -> tuple[Tensor, Tensor]:
        """Attention along lists: see :func:`~sparsedsl.backends.tiled.selected.picked_attention`."""
        return picked_attention(q, k, v, picks, **words)

    def two_passes(self, *tensors: Any, **words: Any) -> Tensor:
        """Weighed chunks where choices are tables: see :class:`FlexKernels`."""
        raise UnsupportedError(f"backend {self.backend!r} weighs chunks along lists; only 'flex' does it in two passes")

    def slots(self, *tensors: Any, **words: Any) -> Any:
        """See :func:`~sparsedsl.backends.tiled.scan_slots.slot_scan`."""
        return slot_scan(*tensors, **words)

    def linear(self, *tensors: Any, **words: Any) -> Any:
        """See :func:`~sparsedsl.backends.tiled.scan_linear.linear_scan`."""
        return linear_scan(*tensors, **words)


# Keys in a chunk that the kernels hold at a time.
LONGEST_UNIT = 128
_INTERVALS: Remembered[Any] = Remembered(64)


def one_interval(mask: Any, domain: Domain) -> tuple[Tensor, Tensor] | None:
    """First and last key of each query, if these are all it sees: ``(B|1, H|1, Sq)`` each, where the tables are (on the host without any).

    Of several intervals at most one may hold keys: conditions that exclude each other are two intervals, of which one is empty.
    """
    found = spans(mask)
    if found is None or not found:
        return None
    ends = [torch.broadcast_tensors(*parts) for parts in zip(*(span_rows(span, domain) for span in found), strict=True)]
    first, last = (torch.stack(parts) for parts in ends)
    holds = last >= first
    if len(found) > 1 and bool((holds.sum(0) > 1).any()):
        return None
    return torch.where(holds, first, domain.kv_len).amin(0), torch.where(holds, last, -1).amax(0)


_ATTENTIONS: Remembered[Any] = Remembered(256)


class TorchKernels(Kernels):
    """Plain torch, on any device."""

    def lowering(self, *, new_tables: bool) -> str:
        """For ``auto`` not FlexAttention where tables are new: weighing it up would cost lists of its own at every call."""
        return "tiled" if self.backend == "auto" and new_tables else self.backend


class FlexKernels(Kernels):
    """FlexAttention: it reads choices as tables, and weighs chunks in a second pass."""

    def two_passes(
        self, q: Tensor, k: Tensor, v: Tensor, picks: Picks, weights: Tensor, inside: Any, *, scale: float, q_offset: int, one: bool,
        tables: Mapping[str, Tensor],
    ) -> Tensor:  # fmt: skip
        """``sum_c w_c softmax_c(logits) V`` as one softmax over all picked chunks with ``logit + log w_c - lse_c``.

        The first pass makes ``lse_c`` of every chunk, the second is FlexAttention with a bias of queries x chunks: for short sequences.
        """
        unit = picks.kv_unit
        lses = self.chunk_lses(q, k, unit, inside, scale, q_offset, tables)
        lses = torch.logaddexp(lses, torch.zeros_like(lses)) if one else lses
        weight = spread(picks.scattered(weights), q.shape[1])
        row, column = q_idx - q_offset, kv_idx // unit
        chosen = table("chosen_units", dtype=bool)[b, h, row, column]
        bias = table("unit_bias", dtype=float, learned=True)[b, h, row, column]
        pattern = Pattern(as_mask(chosen) & Mask(inside), score + bias, None, scale)
        usable = (weight > 0) & (lses > float("-inf"))
        values = torch.where(usable, torch.log(torch.where(usable, weight, 1.0)) - torch.where(usable, lses, 0.0), float("-inf"))
        given = {
            "chosen_units": usable,
            "unit_bias": values.to(q.dtype),
            **{name: tables[name] for name in tables if name in pattern.tables},
        }
        out, _ = self.attend(pattern, q, k, v, given, q_offset=q_offset, scale=None, lse=False)
        plain = self.chunk_lses(q, k, unit, inside, scale, q_offset, tables) if one else lses
        shares = torch.where(usable, weight * torch.exp(torch.where(usable, plain - lses, 0.0)), 0.0)
        return out * shares.sum(-1, keepdim=True).to(out.dtype)

    def chunk_lses(
        self, q: Tensor, k: Tensor, unit: int, inside: Any, scale: float, q_offset: int, tables: Mapping[str, Tensor]
    ) -> Tensor:
        """LSE of the logits in every chunk, ``(B, Hq, Sq, chunks)``, one chunk after the other."""
        batch, heads, rows, _ = q.shape
        dtype = accumulated(q.dtype)
        env: dict[str, Any] = {"q_len": q_offset + rows, "kv_len": k.shape[2], **tables}
        env["b"] = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
        env["h"] = torch.arange(heads, device=q.device).view(-1, 1, 1)
        env["q_idx"] = torch.arange(q_offset, q_offset + rows, device=q.device)[:, None]
        found = []
        for start in range(0, k.shape[2], unit):
            keys = spread(k[:, :, start : start + unit], heads).to(dtype)
            logits = q.to(dtype) @ keys.transpose(-1, -2) * scale
            env["kv_idx"] = torch.arange(start, start + keys.shape[2], device=q.device)
            found.append(torch.where(evaluate(inside, env), logits, float("-inf")).logsumexp(-1))
        return torch.stack(found, dim=-1)

    def slots(self, *tensors: Any, **words: Any) -> Any:
        """FlexAttention knows no recurrence."""
        raise UnsupportedError(_no_recurrence("slots()"))

    def linear(self, *tensors: Any, **words: Any) -> Any:
        """FlexAttention knows no recurrence."""
        raise UnsupportedError(_no_recurrence("linear()"))


def _no_recurrence(what: str) -> str:
    return f"backend 'flex' cannot run {what}: FlexAttention has no state that runs along the keys. Use backend='tiled', 'triton' or 'auto'"


class TritonKernels(Kernels):
    """Generated kernels, and those of ``codegen/kernels``."""

    def rule_inside(self, mask: Any, domain: Domain, device: torch.device) -> Any:
        """The first and last key of each query; kernels take no other masks along lists."""
        from sparsedsl.backends.triton.selected import Interval

        tables = [domain.tables[name] for name in sorted(domain.tables)]
        key = (mask, domain.rows, domain.kv_len, domain.q_offset, domain.batch, domain.heads, device)
        ends = _INTERVALS.get(key, tables, lambda: one_interval(mask, domain))
        if ends is None:
            raise UnsupportedError(
                f"backend 'triton' cannot follow lists under the mask {Mask(mask)}: it is no single interval of keys for each query. "
                "Use backend='tiled'"
            )
        return Interval(*(end.to(device) for end in ends))

    def picked(self, q: Any, k: Any, v: Any, picks: Picks, **words: Any) -> tuple[Tensor, Tensor]:
        """As kernels: adjacent queries share the union of their chunks. Under one softmax long chunks are so many short ones."""
        fits = [size for size in range(16, LONGEST_UNIT + 1) if picks.kv_unit % size == 0]
        if words.get("weights") is None and picks.kv_unit > LONGEST_UNIT and fits:
            picks = picks.finer(fits[-1], k.shape[2])
        return self._modules["picked"](q, k, v, picks, **words)

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
        from sparsedsl.backends.triton.selected import picked_attention_triton

        return {"picked": picked_attention_triton, "slots": slot_scan_triton, "linear": linear_scan_triton}


def kernels_of(backend: str, *, triton: bool) -> Kernels:
    """The kernels of a backend. ``triton``: whether ``auto`` may use generated kernels for this call."""
    if backend == "flex":
        return FlexKernels("flex", whole_tables=True)
    if backend == "triton" or (backend == "auto" and triton):
        return TritonKernels(backend)
    return TorchKernels(backend, whole_tiles=True)


def triton_refusal(program: Program) -> str | None:
    """Why the kernels that follow lists cannot run a program, as far as its declaration tells, or None."""
    for node in program.everything:
        single = [choice for choice in node.selections if choice.units[0] == 1] if isinstance(node, Attend) else []
        if not isinstance(node, Attend) or not single:
            continue
        unit = single[0].units[1]
        if node.normaliser is not None and unit > LONGEST_UNIT:
            return f"the kernels weigh chunks of up to {LONGEST_UNIT} keys; these have {unit}"
        name = next(name for name, bound in node.pattern.mask.bound.items() if bound is single[0])
        if spans(pairs_decided_by(node.pattern.mask, name)[0].expr) is None:
            return f"the kernels follow lists under one interval of keys for each query; {node.label} has another mask"
    return None
