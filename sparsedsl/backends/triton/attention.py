"""The ``triton`` lowering: generated kernels, what they read beside the tensors, and the grids they run on.

A source is generated once for a pattern and widths of heads; Triton compiles a kernel of it once for each dtype and tile size, and never
for a length. What a call of given lengths and tables needs (:mod:`backends.triton.prepared`) is remembered while the tables live unchanged:
a call that finds it there does not wait for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.totals import Totals
from sparsedsl.backends.protocol import ListMaker, PatternRunner
from sparsedsl.backends.tiled.attention import sight_of
from sparsedsl.backends.triton.config_choice import chosen, target_of
from sparsedsl.backends.triton.launching import (
    described,
    has_descriptors,
    in_tiles,
    is_aligned,
    launch,
    like,
    rows_contiguous,
    strided,
    tensor_arguments,
)
from sparsedsl.backends.triton.limits import LIMITS
from sparsedsl.backends.triton.prepared import Prepared, prepare
from sparsedsl.backends.triton.table_passes import add_table_gradient, side_of, summed_on_the_way
from sparsedsl.codegen.gradient_axes import rolled_reads
from sparsedsl.codegen.to_triton import TritonSource, triton_source, variant_of
from sparsedsl.errors import UnsupportedError
from sparsedsl.gpu.configs import Config, Shape, of_sticks, split_count
from sparsedsl.gpu.costs import estimated_held, retiled, seconds
from sparsedsl.gpu.loading import interpreted
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import HEAD
from sparsedsl.runtime.autograd import differentiable
from sparsedsl.runtime.call import Call
from sparsedsl.runtime.placed_rows import placed_sight
from sparsedsl.runtime.request import CallFacts
from sparsedsl.runtime.sinks import sink_gradients
from sparsedsl.runtime.unseen import Sight

__all__ = ["TritonKernel", "missing", "refusal_of"]

Tensor = torch.Tensor
# Kernels that can read K and V through tensor descriptors.
DESCRIBED = ("forward", "decode", "grad_q")

# From a config to the number of programs and their arguments.
Work = Callable[[Config], tuple[int, Mapping[str, Any]]]


class TritonKernel(PatternRunner):
    """One pattern as Triton kernels. ``lists``: makes the tile lists of the mask for a domain and a tile size."""

    def __init__(self, pattern: Pattern, lists: ListMaker) -> None:
        self.pattern = pattern
        self._lists = lists
        self._prepared: Cache[Prepared] = Cache()

    def attend(self, call: Call, *, lse: bool) -> tuple[Tensor, Tensor]:
        """Out and LSE, differentiable."""
        return differentiable(self, call)

    @property
    def source(self) -> str:
        """The kernels for heads 64 wide."""
        return self.module().text

    def module(self, head_dim: int = 64, head_dim_v: int | None = None) -> TritonSource:
        """The generated module for heads of these widths."""
        return triton_source(self.pattern, variant_of(self.pattern, head_dim=head_dim, head_dim_v=head_dim_v))

    def density(self, call: Call) -> str:
        """The class of densities that measured choices distinguish; few queries are not counted, they meet another length at every step."""
        return "few queries" if call.domain.rows <= LIMITS.now.decode_rows else self.schedule(call).density

    def schedule(self, call: Call) -> Prepared:
        """Made once for lengths, widths and tables; learned tables may change their values."""
        domain = call.domain
        learned = [name for name, spec in self.pattern.tables.items() if spec.learned]
        fixed = [table for name, table in sorted(domain.tables.items()) if name not in learned]
        key = (
            domain.rows, domain.kv_len, domain.q_offset, domain.batch, domain.heads, call.q.shape[3], call.v.shape[3], call.q.device,
            *(domain.tables[name].shape for name in learned), call.places is not None,
        )  # fmt: skip
        widths, placed = (call.q.shape[3], call.v.shape[3]), call.places is not None
        with torch.no_grad():
            return self._prepared.get(
                key, fixed, lambda: prepare(self.pattern, domain, call.q.device, widths, self._lists, placed=placed)
            )

    def sight(self, call: Call) -> Sight:
        """Who sees whom in a call."""
        if call.places is None:
            return sight_of(self.pattern, call)
        k, v = (t[:, :, :1].expand(-1, -1, call.domain.kv_len, -1) for t in (call.k, call.v))
        return placed_sight(
            call.places, call.q, call.k, lambda: sight_of(self.pattern, replace(call, k=k, v=v, places=None))
        )  # fmt: skip

    def described(self, domain: Domain, facts: CallFacts) -> tuple[str, ...]:
        """How the kernels of a call find their tiles, and how each is launched."""
        where, grad = torch.device(facts.device), facts.grad
        shape = Shape(facts.dtype, facts.head_dim, facts.head_dim_v, facts.heads // facts.kv_heads)
        prepared = prepare(self.pattern, domain, where, (shape.head_dim, shape.head_dim_v), self._lists)
        variant = prepared.variant
        ways = {"intervals": "intervals worked out in the kernel", "lists": "compact lists of tiles"}
        few = domain.rows <= LIMITS.now.decode_rows
        lines = [f"tiles of keys: {ways[variant.decode_keys if few else variant.keys]}"]
        if variant.step > 1 and not few:
            lines.append(f"positions of one residue modulo {variant.step} at a time")
        if grad:
            lines.append(f"tiles of queries: {ways[variant.queries]}")
        if prepared.breaks:
            lines.append("tiles of a row from the last key to the first, until nothing is left")
        target = target_of(where)
        at_hand = where.type == "cuda" and torch.cuda.is_available()
        lines.append(f"for {target.device} ({target.name}){'' if at_hand else ', assumed: there is no GPU here'}:")
        before = "left" if prepared.breaks else "delta"
        for name in (("decode", "merge") if few else ("forward",)) + ((before, "grad_q", "grad_kv") if grad else ()):
            found = chosen(name, shape, prepared, None)
            config = of_sticks(name, shape, target, found.config) if prepared.breaks else found.config
            lines.append(f"  {name}: {config} ({found.source})")
        return tuple(lines)

    def expected_seconds(self, domain: Domain, facts: CallFacts, totals: Totals) -> float | None:
        """Of the forward kernel as it would be launched, on the GPU at hand; measured where it was."""
        where = torch.device(facts.device)
        if where.type != "cuda" or not torch.cuda.is_available() or domain.rows <= LIMITS.now.decode_rows:
            return None
        shape = Shape(facts.dtype, facts.head_dim, facts.head_dim_v, facts.heads // facts.kv_heads)
        prepared = prepare(self.pattern, domain, where, (shape.head_dim, shape.head_dim_v), self._lists)
        found = chosen("forward", shape, prepared, None)
        if found.seconds is not None:
            return found.seconds
        target, block = target_of(where), (found.config.block_m, found.config.block_n)
        tiles = retiled(totals, block, facts.batch * facts.heads, prepared.variant.step)
        return seconds("forward", shape, target, found.config, tiles, estimated_held("forward", shape, target, found.config))

    # ---- forward ----

    def forward(self, call: Call, schedule: Prepared) -> tuple[Tensor, Tensor]:
        """``out (B, Hq, Sq, Dv)`` in the dtype of q, ``lse (B, Hq, Sq)`` in float32."""
        if _without_products(call.q):
            out, lse = self.forward(_in_float32(call), schedule)
            return out.to(call.q.dtype), lse
        q, k, v = (rows_contiguous(t.detach()) for t in (call.q, call.k, call.v))
        domain = call.domain
        lse = torch.empty((domain.batch, domain.heads, domain.rows), dtype=torch.float32, device=q.device)
        values = _values(call, schedule) | strided("q", q) | strided("k", k) | strided("v", v)
        if call.places is not None:
            values["kv_rows_ptr"] = call.places.narrow[0]
        if domain.rows <= LIMITS.now.decode_rows:
            return self._decode(call, schedule, values, lse, (q, k, v))
        out = like(q, v.shape[3])
        values |= {**strided("out", out), "lse_ptr": lse}
        self._over_queries("forward", call, schedule, values, _shape(call, q, k, v, out))
        return out, lse

    def _decode(
        self, call: Call, prepared: Prepared, values: dict[str, Any], lse: Tensor, qkv: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        domain = call.domain
        shape = _shape(call, *qkv)
        # Lists of one head serve no other, if the mask reads the head.
        alone = prepared.variant.decode_keys == "lists" and HEAD in self.pattern.mask.expr.free_symbols
        pack = 1 if alone else call.group
        dims = (domain.batch, domain.heads, domain.rows, call.v.shape[3])
        out = torch.empty(dims, dtype=call.q.dtype, device=call.q.device)
        shares: dict[int, tuple[Tensor, Tensor]] = {1: (out[None], lse[None])}

        def splits(config: Config) -> int:
            """How many programs share the keys: from the lengths alone, nothing on the device is looked at."""
            if LIMITS.now.splits is not None:
                return LIMITS.now.splits
            programs = in_tiles(domain.rows * pack, config.block_m) * domain.batch * (domain.heads // pack)
            return split_count(in_tiles(domain.kv_len, config.block_n), programs, target_of(call.q.device))

        def work(config: Config) -> tuple[int, Mapping[str, Any]]:
            count = splits(config)
            if count not in shares:
                shares[count] = (
                    torch.empty((count, *dims), dtype=torch.float32, device=out.device),
                    torch.empty((count, *dims[:3]), dtype=torch.float32, device=out.device),
                )
            share, share_lse = shares[count]
            arguments = values | {
                **strided("out", share[0]),
                "out_ptr": share,
                "out_stride_s": share.stride(0),
                "lse_ptr": share_lse,
            }
            arguments |= {"pack": pack, "splits": count, **prepared.loop("decode", (LIMITS.now.decode_rows, config.block_n))}
            tiles = in_tiles(domain.rows * pack, config.block_m)
            return tiles * domain.batch * (domain.heads // pack) * count, arguments

        count = splits(_run("decode", shape, prepared, work))
        if count > 1:
            share, share_lse = shares[count]
            arguments = {
                "share_ptr": share, "share_lse_ptr": share_lse, "out_ptr": out, "lse_ptr": lse, "splits": count, "lines": lse.numel(),
            }  # fmt: skip
            _run("merge", shape, prepared, lambda config: (in_tiles(lse.numel(), config.block_m), arguments))
        return out, lse

    # ---- backward ----

    def backward(
        self, call: Call, schedule: Prepared, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
        learned: tuple[str, ...],
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
        """Gradients of q, k, v and the learned tables; the same inputs give the same bits."""
        if _without_products(call.q):
            finer = _in_float32(call), schedule, out.float(), lse, grad_out.float(), grad_lse, learned
            *finest, tables = self.backward(*finer)
            grad_q, grad_k, grad_v = (grad.to(call.q.dtype) for grad in finest)
            return grad_q, grad_k, grad_v, tables
        q, k, v, out, grad_out = (rows_contiguous(t.detach()) for t in (call.q, call.k, call.v, out, grad_out))
        grad_q, grad_k, grad_v = like(q), like(k), like(v)
        domain, device, source = call.domain, q.device, schedule.source
        shape = _shape(call, q, k, v, out, grad_out)
        lse = lse.detach().contiguous()
        reads = rolled_reads(source.pattern)
        sums = summed_on_the_way(reads, domain, device)
        values = _values(call, schedule) | strided("q", q) | strided("k", k) | strided("v", v)
        values |= strided("out", out) | strided("grad_out", grad_out) | sums
        delta, base = torch.empty_like(lse), torch.empty_like(lse)
        made = strided("grad_q", grad_q) | strided("grad_k", grad_k) | strided("grad_v", grad_v)
        if schedule.breaks:
            values |= self._break(call, schedule, values | made, shape)
        else:
            values |= {"lse_ptr": lse, "delta_ptr": delta, "base_ptr": base}
            values["grad_lse_ptr"] = lse if grad_lse is None else grad_lse.detach().to(torch.float32).contiguous()
            lines = domain.batch * domain.heads
            has = {"HAS_GRAD_LSE": grad_lse is not None}
            _run("delta", shape, schedule, lambda config: (in_tiles(domain.rows, config.block_m) * lines, values), **has)
            self._over_queries("grad_q", call, schedule, values | made, shape)
            self._over_keys(call, schedule, values | made, shape)

        def table_kernel(name: str, work: Callable[[int], tuple[int, Mapping[str, Any]]]) -> int:
            def sized(config: Config) -> tuple[int, Mapping[str, Any]]:
                programs, arguments = work(side_of(config))
                return programs, values | dict(arguments)

            return side_of(_run(name, shape, schedule, sized))

        found = {name: torch.zeros(call.tables[name].shape, dtype=torch.float64, device=device) for name in learned}
        for one in reads:
            if one.read.spec.name in found:
                add_table_gradient(call, schedule, one, found[one.read.spec.name], sums, table_kernel)
        leaves = {name: call.tables[name].detach().double().requires_grad_() for name in learned}
        for name, grad in sink_gradients(self.pattern, call, leaves, lse, delta).items():
            found[name] += grad
        return grad_q, grad_k, grad_v, {name: grad.to(call.tables[name].dtype) for name, grad in found.items()}

    def _break(self, call: Call, prepared: Prepared, values: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
        """The passes of the backward pass of sticks. What they tell each other of queries and tiles of keys takes room: they do some key
        heads after the others. As arguments: what tables need of it."""
        domain, group = call.domain, call.group
        columns, units = in_tiles(domain.kv_len, _span(shape, prepared)), domain.batch * domain.heads // group
        of_pairs = any(
            one.axis in ("difference", "pairs") for one in rolled_reads(prepared.source.pattern)
        )  # they need all heads
        most = units if of_pairs else LIMITS.now.stick_bytes // max(1, 8 * group * columns * domain.rows)
        told: dict[str, Any] = {}
        for first in range(0, units, max(1, most)):
            heads = min(units - first, max(1, most))
            left = torch.full((heads * group, columns, domain.rows), -float("inf"), device=call.q.device)
            told = {"left_ptr": left, "earlier_ptr": torch.zeros_like(left), "columns": columns, "first_line": first * group}
            for name in ("left", "grad_q"):
                self._over_queries(name, call, prepared, {**values, **told}, shape, heads * group)
            self._over_keys(call, prepared, {**values, **told, "first_line": first}, shape, heads)
        return told

    # ---- grids ----

    def _over_queries(
        self, name: str, call: Call, prepared: Prepared, values: Mapping[str, Any], shape: Shape, heads: int | None = None
    ) -> None:
        """One program a tile of queries of one head, within a residue if the variant has residues. ``heads``: of all entries together."""
        domain, step = call.domain, prepared.variant.step
        lines = domain.batch * domain.heads if heads is None else heads

        def work(config: Config) -> tuple[int, Mapping[str, Any]]:
            tiles = in_tiles(in_tiles(domain.rows, step), config.block_m) * step
            loop = prepared.loop(name, (config.block_m, config.block_n))
            return tiles * lines, {**values, **loop}

        _run(name, shape, prepared, work)

    def _over_keys(
        self, call: Call, prepared: Prepared, values: Mapping[str, Any], shape: Shape, heads: int | None = None
    ) -> None:
        """One program a tile of keys of one key head. ``heads``: key heads of all entries together."""
        domain, step = call.domain, prepared.variant.step
        lines = domain.batch * (domain.heads // call.group) if heads is None else heads

        def work(config: Config) -> tuple[int, Mapping[str, Any]]:
            tiles = in_tiles(in_tiles(domain.kv_len, step), config.block_n) * step
            loop = prepared.loop("grad_kv", (config.block_m, config.block_n))
            return tiles * lines, {**values, **loop}

        _run("grad_kv", shape, prepared, work)


@functools.lru_cache(maxsize=1024)
def refusal_of(pattern: Pattern) -> str | None:
    """Why no kernels can be written for a pattern, or None."""
    try:
        triton_source(pattern, variant_of(pattern, head_dim=64))
    except UnsupportedError as error:
        return str(error)
    return None


def _run(name: str, shape: Shape, prepared: Prepared, work: Work, **constants: Any) -> Config:
    """Choose how a kernel is launched, and launch it; the config."""

    def fitted(config: Config) -> Config:
        if not prepared.breaks or (interpreted() and name == "forward"):
            return config
        return of_sticks(name, shape, target_of(prepared.device), config, _span(shape, prepared))

    def run(config: Config, dry: bool) -> Any:
        config = fitted(config)
        programs, arguments = work(config)
        reaching = prepared.reaching(arguments)
        more, source = dict(constants), reaching.source
        if config.descriptors and name in DESCRIBED:
            better = reaching.described
            if better is None or not (has_descriptors(arguments["k_ptr"]) and has_descriptors(arguments["v_ptr"])):
                config = replace(config, descriptors=False)
            else:
                source = better
                arguments = {**arguments, **described(source, name, arguments, config)}
        if name.startswith("grad_") and name not in ("grad_q", "grad_kv"):
            more["BLOCK"] = side_of(config)
        return launch(source, name, programs, arguments, shape, config, dry=dry, **more)

    config = fitted(chosen(name, shape, prepared, run).config)
    run(config, False)
    return config


def _span(shape: Shape, prepared: Prepared) -> int:
    """Keys of a tile in all kernels of the backward pass of sticks."""
    if interpreted():
        return LIMITS.now.interpreted.block_n
    return of_sticks("grad_q", shape, target_of(prepared.device), LIMITS.now.interpreted).block_n


def _without_products(t: Tensor) -> bool:
    """Whether kernels cannot multiply what ``t`` holds: Triton's interpreter multiplies the bits of bfloat16."""
    return t.dtype == torch.bfloat16 and interpreted()


def _in_float32(call: Call) -> Call:
    return replace(call, q=call.q.detach().float(), k=call.k.detach().float(), v=call.v.detach().float())


def _values(call: Call, prepared: Prepared) -> dict[str, Any]:
    domain = call.domain
    return {
        "heads": domain.heads, "group": call.group, "rows": domain.rows, "kv_len": domain.kv_len, "q_offset": domain.q_offset,
        "scale": call.scale, **tensor_arguments(call.tables), **prepared.tables,
    }  # fmt: skip


def _shape(call: Call, *tensors: Tensor) -> Shape:
    tf32 = call.q.dtype == torch.float32 and call.q.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    dtype = str(call.q.dtype).removeprefix("torch.")
    return Shape(dtype, call.q.shape[3], call.v.shape[3], call.group, "tf32" if tf32 else "ieee", is_aligned(*tensors))


def missing(device: str) -> str | None:
    """What a kind of device lacks for generated kernels, or None if they run there."""
    try:
        if device == "cuda" or interpreted():
            return None
    except UnsupportedError as error:
        return str(error)
    return (
        "the generated kernels need a GPU (on CPU Triton's interpreter runs them, very slowly, "
        "if TRITON_INTERPRET=1 is set before Python starts)"
    )
