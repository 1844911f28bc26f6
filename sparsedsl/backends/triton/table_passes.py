"""Gradients of learned tables in the ``triton`` lowering: sums of the passes or of kernels of their own, spread over what was read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.backends.triton.launching import in_tiles
from sparsedsl.backends.triton.limits import LIMITS
from sparsedsl.backends.triton.prepared import Prepared
from sparsedsl.codegen.gradient_axes import LearnedRead
from sparsedsl.gpu.configs import Config
from sparsedsl.runtime.call import Call
from sparsedsl.runtime.table_gradients import add_read_gradients, joined_bands

__all__ = ["add_table_gradient", "summed_on_the_way"]

Tensor = torch.Tensor

# Launches a kernel for a tile size: name, number of programs, arguments beyond those of the pass.
Launch = Callable[[str, Callable[[int], tuple[int, Mapping[str, Any]]]], int]


def summed_on_the_way(reads: tuple[LearnedRead, ...], domain: Domain, device: torch.device) -> dict[str, Tensor]:
    """Room for the sums that the passes over queries and keys make, as arguments; the last dimension is that of units."""
    lengths = {"rows": domain.rows, "columns": domain.kv_len}
    return {
        f"{one.name}_ptr": torch.empty(
            (domain.batch, domain.heads, lengths[one.axis], one.width), dtype=torch.float32, device=device
        )
        for one in reads
        if one.axis in lengths
    }


def add_table_gradient(
    call: Call, prepared: Prepared, one: LearnedRead, total: Tensor, sums: Mapping[str, Tensor], run: Launch
) -> None:
    """Add the gradients of one read to ``total``, the float64 gradient of its table.

    ``run(name, work)``: launches the kernel of this name; ``work(block)`` says for a tile size how many programs there are, and their
    arguments.
    """
    device, given = total.device, call.domain
    own = {name: prepared.tables[f"{name}_table"] for name in (p.name for p in prepared.source.prepared)}
    domain = Domain(given.rows, given.kv_len, given.q_offset, given.batch, given.heads, {**given.tables, **own})
    q = torch.arange(domain.rows, device=device) + domain.q_offset
    kv = torch.arange(domain.kv_len, device=device)
    if one.axis in ("rows", "columns"):
        places = (q, kv[:1]) if one.axis == "rows" else (q[:1], kv)
        for n, read in enumerate(one.by_unit()):
            add_read_gradients(total, read, sums[f"{one.name}_ptr"][..., n], domain, *places)
    elif one.axis == "difference":
        _add_differences(prepared, one, total, domain, run)
    else:
        _add_pairs(one, total, domain, q, kv, run)


def _add_differences(prepared: Prepared, one: LearnedRead, total: Tensor, domain: Domain, run: Launch) -> None:
    assert prepared.differences is not None
    low, high = prepared.differences
    if low > high:
        return
    made: dict[int, Tensor] = {}

    def first_band(block: int) -> int:
        return (low - domain.q_offset) // block

    def work(block: int) -> tuple[int, Mapping[str, Any]]:
        first, last = first_band(block), -((domain.q_offset - high) // block)
        bands = last - first + 1
        shape = (domain.batch, domain.heads, bands, 2 * block)
        made[block] = torch.empty(shape, dtype=torch.float32, device=total.device)
        arguments = {f"{one.name}_ptr": made[block], "first_band": first, "bands": bands}
        return domain.batch * domain.heads * bands, arguments

    block = run(one.name, work)
    joined = joined_bands(made[block], block)
    # Entry i of band t is the diagonal t * block + i - block.
    differences = torch.arange(joined.shape[-1], device=total.device) + (first_band(block) - 1) * block + domain.q_offset
    add_read_gradients(total, one.read, joined, domain, differences, torch.zeros_like(differences))


def _add_pairs(one: LearnedRead, total: Tensor, domain: Domain, q: Tensor, kv: Tensor, run: Launch) -> None:
    lines = domain.batch * domain.heads
    step = max(1, LIMITS.now.pair_bytes // (4 * lines * domain.kv_len))
    for begin in range(0, domain.rows, step):
        end = min(begin + step, domain.rows)
        dims = (domain.batch, domain.heads, end - begin, domain.kv_len)
        sums = torch.empty(dims, dtype=torch.float32, device=total.device)

        def work(block: int, begin: int = begin, end: int = end, sums: Tensor = sums) -> tuple[int, Mapping[str, Any]]:
            programs = in_tiles(end - begin, block) * in_tiles(domain.kv_len, block) * lines
            return programs, {f"{one.name}_ptr": sums, "row_begin": begin, "row_end": end}

        run(one.name, work)
        add_read_gradients(total, one.read, sums, domain, q[begin:end, None], kv)


def side_of(config: Config) -> int:
    """The side of the square tiles of these kernels."""
    return min(config.block_m, config.block_n)
