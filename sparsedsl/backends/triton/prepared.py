"""What calls of the same lengths and tables share in the ``triton`` lowering, worked out once on the device of the tables."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

import torch

from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.lists import BlockLists
from sparsedsl.backends.protocol import ListMaker
from sparsedsl.backends.triton.launching import row_offsets_end, tensor_arguments
from sparsedsl.backends.triton.limits import LIMITS
from sparsedsl.backends.triton.tile_lists import all_as_partial, interval_values, list_values
from sparsedsl.codegen.gradient_axes import rolled_reads
from sparsedsl.codegen.to_triton import TritonSource, Variant, triton_source, variant_of
from sparsedsl.gpu.configs import Work
from sparsedsl.gpu.costs import work_of
from sparsedsl.gpu.tuning_records import density_class
from sparsedsl.lang.normalisers import STICK_BREAKING
from sparsedsl.lang.pattern import Pattern
from sparsedsl.runtime.hoisted_tables import fill
from sparsedsl.runtime.table_gradients import allowed_differences

__all__ = ["Prepared", "prepare"]

# Rows of tiles at most where tiles are only counted.
COUNTED_ROWS = 256


@dataclass(eq=False)
class Prepared:
    """``lengths`` and ``device`` of the calls it is for: their domain without its tables, which live as long as their owner wants;
    ``read``: those of them that are not learned. ``tables``: prepared tables as arguments; ``differences``: range of ``q_idx - kv_idx``
    that gradients along diagonals need. Arguments of loops are made when a kernel asks for them."""

    pattern: Pattern
    lengths: Domain
    read: WeakValueDictionary[str, torch.Tensor]
    device: torch.device
    variant: Variant
    source: TritonSource
    tables: Mapping[str, Any]
    differences: tuple[int, int] | None
    lists: ListMaker
    _arrays: Cache[dict[str, Any]] = field(default_factory=Cache)

    @property
    def domain(self) -> Domain:
        """Lengths and tables of the calls it is for. Learned tables, which change with every step, are not among them."""
        return replace(self.lengths, tables=dict(self.read))

    @property
    def breaks(self) -> bool:
        """Whether a stick is broken."""
        return self.pattern.normaliser == STICK_BREAKING

    def loop(self, kernel: str, block: tuple[int, int]) -> dict[str, Any]:
        """Arguments of a kernel's loop over tiles, for tiles of ``block`` (queries, keys)."""
        of = "queries" if kernel == "grad_kv" else "keys"
        how = {"decode": self.variant.decode_keys, "grad_kv": self.variant.queries}.get(kernel, self.variant.keys)
        key = (of, how, block if how == "lists" else None)

        def make() -> dict[str, Any]:
            with torch.no_grad():
                if how == "lists":
                    lists = self.lists(self.domain, block)
                    return list_values(all_as_partial(lists) if self.breaks else lists, of, self.device)
                # the intervals of residues all have a closed form
                return (
                    interval_values(self.pattern, self.domain, of, self.device)
                    if self.variant.step == 1 or kernel == "decode"
                    else {}
                )

        return self._arrays.get(key, (), make)

    def reaching(self, arguments: Mapping[str, Any]) -> Prepared:
        """The same, able to reach every row of every tensor among the arguments of a launch (:func:`~.launching.strided`)."""
        if self.variant.placed:  # rows that are read by number lie as far as they like
            arguments = {name: value for name, value in arguments.items() if name not in ("k_stride_row", "v_stride_row")}
        return self._wider if row_offsets_end(arguments) >= 1 << 31 else self

    @functools.cached_property
    def _wider(self) -> Prepared:
        """With offsets of 64 bits; the loops over tiles are the same."""
        variant = replace(self.variant, wide=True, descriptors=False)
        return replace(self, variant=variant, source=triton_source(self.pattern, variant))

    @functools.cached_property
    def described(self) -> TritonSource | None:
        """The source that reads K and V through tensor descriptors; None where rows do not lie side by side, or too far."""
        if self.variant.step > 1 or self.variant.wide or self.variant.placed:
            return None
        return triton_source(self.pattern, replace(self.variant, descriptors=True))

    @functools.cached_property
    def work(self) -> Work:
        """How much there is to do, from lists so coarse that they are short."""
        return replace(work_of(self._coarse), descriptors=self.described is not None)

    @property
    def _coarse(self) -> BlockLists:
        side = max(128, 128 * (-(-max(self.domain.rows, self.domain.kv_len) // (128 * COUNTED_ROWS))))
        with torch.no_grad():
            return self.lists(self.domain, (side, side))

    @functools.cached_property
    def heavy_last(self) -> tuple[bool, bool]:
        """Whether the later half of the queries, and of the keys, has clearly more tiles: then programs had better begin there."""
        lists = self._coarse
        found = []
        for by_key in (False, True):
            parts = [part.transposed(lists.shape[3]) if by_key else part for part in (lists.full, lists.partial)]
            counts = (parts[0].counts + parts[1].counts).sum(dim=(0, 1)).float()
            half = counts.numel() // 2
            found.append(bool(half) and float(counts[-half:].sum()) > 1.2 * float(counts[:half].sum()))
        return found[0], found[1]

    @functools.cached_property
    def density(self) -> str:
        """The class of densities that tuning distinguishes."""
        width = self.work.row_width or 0.0
        return density_class(width / self.domain.kv_len, width)


def prepare(
    pattern: Pattern, domain: Domain, device: torch.device, widths: tuple[int, int], lists: ListMaker, *, placed: bool = False
) -> Prepared:  # fmt: skip
    """All that depends on no tensor but tables that are not learned. ``widths``: of heads of q and k, and of v. ``placed``: rows of keys
    are read by their numbers."""
    variant = variant_of(
        pattern,
        head_dim=widths[0],
        head_dim_v=widths[1],
        wide=max(domain.lengths.values()) > LIMITS.now.longest,
        wide_tables=frozenset(name for name, table in domain.tables.items() if table.numel() >= 1 << 31),
        own_key=domain.lengths["q_len"] <= domain.kv_len,
        placed=placed,
    )
    source = triton_source(pattern, variant)
    tables = {one.name: fill(one, domain).to(device) for one in source.prepared}
    differences = None
    if any(one.axis == "difference" for one in rolled_reads(source.pattern)):
        differences = allowed_differences(pattern, domain)
    fixed = {name: table for name, table in domain.tables.items() if not pattern.tables[name].learned}
    lengths, read = replace(domain, tables={}), WeakValueDictionary(fixed)
    return Prepared(pattern, lengths, read, device, variant, source, tensor_arguments(tables), differences, lists)
