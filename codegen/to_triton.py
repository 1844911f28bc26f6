"""A pattern -> the source of Triton kernels: forward, decode, backward. What a kernel is told at run time is no part of the source.

Input: a pattern and a :class:`~sparsedsl.codegen.triton_parts.Variant`. Output: a :class:`TritonSource`, a whole Python module. Widths of
heads are written out; lengths, offsets, strides and tables are arguments; tile sizes are constants of each compile.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from sparsedsl.analysis.key_intervals import intervals, never_empty
from sparsedsl.analysis.residue_classes import residues
from sparsedsl.codegen.gradient_axes import rolled_reads
from sparsedsl.codegen.hoisting import HoistedTable, hoist
from sparsedsl.codegen.source import Source
from sparsedsl.codegen.triton_backward import write_delta, write_grad_kv, write_grad_q, write_left
from sparsedsl.codegen.triton_expression import needs_exact
from sparsedsl.codegen.triton_forward import write_decode, write_forward, write_merge
from sparsedsl.codegen.triton_functions import functions_for
from sparsedsl.codegen.triton_parts import Argument, KernelSource, Variant
from sparsedsl.codegen.triton_tables import write_grad_difference, write_grad_pairs
from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.normalisers import STICK_BREAKING
from sparsedsl.lang.pattern import Pattern

__all__ = ["DTYPES", "WIDEST", "Argument", "KernelSource", "TritonSource", "Variant", "triton_source", "variant_of"]

# What the generated kernels compute in, and the widest heads whose tiles fit a processor.
DTYPES, WIDEST = ("float16", "bfloat16", "float32"), 256
_CONSTANTS = """
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)
inf: tl.constexpr = tl.constexpr(float("inf"))
"""
# The logarithm of what no float32 holds any more.
_NOTHING = "NOTHING: tl.constexpr = tl.constexpr(-151.0)"


@dataclass(frozen=True)
class TritonSource:
    """Generated text that defines the kernels named in ``kernels``.

    ``pattern``: the pattern that is written, with reads of ``prepared`` tables in it.
    ``prepared``: tables that are worked out by torch before a kernel runs, since they hold operations that must round as torch's do.
    ``table_kinds``: "int", "bool" or "float" for every table. ``fp_fusion``: whether the compiler may join a product and a sum.
    """

    pattern: Pattern
    text: str
    kernels: tuple[KernelSource, ...]
    table_kinds: Mapping[str, str] = field(hash=False)
    prepared: tuple[HoistedTable, ...] = ()
    fp_fusion: bool = True

    def kernel(self, name: str) -> KernelSource:
        """The kernel of this name."""
        return next(kernel for kernel in self.kernels if kernel.name == name)


def variant_of(
    pattern: Pattern,
    *,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    wide: bool = False,
    descriptors: bool = False,
    wide_tables: frozenset[str] = frozenset(),
    own_key: bool = True,
    placed: bool = False,
) -> Variant:
    """What the analysis of the pattern picks.

    ``own_key``: there is a key at the position of every query. ``wide``: some position, offset or value in the mask needs 64 bits.
    ``placed``: rows of K and V are read by their numbers.

    >>> import sparsedsl as sd
    >>> variant_of(sd.attend(sd.kv_idx <= sd.q_idx)).keys, variant_of(sd.attend((sd.q_idx * sd.kv_idx) % 3 == 0)).keys
    ('intervals', 'lists')
    """
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    for name, width in (("head_dim", head_dim), ("head_dim_v", head_dim_v)):
        if width > WIDEST:
            raise UnsupportedError(
                f"backend 'triton' has kernels for heads up to {WIDEST} wide; got {name}={width}. "
                "Use backend='tiled', which has no limit"
            )
    mask = pattern.mask.expr
    keys, queries = ("lists" if intervals(mask, of=of) is None else "intervals" for of in ("keys", "queries"))
    # What a stick has left is told from kernel to kernel by the number of a tile, which is that among all positions.
    decode_keys, within = keys, None if placed or pattern.normaliser == STICK_BREAKING else residues(pattern)
    if within is not None:
        keys = queries = "intervals"
    seen = never_empty(mask)
    # A sink out of a table may be -inf, which is no sink.
    finite_sink = pattern.sink is not None and bool(pattern.sink.expr.is_finite) and pattern.sink.expr.is_number
    safe = finite_sink or seen == "first" or (seen == "diagonal" and own_key)
    # A score may drop pairs itself.
    safe = safe and not pattern.has_score
    step = 1 if within is None else within.step
    descriptors = descriptors and step == 1 and not (wide or placed)  # one descriptor holds rows side by side, and 32-bit places
    return Variant(keys, queries, decode_keys, head_dim, head_dim_v, wide, safe, descriptors, wide_tables, step, placed)


@functools.lru_cache(maxsize=512)
def triton_source(pattern: Pattern, variant: Variant) -> TritonSource:
    """The kernels of ``pattern``.

    Raises:
        UnsupportedError: the pattern holds an operation that Triton cannot be made to round as torch does.

    >>> import sparsedsl as sd
    >>> pattern = sd.attend((sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 512))
    >>> source = triton_source(pattern, variant_of(pattern))
    >>> [kernel.name for kernel in source.kernels]
    ['forward', 'decode', 'merge', 'delta', 'grad_q', 'grad_kv']
    """
    hoisted = hoist(pattern)
    written = hoisted.pattern
    head, source = Source(), Source()
    head.line('"""Attention kernels, generated by sparsedsl from')
    head.line()
    head.lines(pattern.text.replace("\\", "\\\\"))
    head.line('"""')
    head.line()
    head.line("import triton")
    head.line("import triton.language as tl")
    head.lines(_CONSTANTS)
    if pattern.normaliser == STICK_BREAKING:
        head.line(_NOTHING)
    within = residues(pattern) if variant.step > 1 else None
    tiled = written if within is None else within.pattern
    kernels = [
        write_forward(source, tiled, variant),
        write_decode(source, written, variant),
        write_merge(source, written, variant),
    ]
    first = write_left if pattern.normaliser == STICK_BREAKING else write_delta
    kernels += [write(source, tiled, variant) for write in (first, write_grad_q, write_grad_kv) if not variant.placed]
    for one in rolled_reads(written):
        if one.axis in ("difference", "pairs") and not variant.placed:
            write = write_grad_difference if one.axis == "difference" else write_grad_pairs
            kernels.append(write(source, written, variant, one))
    kinds = MappingProxyType({name: spec.dtype for name, spec in written.tables.items()})
    exact = any(needs_exact(expr) for expr in written.exprs)
    text = head.text + functions_for(source.text) + source.text
    return TritonSource(written, text, tuple(kernels), kinds, hoisted.prepared, not exact)
