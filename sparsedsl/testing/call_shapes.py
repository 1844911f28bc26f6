"""Attention problems: lengths, heads and offsets as one value that prints as code, and tensors that print as code."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from hypothesis import strategies as st

from sparsedsl.testing.plain import PositionTables

__all__ = ["AttentionCase", "dtypes", "inputs", "shapes", "tensor", "tensor_code"]

LAYOUTS = ("contiguous", "transposed", "expanded")
# Tensors larger than this are not written out in a snippet.
_LITERAL_ELEMENTS = 128
# Queries of problems far out.
_FEW_ROWS = 8


@dataclass(frozen=True, repr=False)
class AttentionCase:
    """The shape of one attention call; ``q_len`` is the number of query rows, the first of them at position ``q_offset``.

    >>> case = AttentionCase(heads=4, kv_heads=2, q_len=3, kv_len=8, q_offset=5)
    >>> case.q_shape, case.k_shape
    ((1, 4, 3, 16), (1, 2, 8, 16))
    """

    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    q_len: int = 1
    kv_len: int = 1
    head_dim: int = 16
    head_dim_v: int = 16
    q_offset: int = 0

    def __repr__(self) -> str:
        words = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"AttentionCase({', '.join(words)})"

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        """Shape of ``q``."""
        return self.batch, self.heads, self.q_len, self.head_dim

    @property
    def k_shape(self) -> tuple[int, int, int, int]:
        """Shape of ``k``."""
        return self.batch, self.kv_heads, self.kv_len, self.head_dim

    @property
    def v_shape(self) -> tuple[int, int, int, int]:
        """Shape of ``v``."""
        return self.batch, self.kv_heads, self.kv_len, self.head_dim_v

    @property
    def positions(self) -> PositionTables:
        """The values of the index symbols on the grid of this case."""
        return PositionTables(batch=self.batch, heads=self.heads, q_len=self.q_len, kv_len=self.kv_len, q_offset=self.q_offset)

    @property
    def env(self) -> dict[str, torch.Tensor]:
        """The same values as torch tensors, as :func:`sparsedsl.lang.evaluation.evaluate` takes them."""
        return {name: torch.as_tensor(value) for name, value in self.positions.items()}


def tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> torch.Tensor:
    """A normal random tensor that depends on its arguments alone, and that a failure can print as this very call.

    Args:
        shape: the sizes.
        seed: of a generator of its own; before rounding the values do not depend on ``dtype``, and on ``layout`` only if it is
            expanded.
        dtype: a float type.
        layout: ``"contiguous"``; ``"transposed"`` (dimensions 1 and 2 swapped in memory, as after ``view(...).transpose(1, 2)``);
            ``"expanded"`` (dimension 0 with stride 0: every batch entry is the same memory).

    >>> tensor(2, 4, 3, 8, seed=0, layout="transposed").stride()
    (96, 8, 32, 1)
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = (1, *shape[1:]) if layout == "expanded" else shape
    values = torch.randn(*drawn, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "transposed":
        values = values.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "expanded":
        values = values.expand(*shape)
    elif layout != "contiguous":
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    words = [*map(str, shape), f"seed={seed}"]
    words += [f"dtype={dtype}"] if dtype != torch.float32 else []
    words += [f"layout={layout!r}"] if layout != "contiguous" else []
    values.sparsedsl_code = f"sd.testing.tensor({', '.join(words)})"  # type: ignore[attr-defined]
    return values


def tensor_code(value: object) -> str:
    """Python code that makes ``value`` again: the call if :func:`tensor` made it, a literal if it is small, else a file."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    code = getattr(value, "sparsedsl_code", None)
    if code is not None:
        return str(code)
    value = value.detach().cpu()
    if value.numel() <= _LITERAL_ELEMENTS:
        plain = value.double() if value.is_floating_point() else value
        literal = str(plain.tolist()).replace("inf", "math.inf").replace("nan", "math.nan")
        return f"torch.tensor({literal}, dtype={value.dtype})"
    content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    digest = hashlib.sha256(content).hexdigest()[:12]
    path = _folder() / f"{digest}.pt"
    if not path.exists():
        torch.save(value.clone(), path)
    return f"torch.load({str(path)!r})"


@functools.cache
def _folder() -> Path:
    """Where tensors of snippets are written: a new folder that nobody else may enter, so that no name in it can be foreseen.

    It stays when the process ends, for the snippet to be run.
    """
    return Path(tempfile.mkdtemp(prefix="sparsedsl-"))


@st.composite
def shapes(
    draw: st.DrawFn,
    *,
    max_len: int = 70,
    max_batch: int = 2,
    max_heads: int = 6,
    square: bool = False,
    head_dims: tuple[int, ...] = (16, 32),
    near: Sequence[int] = (),
) -> AttentionCase:
    """Attention problems: one token, shorter than a block, ragged, rectangular, at an offset; any ratio of query to key heads.

    Half of those that are not ``square`` have more keys than queries, a quarter more queries than keys.

    Args:
        max_len: longest length, of queries and of keys.
        max_batch: largest batch size.
        max_heads: most query heads.
        square: only problems of self-attention over a whole sequence: as many queries as keys, no offset.
        head_dims: what ``head_dim`` and, separately, ``head_dim_v`` are drawn from.
        near: positions at which a pattern changes (its window, its chunks): half of the cases end next to one of them, those beyond
            ``max_len`` with a few queries at an offset. Square ones end next to one within ``max_len``.

    >>> from hypothesis import given
    >>> @given(shapes(max_len=20))
    ... def test(case):
    ...     assert case.heads % case.kv_heads == 0
    >>> test()
    """
    edges = [n for n in near if n < max_len] if square else list(near)
    if bool(edges) and draw(st.booleans()):
        q_len, kv_len, q_offset = draw(_beside(edges, square, max_len))
    elif square:
        q_len = kv_len = draw(_lengths(max_len))
        q_offset = 0
    else:
        q_len, kv_len, q_offset = draw(_rectangles(max_len))
    kv_heads = draw(st.integers(1, max(1, max_heads // 2)))
    ratio = draw(st.integers(1, max(1, max_heads // kv_heads)))
    return AttentionCase(
        batch=draw(st.integers(1, max_batch)),
        heads=kv_heads * ratio,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=draw(st.sampled_from(head_dims)),
        head_dim_v=draw(st.sampled_from(head_dims)),
        q_offset=q_offset,
    )


@st.composite
def _beside(draw: st.DrawFn, edges: list[int], square: bool, longest: int) -> tuple[int, int, int]:
    """Queries, keys and offset of a problem whose last position is next to an edge."""
    end = draw(st.sampled_from(edges)) + draw(st.sampled_from((0, 1, -1, 2)))
    if square:
        return min(end, longest), min(end, longest), 0
    q_len = draw(st.integers(1, min(_FEW_ROWS, end, longest)))
    return q_len, end + draw(st.sampled_from((0, 1, 2, _FEW_ROWS))), end - q_len


@st.composite
def _rectangles(draw: st.DrawFn, longest: int) -> tuple[int, int, int]:
    """Queries, keys and offset."""
    kv_len = draw(_lengths(longest))
    relation = draw(st.sampled_from(("square", "keys", "keys", "queries")))
    if relation == "square" or kv_len == (1 if relation == "keys" else longest):
        q_len = kv_len
    elif relation == "keys":
        q_len = draw(st.integers(1, kv_len - 1) | st.just(1))
    else:
        q_len = draw(st.integers(kv_len + 1, longest))
    # At an offset of kv_len - q_len the last query sees the last key, as in decoding; others must work too, those beyond the keys as well.
    last = kv_len - q_len
    usual = st.sampled_from([n for n in (0, last, last, last, last - 1, last + 1) if n >= 0])
    return q_len, kv_len, draw(usual | st.integers(0, longest))


def _lengths(longest: int) -> st.SearchStrategy[int]:
    near_blocks = [n for block in (8, 16, 32, 64, 128) for n in (block - 1, block, block + 1) if n <= longest]
    return st.integers(1, longest) | st.sampled_from([1, *near_blocks])


def dtypes(*, low_precision: bool = True) -> st.SearchStrategy[torch.dtype]:
    """Float types of inputs: float32, float64, and float16 and bfloat16 if ``low_precision``.

    >>> from hypothesis import given
    >>> @given(dtypes(low_precision=False))
    ... def test(dtype):
    ...     assert dtype in (torch.float32, torch.float64)
    >>> test()
    """
    return st.sampled_from([torch.float32, torch.float64] + [torch.bfloat16, torch.float16] * low_precision)


@st.composite
def inputs(
    draw: st.DrawFn, case: AttentionCase, *, dtype: torch.dtype | st.SearchStrategy[torch.dtype] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``q, k, v`` of one problem: contiguous, transposed or expanded in memory, of one dtype (drawn unless given).

    >>> from hypothesis import given
    >>> @given(inputs(AttentionCase(q_len=3, kv_len=5)))
    ... def test(qkv):
    ...     assert qkv[0].shape == (1, 1, 3, 16)
    >>> test()
    """
    kind = draw(dtypes() if dtype is None else st.just(dtype) if isinstance(dtype, torch.dtype) else dtype)
    seed = draw(st.integers(0, 2**16))
    layouts = st.sampled_from(LAYOUTS)
    return tuple(
        tensor(*shape, seed=seed + i, dtype=kind, layout=draw(layouts))
        for i, shape in enumerate((case.q_shape, case.k_shape, case.v_shape))
    )  # type: ignore[return-value]
