"""What prepared tables hold: an expression at every difference of positions, or at every position, computed by torch."""

from __future__ import annotations

import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.codegen.hoisting import HoistedTable
from sparsedsl.lang.steps import evaluate

__all__ = ["fill"]


def fill(prepared: HoistedTable, domain: Domain) -> torch.Tensor:
    """The entries of a prepared table for a call, shape ``(entries,)``, on the device of the call's tables.

    bool, float32 (float64 if ``double``), or integers: int32 if they all fit, else int64. ``domain.tables`` must hold the tables
    it reads.

    >>> import sparsedsl as sd
    >>> from sparsedsl.codegen.hoisting import hoist
    >>> mask = sd.parse("f32_to_int64(f32_mul(f32_log(q_idx - kv_idx + 1), 3.5)) < 2")
    >>> fill(hoist(sd.attend(mask)).prepared[0], Domain(rows=3, kv_len=2))
    tensor([ True,  True, False, False])
    """
    q_len, kv_len = domain.lengths["q_len"], domain.kv_len
    match prepared.axis:
        case "difference":
            places = torch.arange(1 - kv_len, q_len, device=domain.device)
        case "query":
            places = torch.arange(q_len, device=domain.device)
        case "key":
            places = torch.arange(kv_len, device=domain.device)
        case _:
            places = torch.zeros(1, dtype=torch.int64, device=domain.device)
    # A pair of positions for each difference: any pair will do, since nothing else is looked at.
    positions = {"q_idx": places.clamp(min=0), "kv_idx": (-places).clamp(min=0) if prepared.axis == "difference" else places}
    dtype = torch.float64 if prepared.double else torch.float32
    values = evaluate(prepared.expr, {**positions, **domain.lengths, **domain.tables}, dtype=dtype).expand(places.shape)
    if values.dtype.is_floating_point:
        return values.to(dtype).contiguous()
    if values.dtype == torch.bool:
        return values.contiguous()
    limits = torch.iinfo(torch.int32)
    fits = bool((values >= limits.min).all() and (values <= limits.max).all())
    return values.to(torch.int32 if fits else torch.int64).contiguous()
