"""The kernels over picked chunks for one call: what they read beside the tensors, and the grids they run on.

Nothing here waits for the device or depends on what the lists hold; a new length compiles nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.backends.triton.config_choice import target_of
from sparsedsl.backends.triton.launching import in_tiles, is_aligned, like, on, strided, tensor_arguments, tiles_contiguous
from sparsedsl.backends.triton.limits import LIMITS
from sparsedsl.backends.triton.selected_configs import (
    SelectedShape,
    config_of,
    constants_of,
    function,
    most_rows,
    pack_of,
    rows_of,
)
from sparsedsl.backends.triton.selected_interval import Interval
from sparsedsl.backends.triton.selected_lists import Unions, by_chunk, unions
from sparsedsl.codegen.gradient_axes import LearnedRead
from sparsedsl.codegen.to_triton_selected import SelectedSource
from sparsedsl.gpu.configs import split_count
from sparsedsl.gpu.kernel_config import Shape
from sparsedsl.runtime.table_gradients import add_read_gradients
from sparsedsl.selection.selected_blocks import SelectedBlocks

__all__ = ["SelectedJob", "SelectedRun"]

Tensor = torch.Tensor
# Up to this many queries each has a tile of its own, and programs share its slots.
DECODE_ROWS = 16


@dataclass(frozen=True, eq=False)
class SelectedJob:
    """A call without the tensors that autograd keeps.

    ``inside``: which keys of a block attend, where that is all that ``source`` does not say. ``members``: see
    :class:`~sparsedsl.selection.selected_call.SelectedCall`. ``tables``: all that the kernels read, but the ``learned`` ones.
    """

    selected: SelectedBlocks
    scale: float
    inside: Interval | None
    softmax1: bool
    source: SelectedSource
    members: Tensor | None
    domain: Domain
    tables: Mapping[str, Tensor]
    learned: tuple[str, ...]


class SelectedRun:
    """One call on the device: shapes, lists, and launches."""

    def __init__(
        self,
        job: SelectedJob,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weights: Tensor | None,
        learned: Sequence[Tensor] = (),
        lists: Sequence[Tensor] = (),
    ) -> None:
        self.tables = {**job.tables, **{name: t.detach() for name, t in zip(job.learned, learned, strict=True)}}
        self.job, self.q, self.k, self.v = job, tiles_contiguous(q), tiles_contiguous(k), tiles_contiguous(v)
        self.weights = None if weights is None else weights.contiguous()
        self.indices = job.selected.indices
        self.batch, self.heads, self.rows, _ = q.shape
        self.kv_heads, self.kv_len = k.shape[1:3]
        self.width = self.indices.shape[3]
        self.target = target_of(q.device)
        tf32 = q.dtype == torch.float32 and q.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        group, precision = self.heads // self.kv_heads, "tf32" if tf32 else "ieee"
        self.shape = Shape(str(q.dtype).removeprefix("torch."), q.shape[3], v.shape[3], group, precision)
        self.pack = self._pack("selected_forward")
        self.queries = 1 if self.rows <= DECODE_ROWS else rows_of(self.pack, self._most("selected_forward")) // self.pack
        self.merged = self.queries > 1
        self.lists = Unions(lists[0], lists[1], lists[2], self.queries) if lists else self._lists()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to attend with or to."""
        return 0 in (self.batch, self.rows, self.kv_len, self.width)

    def _most(self, kernel: str) -> int:
        return most_rows(kernel, self.job.selected.kv_block, self.shape, self.target)

    def _pack(self, kernel: str) -> int:
        return pack_of(self.heads, self.kv_heads, self.indices.shape[1], self._most(kernel))

    def _lists(self) -> Unions:
        if self.merged and not self.is_empty:
            return unions(self.indices, self.queries, self.job.selected.blocks)
        chunks = self.indices.contiguous()
        return Unions(chunks, chunks, self.job.selected.counts.contiguous(), 1)

    @functools.cached_property
    def values(self) -> dict[str, Any]:
        """Arguments that several kernels have, by name."""
        none = self.lists.counts  # for a pointer that is not read
        inside, weights = self.job.inside, self.weights
        first = none if inside is None else inside.first
        # Of a dimension of size 1 all see the one entry.
        strides = [0 if inside is None or first.shape[dim] == 1 else first.stride(dim) for dim in range(2)]
        return {
            **strided("q", self.q), **strided("k", self.k), **strided("v", self.v),
            "weights_ptr": none if weights is None else weights, "chunks_ptr": self.lists.chunks,
            "owners_ptr": self.lists.owners, "counts_ptr": self.lists.counts,
            "first_ptr": first, "last_ptr": none if inside is None else inside.last,
            "first_stride_b": strides[0], "first_stride_h": strides[1],
            "heads": self.heads, "group": self.shape.group, "pack": self.pack, "queries": self.queries,
            "list_batch": self.indices.shape[0], "list_group": self.heads // self.indices.shape[1],
            "weight_group": 1 if weights is None else self.heads // weights.shape[1], "rows": self.rows, "kv_len": self.kv_len,
            "tiles": self.tiles, "width": self.width, "list_width": self.lists.chunks.shape[3], "scale": self.job.scale,
            "q_offset": self.job.domain.q_offset, "members_ptr": self.job.members, **tensor_arguments(self.tables),
        }  # fmt: skip

    @property
    def tiles(self) -> int:
        """Tiles of queries of one head."""
        return in_tiles(self.rows, self.queries)

    @property
    def programs(self) -> int:
        """Tiles of queries, over all batch entries and heads."""
        return self.tiles * self.batch * (self.heads // self.pack)

    def empty(self, *shape: int) -> Tensor:
        """Float32 on the device, not filled."""
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def launch(self, kernel: str, programs: int, values: Mapping[str, Any], *tensors: Tensor, **flags: bool) -> None:
        """Run one kernel. ``tensors``: those beside q, k and v whose rows it reads or writes in wide pieces."""
        chosen = SelectedShape(
            replace(self.shape, aligned=is_aligned(self.q, self.k, self.v, *tensors)), self.job.selected.kv_block, self.pack,
            self.weights is not None, self.job.softmax1, self.job.inside is not None, self.merged, bool(self.job.learned),
        )  # fmt: skip
        config = config_of(kernel, chosen, self.target)
        if kernel == "selected_grad_kv":
            programs *= in_tiles(chosen.chunk, config.block_n)
        source = self.job.source
        compiled, fixed = function(kernel, source), constants_of(kernel, chosen, config, source, **flags)
        arguments = [values[name] for name in compiled.arg_names if name not in fixed]
        options = {} if source.fp_fusion else {"enable_fp_fusion": False}
        with on(self.q.device):
            compiled[(programs,)](*arguments, **fixed, num_warps=config.warps, num_stages=config.stages, **options)

    # ---- passes ----

    def forward(self, *, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        """out, LSE, and with ``save`` the LSE of each row and slot (of a weighted call) for the backward pass."""
        dims = (self.batch, self.heads, self.rows)
        out, lse = like(self.q, self.v.shape[3]), self.empty(*dims)
        weighted = self.weights is not None
        if self.is_empty:
            return out.zero_(), lse.fill_(0.0 if self.job.softmax1 and not weighted else float("-inf")), lse
        save = save and weighted
        slot_lse = self.empty(*dims, self.width) if save else lse
        splits = 1 if self.merged else split_count(self.width, self.programs, self.target)
        share, share_lse = out[None], lse
        if splits > 1:
            share, share_lse = self.empty(splits, *dims, out.shape[3]), self.empty(splits, *dims)
        values = self.values | strided("out", share[0]) | {
            "out_ptr": share, "out_stride_s": share.stride(0), "lse_ptr": share_lse, "slot_lse_ptr": slot_lse, "splits": splits,
        }  # fmt: skip
        self.launch("selected_forward", self.programs * splits, values, SAVE=save, SPLIT=splits > 1)
        if splits > 1:
            values |= strided("out", out) | {"share_ptr": share, "share_lse_ptr": share_lse, "lse_ptr": lse, "lines": lse.numel()}
            self.launch("selected_merge", lse.numel(), values)
        return out, lse, slot_lse

    def backward(
        self, out: Tensor, lse: Tensor, slot_lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, *, keys: bool
    ) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, the weights, and the learned tables; of k and v only with ``keys``."""
        weighted = self.weights is not None
        totals = {
            name: torch.zeros(self.tables[name].shape, dtype=torch.float64, device=self.q.device) for name in self.job.learned
        }
        if self.is_empty:
            none = None if self.weights is None else torch.zeros_like(self.weights)
            zeros = (torch.zeros_like(x) for x in (self.q, self.k, self.v))
            return *zeros, none, *(torch.zeros_like(self.tables[name]) for name in totals)
        grad_q, grad_out = like(self.q), tiles_contiguous(grad_out)
        delta = torch.empty_like(slot_lse if weighted else lse)
        values = self.values | strided("out", out) | strided("grad_out", grad_out) | strided("grad_q", grad_q)
        values |= {"lse_ptr": slot_lse if weighted else lse, "delta_ptr": delta}
        values["grad_lse_ptr"] = lse if grad_lse is None else grad_lse
        has = {"HAS_GRAD_LSE": grad_lse is not None}
        reads = self.job.source.learned
        sums = {
            one: self.empty(self.batch, self.heads, self.rows if one.axis == "rows" else self.kv_len)
            for one in reads
            if one.axis != "pairs"
        }
        values |= {f"{one.name}_ptr": total for one, total in sums.items()}
        for values_here, gather in self._in_pieces(values, totals):
            self.launch("selected_grad_q", values_here.pop("programs"), values_here, out, grad_out, **has)
            gather()
        grad_k = grad_v = None
        if keys or any(one.axis == "columns" for one in reads):
            grad_k, grad_v = like(self.k), like(self.v)
            blocks = in_tiles(self.kv_len, self.job.selected.kv_block)
            inverted = by_chunk(self.indices, blocks)
            values |= strided("grad_k", grad_k) | strided("grad_v", grad_v)
            values |= {"starts_ptr": inverted.starts, "places_ptr": inverted.places, "blocks": blocks}
            # Sums along the queries belong to one head each.
            by_head = any(one.axis == "columns" for one in reads)
            values["pack"] = 1 if by_head else self._pack("selected_grad_kv")
            self.launch("selected_grad_kv", blocks * self.batch * self.kv_heads, values, grad_out)
        domain = self._table_domain
        position = torch.arange(max(self.rows, self.kv_len), device=self.q.device)
        q_idx, kv_idx = position[: self.rows] + domain.q_offset, position[: self.kv_len]
        for one, total in sums.items():
            q_of, kv_of = (q_idx, kv_idx[:1]) if one.axis == "rows" else (q_idx[:1], kv_idx)
            add_read_gradients(totals[one.read.spec.name], one.read, total, domain, q_of, kv_of)
        tables = (total.to(self.tables[name].dtype) for name, total in totals.items())
        return grad_q, grad_k, grad_v, self._weight_gradient(delta, lse, grad_lse) if weighted else None, *tables

    @property
    def _table_domain(self) -> Domain:
        """The ranges of the call with all tables that the written expressions read."""
        return replace(self.job.domain, tables=self.tables)

    def _in_pieces(
        self, values: Mapping[str, Any], totals: Mapping[str, Tensor]
    ) -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
        """Launches of the pass over queries: their arguments and number of ``programs``, and what is to be done after each.

        One launch for all queries, unless gradients of learned tables are kept pair by pair: then so many queries at a time as fit.
        """
        reads = [one for one in self.job.source.learned if one.axis == "pairs"]
        if not reads:
            yield {**values, "programs": self.programs}, lambda: None
            return
        chunk, domain = self.job.selected.kv_block, self._table_domain
        each = 4 * len(reads) * self.batch * self.heads * self.queries * self.width * chunk
        step = max(1, LIMITS.now.listed_pair_bytes // each)
        repeats = self.heads // self.indices.shape[1]
        for first in range(0, self.tiles, step):
            tiles = min(step, self.tiles - first)
            here = slice(first * self.queries, min((first + tiles) * self.queries, self.rows))
            dims = (self.batch, self.heads, tiles * self.queries, self.width, chunk)
            found = {one: torch.zeros(dims, dtype=torch.float32, device=self.q.device) for one in reads}
            pointers = {f"{one.name}_ptr": pairs for one, pairs in found.items()}
            programs = self.programs // self.tiles * tiles

            def gather(here: slice = here, found: dict[LearnedRead, Tensor] = found) -> None:
                lists = self.indices[:, :, here].repeat_interleave(repeats, 1)
                kv = lists[..., None].long() * chunk + torch.arange(chunk, device=lists.device)
                q = torch.arange(here.start, here.stop, device=lists.device) + domain.q_offset
                for one, pairs in found.items():
                    pairs = pairs[:, :, : here.stop - here.start]
                    add_read_gradients(totals[one.read.spec.name], one.read, pairs, domain, q[:, None, None], kv)

            yield {**values, **pointers, "programs": programs, "first_tile": first, "tiles_here": tiles}, gather

    def _weight_gradient(self, delta: Tensor, lse: Tensor, grad_lse: Tensor | None) -> Tensor:
        """That of ``out`` is delta; the LSE is the logarithm of the weights' sum."""
        assert self.weights is not None
        if grad_lse is not None:
            delta = delta + torch.where(lse > float("-inf"), grad_lse * torch.exp(-lse), 0.0)[..., None]
        list_heads, weight_heads = self.indices.shape[1], self.weights.shape[1]
        exists = (self.indices >= 0)[:, :, None]
        # What was never written, after the ends of lists, is no gradient.
        delta = torch.where(exists, delta.unflatten(1, (list_heads, -1)), 0.0).flatten(1, 2)
        return delta.unflatten(1, (weight_heads, -1)).sum(2)
