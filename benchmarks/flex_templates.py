"""FlexAttention's own Triton kernels as source text, from the templates of the installed torch, as Inductor writes them for static shapes.

Inductor needs a GPU to get this far; the templates do not. They call hooks of Inductor; those that this module knows are filled in with
constants (sizes, strides, options) and with a pattern's score and mask. A hook or variable that it does not know raises: another release
of torch must be looked at before it is compared with.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import jinja2
import torch
from torch._inductor.kernel.flex.common import load_flex_template
from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic

__all__ = ["FlexKernel", "FlexPattern", "FlexShape", "backward", "decode", "forward"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
POINTERS = {"bfloat16": "*bf16", "float16": "*fp16"}
LISTS = ("KV_NUM_BLKS", "KV_IDX", "Q_NUM_BLKS", "Q_IDX", "FULL_KV_NUM_BLKS", "FULL_KV_IDX", "FULL_Q_NUM_BLKS", "FULL_Q_IDX")
SINGLE = ("LSE", "MAX", "DELTA", "M", "L")


@dataclass(frozen=True)
class FlexPattern:
    """A pattern in Triton, as Inductor writes what a user gives FlexAttention.

    ``mask`` and ``score``: of ``{s}`` (the score), ``{b}``, ``{h}``, ``{m}`` (query) and ``{n}`` (key); ``grad``: the gradient of the
    score before ``score``, of ``{g}`` after it; ``scatter``: a statement that adds to gradients of tables; ``tables``: name -> type.
    """

    mask: str
    score: str = "{s}"
    grad: str = "{g}"
    scatter: str = "pass"
    tables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FlexShape:
    """Batch, heads, lengths and width of a call; ``block``: side of the blocks of its BlockMask."""

    dtype: str
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    block: int = 128
    batch: int = 1


@dataclass(frozen=True)
class FlexKernel:
    """One kernel: source, the name of its function, Triton's types of its arguments, warps, stages; ``options`` as Inductor sets them."""

    text: str
    name: str
    signature: Mapping[str, str]
    warps: int
    stages: int
    options: Mapping[str, Any]


def forward(pattern: FlexPattern, shape: FlexShape, capability: tuple[int, int]) -> FlexKernel:
    """The forward kernel with torch's default config for a GPU of this compute capability."""
    config = _default("get_flex_attn_fwd_configs", shape, capability)
    options = _options(shape) | {
        "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False, "BLOCKS_ARE_CONTIGUOUS": False, "OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": False,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "SPARSE_Q_BLOCK_SIZE": shape.block, "SPARSE_KV_BLOCK_SIZE": shape.block,
    }  # fmt: skip
    return _written("flex_attention", ("flex_attention", "utilities", "common"), pattern, shape, options, config)


def backward(pattern: FlexPattern, shape: FlexShape, capability: tuple[int, int]) -> FlexKernel:
    """The kernel of all gradients: some of its programs make dQ, the others dK and dV."""
    config = _default("get_flex_attn_bwd_configs", shape, capability)
    options = _options(shape) | {
        "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False, "BLOCKS_ARE_CONTIGUOUS": False, "WRITE_DQ": True,
        "BLOCK_M1": config.block_m1, "BLOCK_N1": config.block_n1, "BLOCK_M2": config.block_m2, "BLOCK_N2": config.block_n2,
        "SPARSE_Q_BLOCK_SIZE": shape.block, "SPARSE_KV_BLOCK_SIZE": shape.block,
    }  # fmt: skip
    return _written("flex_backwards", ("flex_backwards", "utilities"), pattern, shape, options, config)


def decode(pattern: FlexPattern, shape: FlexShape, capability: tuple[int, int], splits: int) -> FlexKernel:
    """The kernel of few queries; another one of torch's own merges its ``splits``."""
    config = _default("get_flex_decode_configs", shape, capability)
    group = shape.heads // shape.kv_heads
    rows = max(16, 1 << (shape.queries * group - 1).bit_length())
    options = _options(shape) | {
        "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False, "BLOCKS_ARE_CONTIGUOUS": False, "SPLIT_KV": splits, "BLOCK_M": rows,
        "BLOCK_N": config.block_n, "SAFE_M_BOUNDARY": shape.queries * group % rows == 0, "SAFE_N_BOUNDARY": True,
        "SPARSE_Q_BLOCK_SIZE": shape.block, "SPARSE_KV_BLOCK_SIZE": shape.block,
    }  # fmt: skip
    return _written("flex_decode", ("flex_decode", "utilities", "common"), pattern, shape, options, config)


def _default(asked: str, shape: FlexShape, capability: tuple[int, int]) -> Any:
    """Torch's default config: it asks the device at hand for its capability."""
    with mock.patch("torch.cuda.get_device_capability", lambda *_: capability):
        return getattr(CUDAConfigHeuristic(), asked)(shape.head_dim, DTYPES[shape.dtype])[-1]


def _options(shape: FlexShape) -> dict[str, Any]:
    width = 1 << (shape.head_dim - 1).bit_length()
    return {
        "FLOAT32_PRECISION": "'ieee'", "IS_DIVISIBLE": shape.queries % 128 == 0 and shape.keys % 128 == 0,
        "SM_SCALE": shape.head_dim**-0.5, "GQA_SHARED_HEADS": shape.heads // shape.kv_heads, "HAS_FULL_BLOCKS": True,
        "QK_HEAD_DIM": shape.head_dim, "QK_HEAD_DIM_ROUNDED": width, "V_HEAD_DIM": shape.head_dim, "V_HEAD_DIM_ROUNDED": width,
        "SAFE_HEAD_DIM": shape.head_dim == width, "USE_TMA": False,
    }  # fmt: skip


class _Hooks:
    """What the templates ask of Inductor, answered with constants."""

    def __init__(self, name: str, pattern: FlexPattern, shape: FlexShape, options: Mapping[str, Any]) -> None:
        self.name, self.pattern, self.shape, self.options = name, pattern, shape, options
        self.signature: dict[str, str] = {}

    def def_kernel(self, *names: str) -> str:
        """The head of the kernel; arguments are known from here on."""
        for name in names:
            kind = "*i32" if name in LISTS else "*fp32" if name in SINGLE else POINTERS[self.shape.dtype]
            self.signature[f"arg_{name}"] = kind
        self.signature |= self.pattern.tables
        decoding = self.name == "flex_decode"
        self.signature["out_ptr0"] = "*fp32" if decoding else POINTERS[self.shape.dtype]
        renames = [f"{name} = arg_{name}" for name in names]
        lines = ["@triton.jit", f"def {self.name}({self.gen_argdefs()}):"]
        return "\n".join(lines + textwrap.indent(self.gen_defines() + "\n".join(renames), "    ").splitlines())

    def gen_argdefs(self) -> str:
        """The arguments, passed on from function to function."""
        return ", ".join(self.signature)

    def gen_defines(self) -> str:
        """The options as constants."""
        lines = [f"{name} : tl.constexpr = {value}" for name, value in self.options.items()]
        return "\n".join([*lines, "INDEX_DTYPE : tl.constexpr = tl.int32"]) + "\n"

    def sizes(self, name: str) -> tuple[int, ...]:
        """The dimensions of an argument."""
        s = self.shape
        blocks = (-(-s.queries // s.block), -(-s.keys // s.block))
        if name in LISTS:
            by_key = "Q_" in name.removeprefix("FULL_")[:2]
            lines, width = reversed(blocks) if by_key else blocks
            return (1, 1, lines) if "NUM" in name else (1, 1, lines, width)
        if name in ("M", "L"):
            return s.batch, self.options["SPLIT_KV"], s.heads, s.queries
        if name in ("Q", "DO", "DQ"):
            if self.name == "flex_decode":
                return s.batch, s.kv_heads, s.heads // s.kv_heads, s.queries, s.head_dim
            return s.batch, s.heads, s.queries, s.head_dim
        if name in ("K", "V", "DV"):
            return s.batch, s.kv_heads, s.keys, s.head_dim
        raise LookupError(f"the templates of torch {torch.__version__} ask for the size of {name!r}, which is not known here")

    def size(self, name: str, index: int) -> str:
        """One dimension."""
        return str(self.sizes(name)[index])

    def stride(self, name: str, index: int | None = None) -> str:
        """One stride, or all: arguments are contiguous."""
        sizes = self.sizes(name)
        found = [1] * len(sizes)
        for place in range(len(sizes) - 2, -1, -1):
            found[place] = found[place + 1] * sizes[place + 1]
        return ", ".join(map(str, found)) if index is None else str(found[index])

    def modification(self, *, subgraph_number: int, output_name: str | None, **given: Any) -> str:
        """The pattern's score, mask or gradient."""
        words = {"b": given["b"], "h": given["h"], "m": given["m"], "n": given["n"]}
        words |= {"s": given.get("score", ""), "g": given.get("grad_score_mod", ""), "kept": given.get("mask", "")}
        texts = self._texts()
        lines = [f"{key} = {value}" for key, value in self._named(words).items()]
        text = texts[subgraph_number]
        lines.append(f"{output_name} = {text}" if output_name is not None else text)
        return "\n".join(lines)

    def _texts(self) -> list[str]:
        pattern = self.pattern
        if self.name == "flex_backwards":
            return [pattern.score, pattern.grad, pattern.mask, pattern.scatter]
        return [pattern.score, pattern.mask]

    @staticmethod
    def _named(words: Mapping[str, str]) -> dict[str, str]:
        """Values under the names that the pattern's text has; names of the template that are the same need no line."""
        return {f"mod_{key}": f"({value})" for key, value in words.items() if value}

    def store_output(self, indices: Any, val: str, mask: str, indent_width: int = 4, val_shape: Any = None) -> str:
        """The store of the result, in place of the hook."""
        name = {"flex_attention": "Q", "flex_backwards": "K"}.get(self.name)
        shape = self.shape
        sizes = (
            (shape.batch, self.options.get("SPLIT_KV"), shape.heads, shape.queries, shape.head_dim)
            if name is None
            else self.sizes(name)
        )
        terms, step = [], 1
        for index, size in zip(reversed(indices), reversed(sizes), strict=True):
            terms.append(f"{step} * ({index})")
            step *= size
        spread = f"tl.broadcast_to({' + '.join(terms)}, [{', '.join(val_shape)}])"
        return f"tl.store(out_ptr0 + ({spread}), {val}, {mask})"


def _written(
    name: str, parts: tuple[str, ...], pattern: FlexPattern, shape: FlexShape, options: Mapping[str, Any], config: Any
) -> FlexKernel:
    # The texts of a pattern have short names; those of the template may be anything.
    mask, score, grad, scatter = map(_prefixed, (pattern.mask, pattern.score, pattern.grad, pattern.scatter))
    named = FlexPattern(mask, score, grad, scatter, pattern.tables)
    hooks = _Hooks(name, named, shape, options)
    found = jinja2.Environment(undefined=jinja2.StrictUndefined)
    found.filters["indent_except_first"] = lambda text, depth: text.replace("\n", "\n" + "    " * depth)
    known = ("def_kernel", "gen_argdefs", "gen_defines", "size", "stride", "modification", "store_output")
    body = found.from_string("".join(load_flex_template(part) for part in parts)).render(
        **{hook: getattr(hooks, hook) for hook in known}, **options
    )
    head = "import triton\nimport triton.language as tl\nfrom triton.language.extra.cuda import libdevice\n\n\n"
    return FlexKernel(head + body.lstrip(), name, hooks.signature, config.num_warps, config.num_stages, options)


def _prefixed(text: str) -> str:
    """``{m}`` and its like as the names that :meth:`_Hooks.modification` gives values to."""
    for key in ("b", "h", "m", "n", "s", "g", "kept"):
        text = text.replace("{" + key + "}", f"mod_{key}")
    return text
