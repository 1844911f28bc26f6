"""The ``triton`` lowering: generated kernels, what they read beside the tensors, and the grids they run on.

A source is generated once for a pattern and widths of heads; Triton compiles a kernel of it once for each dtype and tile size, and never
for a length. What a call of given lengths and tables needs (ends of searched spans, compact lists, prepared tables) is worked out on the
device of the tables and remembered while they live unchanged: a call that finds it there does not wait for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.lists import TileLists
from sparsedsl.codegen.to_triton import TritonSource, Variant, triton_source, variant_of
from sparsedsl.codegen.triton_backward import LearnedRead, learned_reads
from sparsedsl.codegen.triton_expression import LONGEST
from sparsedsl.errors import UnsupportedError
from sparsedsl.gpu.configs import Config, Shape, default_config, split_count
from sparsedsl.gpu.loading import interpreted
from sparsedsl.gpu.targets import Target, device_target, target_named
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import HEAD
from sparsedsl.run.inputs import Call
from sparsedsl.run.prepared_tables import fill
from sparsedsl.run.remembered import Remembered
from sparsedsl.run.sinks import sink_gradients
from sparsedsl.run.table_gradients import add_read_gradients, allowed_differences, joined_bands
from sparsedsl.run.triton_launch import is_aligned, launch, rows_contiguous, strided, tensor_arguments
from sparsedsl.run.triton_loops import list_values, span_values

__all__ = ["TritonKernel", "missing"]

Tensor = torch.Tensor
# Up to this many queries a call is decode: heads that read the same keys lie side by side, and the keys are shared among programs.
DECODE_ROWS = 16
# Memory for gradients that are kept pair by pair before they are summed.
PAIR_BYTES = 1 << 28
# Triton's interpreter runs one program after the other in numpy; tiles as small as its products allow show the loops at work.
SMALL = Config(16, 16, 4, 1)


@dataclass(frozen=True, eq=False)
class Prepared:
    """What calls of the same lengths and tables share. ``arrays``: arguments of loops by kernel and tile size, made when asked for."""

    variant: Variant
    source: TritonSource
    tables: Mapping[str, Any]
    differences: tuple[int, int] | None
    arrays: dict[Any, dict[str, Any]] = field(default_factory=dict)


class TritonKernel:
    """One pattern as Triton kernels. ``lists``: makes the tile lists of the mask for a domain and a tile size."""

    def __init__(self, pattern: Pattern, lists: Callable[[Domain, tuple[int, int]], TileLists]) -> None:
        self.pattern = pattern
        self._lists = lists
        self._prepared: Remembered[Prepared] = Remembered()

    def source(self, head_dim: int = 64, head_dim_v: int | None = None) -> TritonSource:
        """The generated module for heads of these widths."""
        return triton_source(self.pattern, variant_of(self.pattern, head_dim=head_dim, head_dim_v=head_dim_v))

    # ---- what a call needs ----

    def schedule(self, call: Call) -> Prepared:
        """Made once for lengths, widths and tables."""
        domain = call.domain
        learned = {name for name, spec in self.pattern.tables.items() if spec.learned}
        names = sorted(set(domain.tables) - learned)
        offsets = max(t.shape[2] * t.stride(2) for t in (call.q, call.k, call.v))
        key = (
            domain.rows, domain.kv_len, domain.q_offset, domain.batch, domain.heads, call.q.shape[3], call.v.shape[3], call.q.device,
            offsets >= 1 << 31, *(domain.tables[name].shape for name in learned),
        )  # fmt: skip

        def make() -> Prepared:
            with torch.no_grad():
                return self._prepare(call, offsets >= 1 << 31)

        return self._prepared.get(key, [domain.tables[name] for name in names], make)

    def _prepare(self, call: Call, far: bool) -> Prepared:
        domain, device = call.domain, call.q.device
        wide_tables = frozenset(name for name, table in domain.tables.items() if table.numel() >= 1 << 31)
        variant = variant_of(
            self.pattern,
            head_dim=call.q.shape[3],
            head_dim_v=call.v.shape[3],
            wide=far or max(domain.lengths.values()) > LONGEST,
            wide_tables=wide_tables,
            own_key=domain.lengths["q_len"] <= domain.kv_len,
        )
        source = triton_source(self.pattern, variant)
        prepared = {one.name: fill(one, domain).to(device) for one in source.prepared}
        differences = None
        if any(one.axis == "difference" for one in learned_reads(source.pattern)):
            differences = allowed_differences(self.pattern, domain)
        return Prepared(variant, source, tensor_arguments(prepared), differences)

    def _loop(self, call: Call, prepared: Prepared, of: str, block: tuple[int, int]) -> dict[str, Any]:
        """Arguments of a kernel's loop over keys or queries."""
        how = prepared.variant.keys if of == "keys" else prepared.variant.queries
        key = (of, block if how == "lists" else None)
        if key not in prepared.arrays:
            with torch.no_grad():
                device = call.q.device
                if how == "lists":
                    prepared.arrays[key] = list_values(self._lists(call.domain, block), of, device)
                else:
                    prepared.arrays[key] = span_values(self.pattern, call.domain, of, device)
        return prepared.arrays[key]

    def _shape(self, call: Call, *tensors: Tensor) -> Shape:
        tf32 = call.q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 and call.q.device.type == "cuda"
        return Shape(
            _name(call.q.dtype), call.q.shape[3], call.v.shape[3], call.group, "tf32" if tf32 else "ieee", is_aligned(*tensors)
        )

    def config(self, kernel: str, shape: Shape, call: Call) -> Config:
        """How a kernel is compiled and launched for this call."""
        if interpreted():
            return SMALL
        return default_config(kernel, shape, target_of(call.q.device))

    def _values(self, call: Call, prepared: Prepared) -> dict[str, Any]:
        domain = call.domain
        return {
            "heads": domain.heads, "group": call.group, "rows": domain.rows, "kv_len": domain.kv_len, "q_offset": domain.q_offset,
            "scale": call.scale, **tensor_arguments(call.tables), **prepared.tables,
        }  # fmt: skip

    # ---- forward ----

    def forward(self, call: Call, schedule: Prepared) -> tuple[Tensor, Tensor]:
        """``out (B, Hq, Sq, Dv)`` in the dtype of q, ``lse (B, Hq, Sq)`` in float32."""
        q, k, v = (rows_contiguous(t.detach()) for t in (call.q, call.k, call.v))
        domain = call.domain
        lse = torch.empty((domain.batch, domain.heads, domain.rows), dtype=torch.float32, device=q.device)
        values = self._values(call, schedule) | strided("q", q) | strided("k", k) | strided("v", v)
        if domain.rows <= DECODE_ROWS:
            return self._decode(call, schedule, values, lse, (q, k, v))
        out = _like(q, v.shape[3])
        shape = self._shape(call, q, k, v, out)
        config = self.config("forward", shape, call)
        values |= {**strided("out", out), "lse_ptr": lse}
        values |= self._loop(call, schedule, "keys", (config.block_m, config.block_n))
        programs = -(-domain.rows // config.block_m) * domain.batch * domain.heads
        launch(schedule.source, "forward", programs, values, shape, config)
        return out, lse

    def _decode(
        self, call: Call, prepared: Prepared, values: dict[str, Any], lse: Tensor, qkv: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        domain = call.domain
        shape = self._shape(call, *qkv)
        config = self.config("decode", shape, call)
        # Lists of one head serve no other, if the mask reads the head.
        alone = prepared.variant.keys == "lists" and HEAD in self.pattern.mask.expr.free_symbols
        pack = 1 if alone else call.group
        programs = -(-domain.rows * pack // config.block_m) * domain.batch * (domain.heads // pack)
        splits = self._splits(call, prepared, config, programs)
        dims = (domain.batch, domain.heads, domain.rows, call.v.shape[3])
        out = torch.empty(dims, dtype=call.q.dtype, device=call.q.device)
        share, share_lse = out[None], lse[None]
        if splits > 1:
            share = torch.empty((splits, *dims), dtype=torch.float32, device=out.device)
            share_lse = torch.empty((splits, *dims[:3]), dtype=torch.float32, device=out.device)
        values |= {**strided("out", share[0]), "out_ptr": share, "out_stride_s": share.stride(0), "lse_ptr": share_lse}
        values |= {"pack": pack, "splits": splits}
        values |= self._loop(call, prepared, "keys", (DECODE_ROWS, config.block_n))
        launch(prepared.source, "decode", programs * splits, values, shape, config)
        if splits > 1:
            lines = lse.numel()
            merge = self.config("merge", shape, call)
            values = {"share_ptr": share, "share_lse_ptr": share_lse, "out_ptr": out, "lse_ptr": lse, "splits": splits, "lines": lines}
            launch(prepared.source, "merge", -(-lines // merge.block_m), values, shape, merge)
        return out, lse

    def _splits(self, call: Call, prepared: Prepared, config: Config, programs: int) -> int:
        """Into how many parts the keys are cut. From the lengths alone: nothing on the device is looked at."""
        tiles = -(-call.domain.kv_len // config.block_n)
        return split_count(tiles, programs, target_of(call.q.device))

    # ---- backward ----

    def backward(
        self, call: Call, schedule: Prepared, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
        learned: tuple[str, ...],
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
        """Gradients of q, k, v and the learned tables; the same inputs give the same bits."""
        q, k, v, out, grad_out = (rows_contiguous(t.detach()) for t in (call.q, call.k, call.v, out, grad_out))
        domain, device, source = call.domain, q.device, schedule.source
        shape = self._shape(call, q, k, v, out, grad_out)
        lse = lse.detach().contiguous()
        delta, base = torch.empty_like(lse), torch.empty_like(lse)
        values = self._values(call, schedule) | strided("q", q) | strided("k", k) | strided("v", v)
        values |= strided("out", out) | strided("grad_out", grad_out)
        values |= {"lse_ptr": lse, "delta_ptr": delta, "base_ptr": base}
        values["grad_lse_ptr"] = lse if grad_lse is None else grad_lse.detach().to(torch.float32).contiguous()
        config = self.config("delta", shape, call)
        lines = domain.batch * domain.heads
        launch(
            source, "delta", -(-domain.rows // config.block_m) * lines, values, shape, config, HAS_GRAD_LSE=grad_lse is not None
        )
        reads = learned_reads(source.pattern)
        sums: dict[int, Tensor] = {}
        for one in reads:
            if one.axis in ("rows", "columns"):
                length = domain.rows if one.axis == "rows" else domain.kv_len
                sums[one.number] = torch.empty((domain.batch, domain.heads, length), dtype=torch.float32, device=device)
                values[f"{one.name}_ptr"] = sums[one.number]

        grad_q, grad_k, grad_v = _like(q), _like(k), _like(v)
        config = self.config("grad_q", shape, call)
        loop = self._loop(call, schedule, "keys", (config.block_m, config.block_n))
        programs = -(-domain.rows // config.block_m) * lines
        launch(source, "grad_q", programs, values | strided("grad_q", grad_q) | loop, shape, config)
        config = self.config("grad_kv", shape, call)
        loop = self._loop(call, schedule, "queries", (config.block_m, config.block_n))
        programs = -(-domain.kv_len // config.block_n) * domain.batch * (domain.heads // call.group)
        more = strided("grad_k", grad_k) | strided("grad_v", grad_v) | loop
        launch(source, "grad_kv", programs, values | more, shape, config)

        found: dict[str, Tensor] = {
            name: torch.zeros(call.tables[name].shape, dtype=torch.float64, device=device) for name in learned
        }
        for one in reads:
            if one.read.spec.name in found:
                self._add_table(call, schedule, one, found[one.read.spec.name], sums.get(one.number), values, shape)
        if self.pattern.sink is not None and learned:
            leaves = {name: call.tables[name].detach().double().requires_grad_() for name in learned}
            for name, grad in sink_gradients(self.pattern, call, leaves, lse, delta).items():
                found[name] += grad
        return grad_q, grad_k, grad_v, {name: grad.to(call.tables[name].dtype) for name, grad in found.items()}

    def _add_table(
        self, call: Call, prepared: Prepared, one: LearnedRead, total: Tensor, sums: Tensor | None, values: dict[str, Any], shape: Shape
    ) -> None:
        """Add the gradients of one read to those of its table."""
        domain, device = call.domain, total.device
        q = torch.arange(domain.rows, device=device) + domain.q_offset
        kv = torch.arange(domain.kv_len, device=device)
        tables = {**domain.tables, **{name: prepared.tables[f"{name}_table"] for name in (p.name for p in prepared.source.prepared)}}
        domain = Domain(domain.rows, domain.kv_len, domain.q_offset, domain.batch, domain.heads, tables)
        if one.axis == "rows":
            assert sums is not None
            add_read_gradients(total, one.read, sums, domain, q, kv[:1])
        elif one.axis == "columns":
            assert sums is not None
            add_read_gradients(total, one.read, sums, domain, q[:1], kv)
        elif one.axis == "difference":
            self._add_differences(prepared, one, total, values, shape, call, domain)
        else:
            self._add_pairs(prepared, one, total, values, shape, call, domain)

    def _add_differences(
        self, prepared: Prepared, one: LearnedRead, total: Tensor, values: dict[str, Any], shape: Shape, call: Call, domain: Domain
    ) -> None:
        config = self.config(one.name, shape, call)
        block = min(config.block_m, config.block_n)
        assert prepared.differences is not None
        low, high = prepared.differences
        if low > high:
            return
        first, last = (low - domain.q_offset) // block, -((domain.q_offset - high) // block)
        bands = last - first + 1
        sums = torch.empty((domain.batch, domain.heads, bands, 2 * block), dtype=torch.float32, device=total.device)
        arguments = values | {f"{one.name}_ptr": sums, "first_band": first, "bands": bands}
        launch(prepared.source, one.name, domain.batch * domain.heads * bands, arguments, shape, config, BLOCK=block)
        joined = joined_bands(sums, block)
        # Entry i of band t is the diagonal t * block + i - block.
        differences = torch.arange(joined.shape[-1], device=total.device) + (first - 1) * block + domain.q_offset
        add_read_gradients(total, one.read, joined, domain, differences, torch.zeros_like(differences))

    def _add_pairs(
        self, prepared: Prepared, one: LearnedRead, total: Tensor, values: dict[str, Any], shape: Shape, call: Call, domain: Domain
    ) -> None:
        config = self.config(one.name, shape, call)
        block = min(config.block_m, config.block_n)
        lines = domain.batch * domain.heads
        step = max(1, PAIR_BYTES // (4 * lines * domain.kv_len * block)) * block
        kv = torch.arange(domain.kv_len, device=total.device)
        for begin in range(0, domain.rows, step):
            end = min(begin + step, domain.rows)
            dims = (domain.batch, domain.heads, end - begin, domain.kv_len)
            sums = torch.empty(dims, dtype=torch.float32, device=total.device)
            arguments = values | {f"{one.name}_ptr": sums, "row_begin": begin, "row_end": end}
            programs = -(-(end - begin) // block) * -(-domain.kv_len // block) * lines
            launch(prepared.source, one.name, programs, arguments, shape, config, BLOCK=block)
            q = torch.arange(begin, end, device=total.device) + domain.q_offset
            add_read_gradients(total, one.read, sums, domain, q[:, None], kv)


def _like(t: Tensor, width: int | None = None) -> Tensor:
    """A new tensor in the layout of ``t``, of another width if one is given."""
    made = torch.empty_like(t) if width in (None, t.shape[3]) else None
    if made is None:
        order = sorted(range(3), key=lambda dim: -t.stride(dim))
        shape = [t.shape[dim] for dim in order] + [width]
        made = t.new_empty(shape).permute(*(order.index(dim) for dim in range(3)), 3)
    return made if made.stride(-1) == 1 else torch.empty(made.shape, dtype=t.dtype, device=t.device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _device_target(index: int) -> Target:
    return device_target(index)


def target_of(device: torch.device) -> Target:
    """The facts of a device; of a Hopper GPU where kernels are only interpreted."""
    if device.type != "cuda":
        return target_named("sm_90")
    return _device_target(torch.cuda.current_device() if device.index is None else device.index)


def missing(device: str) -> str | None:
    """What a kind of device lacks for generated kernels, or None if they run there."""
    try:
        if device == "cuda" or interpreted():
            return None
    except UnsupportedError as error:
        return str(error)
    return "they need a GPU (on CPU Triton's interpreter runs them, very slowly, if TRITON_INTERPRET=1 is set before Python starts)"
