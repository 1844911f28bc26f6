"""Wrong uses, and the message each gets: what was got, what was wanted, and the way out. The text is part of what users see, so it is
tested. Wrong uses of the language stand in ``tests/lang/test_errors.py``; these are about calls, analysis, compiling and drawing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx, score

CAUSAL = kv_idx <= q_idx
doc = sd.table("doc", monotone=True)
order = sd.table("order", bijective=True)
width = sd.table("width", values_in=(1, 9))
bias = sd.table("bias", dtype=float)

reference = sd.compile(CAUSAL, backend="reference")
flex = sd.compile(CAUSAL, backend="flex")
packed = sd.compile(CAUSAL & (doc[q_idx] == doc[kv_idx]), backend="reference")
ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])

SHAPES = "wanted q (B, Hq, Sq, D), k (B, Hkv, Skv, D), v (B, Hkv, Skv, Dv)"


def qkv(q: Any = (1, 4, 8, 16), k: Any = (1, 2, 8, 16), v: Any = (1, 2, 8, 16), **words: Any) -> Any:
    """Tensors of these shapes."""
    return tuple(torch.zeros(shape, **words) for shape in (q, k, v))


def with_table(pattern: Any, **tables: Any) -> Any:
    return sd.compile(pattern, backend="reference")(*qkv(), **tables)


Case = tuple[Callable[[], Any], type[Exception], str]

# fmt: off
# ruff: noqa: E501 (a use and its message stand on one line)
TENSORS: dict[str, Case] = {
    "no tensor": (lambda: reference(None, *qkv()[1:]), sd.ShapeError, "q must be a torch tensor of shape (batch, heads, length, head_dim); got NoneType"),
    "three dimensions": (lambda: reference(*qkv(q=(4, 8, 16))), sd.ShapeError, "q must have 4 dimensions (batch, heads, length, head_dim); got shape (4, 8, 16). Unbatched or packed tensors: q.unsqueeze(0)"),
    "integers": (lambda: reference(*(x.long() for x in qkv())), sd.ShapeError, "q must be float16, bfloat16, float32 or float64; got torch.int64"),
    "no heads": (lambda: reference(*qkv(q=(1, 0, 8, 16))), sd.ShapeError, "q has no heads or no head_dim: shape (1, 0, 8, 16); both must be at least 1 (batch and length may be 0)"),
    "no head dimension": (lambda: reference(*qkv(k=(1, 2, 8, 0))), sd.ShapeError, "k has no heads or no head_dim: shape (1, 2, 8, 0)"),
    "batch sizes": (lambda: reference(*qkv(q=(3, 4, 8, 16), k=(2, 2, 8, 16), v=(2, 2, 8, 16))), sd.ShapeError, f"q, k and v must have one batch size. q (3, 4, 8, 16), k (2, 2, 8, 16), v (2, 2, 8, 16); {SHAPES}"),
    "head ratio": (lambda: reference(*qkv(q=(1, 3, 8, 16))), sd.ShapeError, "the query heads must be a multiple of the key/value heads; 3 is not a multiple of 2"),
    "heads of k and v": (lambda: reference(*qkv(v=(1, 1, 8, 16))), sd.ShapeError, "k and v must have the same number of heads"),
    "lengths of k and v": (lambda: reference(*qkv(v=(1, 2, 9, 16))), sd.ShapeError, "k and v must have the same length"),
    "head dimensions": (lambda: reference(*qkv(k=(1, 2, 8, 8))), sd.ShapeError, "q and k must have the same head_dim"),
    "dtypes": (lambda: reference(qkv()[0].half(), *qkv()[1:]), sd.ShapeError, "q, k and v must have one dtype; got torch.float16, torch.float32, torch.float32. Cast them, or use torch.autocast"),
    "devices": (lambda: reference(qkv()[0].to("meta"), *qkv()[1:]), sd.ShapeError, "q, k and v must be on one device; got meta, cpu, cpu"),
    "negative offset": (lambda: reference(*qkv(), q_offset=-1), sd.ShapeError, "q_offset must be a whole number of at least 0, the position of the first query, or 'end'; got -1"),
    "fractional offset": (lambda: reference(*qkv(), q_offset=1.5), sd.ShapeError, "q_offset must be a whole number of at least 0, the position of the first query, or 'end'; got 1.5"),
    "zero scale": (lambda: reference(*qkv(), scale=0), sd.ShapeError, "scale must be a positive number or None; got 0"),
}

TABLES: dict[str, Case] = {
    "surplus": (lambda: reference(*qkv(), doc=ids), sd.TableError, "unexpected argument doc: the pattern reads no table"),
    "misspelt": (lambda: packed(*qkv(), docs=ids), sd.TableError, "unexpected argument docs: the pattern reads the tables doc"),
    "missing": (lambda: packed(*qkv()), sd.TableError, "missing table doc: pass doc=tensor with the call"),
    "short": (lambda: packed(*qkv(), doc=ids[:5]), sd.TableError, "table 'doc' is too short: it has shape (5,), 5 entries along dimension 0, but the pattern reads it there at kv_idx = 0..7. Pass a longer table, or limit the index: sd.clamp(index, 0, 4)"),
    "too few heads": (lambda: with_table(q_idx - kv_idx < width[h], width=torch.tensor([3, 3])), sd.TableError, "Pass a table with 4 entries along dimension 0, one for each, or limit the index"),
    "negative index": (lambda: with_table(sd.attend(True, score=score + bias[q_idx - kv_idx]), bias=torch.zeros(8)), sd.TableError, "the pattern reads it there at q_idx - kv_idx = -7..7. The index goes below zero: limit the index: sd.clamp(index, 0, 7)"),
    "a list": (lambda: packed(*qkv(), doc=[0] * 8), sd.TableError, "table 'doc' must be a torch tensor; got list. Write torch.as_tensor(doc)"),
    "wrong kind": (lambda: packed(*qkv(), doc=ids.float()), sd.TableError, "table 'doc' is declared as int but got torch.float32; pass int values or declare dtype=float"),
    "wrong rank": (lambda: packed(*qkv(), doc=ids[None]), sd.TableError, "table 'doc' is read with 1 index but has shape (1, 8)"),
    "other device": (lambda: packed(*qkv(), doc=ids.to("meta")), sd.TableError, "table 'doc' is on meta but the call runs on cpu; move it: doc.to('cpu')"),
    "empty": (lambda: packed(*qkv(), doc=ids[:0]), sd.TableError, "table 'doc' is empty: shape (0,)"),
    "not monotone": (lambda: packed(*qkv(), doc=ids.flip(0)), sd.TableError, "table 'doc' is declared monotone but falls after index [2]; sort it or drop monotone=True"),
    "no permutation": (lambda: with_table(order[q_idx] >= order[kv_idx], order=ids), sd.TableError, "table 'order' is declared bijective but its last dimension is no permutation of 0..7"),
    "values": (lambda: with_table(q_idx - kv_idx < width[h], width=torch.tensor([3, 4, 5, 0])), sd.TableError, "table 'width' is declared with values_in=(1, 9) but holds values from 0 to 5"),
    "not learned": (lambda: with_table(sd.attend(CAUSAL, score=score + bias[h]), bias=torch.zeros(4, requires_grad=True)), sd.TableError, "table 'bias' requires gradients but is not declared as learned; write sd.table('bias', learned=True), or pass bias.detach()"),
}

LOWERINGS: dict[str, Case] = {
    "triton on CPU": (lambda: sd.compile(CAUSAL, backend="triton")(*qkv()), sd.UnsupportedError, "backend 'triton' cannot run this call: the generated kernels need a GPU (on CPU Triton's interpreter runs them, very slowly, if TRITON_INTERPRET=1 is set before Python starts). Use backend='tiled' (torch's dense products on the tiles of the pattern, with gradients and the LSE)"),
    "float64 in triton": (lambda: sd.compile(CAUSAL, backend="triton")(*qkv(dtype=torch.float64)), sd.UnsupportedError, "backend 'triton' cannot run this call: the generated kernels have no float64. Use backend='tiled' (torch's dense products on the tiles of the pattern, with gradients and the LSE)"),
    "no backend": (lambda: sd.compile(CAUSAL, backend="numpy"), sd.PatternError, "backend must be one of 'auto', 'reference', 'tiled', 'cpp', 'flex', 'triton'; got 'numpy'"),
    "a function": (lambda: sd.analyse(lambda b, h, q, k: q >= k, 8), sd.PatternError, "pattern must be a Mask or a Pattern; got the function <lambda>. To use a FlexAttention mask function write sd.trace_mask(function)"),
    "an index": (lambda: sd.compile(q_idx), sd.PatternError, "pattern must be a Mask or a Pattern; got Index(q_idx) (Index)"),
    "float64 in flex": (lambda: flex(*qkv(dtype=torch.float64)), sd.UnsupportedError, "backend 'flex' cannot run this call: FlexAttention has no float64. Use backend='tiled' (torch's dense products on the tiles of the pattern, with gradients and the LSE) or backend='cpp' (C++ generated for the pattern, with gradients and the LSE) or backend='reference' (dense); or cast to float32: q.float(), k.float(), v.float()"),
    "gradients in flex on CPU": (lambda: flex(*qkv(requires_grad=True)), sd.UnsupportedError, "FlexAttention has no backward pass on CPU. Use backend='tiled' (torch's dense products on the tiles of the pattern, with gradients and the LSE) or backend='cpp' (C++ generated for the pattern, with gradients and the LSE) or backend='reference' (dense); or call it under torch.no_grad() for inference"),
    "LSE in flex on CPU": (lambda: flex(*qkv(), return_lse=True), sd.UnsupportedError, "FlexAttention does not return the LSE on CPU. Use backend='tiled' (torch's dense products on the tiles of the pattern, with gradients and the LSE) or backend='cpp' (C++ generated for the pattern, with gradients and the LSE) or backend='reference' (dense); or leave return_lse=False"),
    "no block size": (lambda: reference.block_mask(8, 8, block_size=0), sd.ShapeError, "block_size must be a positive number of tokens, or a pair (q, kv) of them; got 0"),
    "three block sizes": (lambda: reference.block_mask(8, 8, block_size=(1, 2, 3)), sd.ShapeError, "block_size must be a positive number of tokens, or a pair (q, kv) of them; got (1, 2, 3)"),
    "lengths for the functions": (lambda: sd.compile(kv_idx < sd.kv_len - 1).mask_mod(), sd.PatternError, "the pattern reads kv_len: pass kv_len=... (in tokens) to get its functions"),
}

ANALYSIS: dict[str, Case] = {
    "no queries": (lambda: sd.analyse(CAUSAL, 0), sd.ShapeError, "q_len must be a whole number of at least 1; got 0"),
    "negative length": (lambda: sd.analyse(CAUSAL, -5), sd.ShapeError, "q_len must be a whole number of at least 1; got -5"),
    "fractional length": (lambda: sd.analyse(CAUSAL, 8.0), sd.ShapeError, "q_len must be a whole number of at least 1; got 8.0"),
    "no keys": (lambda: sd.analyse(CAUSAL, 8, 0), sd.ShapeError, "kv_len must be a whole number of at least 1; got 0"),
    "offset": (lambda: sd.analyse(CAUSAL, 8, q_offset=-1), sd.ShapeError, "q_offset must be a whole number of at least 0; got -1"),
    "block": (lambda: sd.analyse(CAUSAL, 8, 8, 0), sd.ShapeError, "block_size must be a positive number of tokens"),
    "table": (lambda: sd.analyse(packed.pattern, 8), sd.TableError, "missing table doc: pass doc=tensor"),
    "surplus table": (lambda: sd.analyse(CAUSAL, 8, doc=ids), sd.TableError, "unexpected argument doc: the pattern reads no table"),
    "dtype": (lambda: sd.analyse(CAUSAL, 8, dtype="int8"), sd.ShapeError, "dtype must be one of float64, float32, bfloat16, float16; got 'int8'"),
    "head_dim": (lambda: sd.analyse(CAUSAL, 8, head_dim=0), sd.ShapeError, "head_dim must be a whole number of at least 1; got 0"),
    "verdict as bool": (lambda: bool(sd.implies(CAUSAL, CAUSAL)), sd.PatternError, "a verdict has three values; got PROVED (for all indices, lengths and tables). Write `verdict == sd.PROVED`"),
    "implies an index": (lambda: sd.implies(CAUSAL, q_idx), sd.PatternError, "argument must be a mask; got Index(q_idx) (Index). A comparison makes a mask: write e.g. `x != 0`"),
    "picture of nothing": (lambda: sd.plot(CAUSAL, 0), sd.ShapeError, "q_len must be a whole number of at least 1; got 0"),
    "unknown panel": (lambda: sd.plot(CAUSAL, 8, panels=["x"]), sd.PatternError, "panels must be some of 'pairs', 'tiles', 'strips', 'score'; got ['x']"),
}

LIBRARY: dict[str, Case] = {
    "no window": (lambda: sd.patterns.sliding_window(0), sd.PatternError, "sliding_window(): w must be at least 1 (the window counts the query itself); got 0"),
    "negative window": (lambda: sd.patterns.sliding_window(-3), sd.PatternError, "sliding_window(): w must be at least 1 (the window counts the query itself); got -3"),
    "fractional window": (lambda: sd.patterns.sliding_window(3.5), sd.PatternError, "sliding_window(): w must be a whole number or an index expression such as table[sd.h]; got 3.5 (float)"),
    "step": (lambda: sd.patterns.dilated(4, 0), sd.PatternError, "dilated(): step must be at least 1; got 0"),
    "chunk": (lambda: sd.patterns.chunked(0), sd.PatternError, "chunked(): size must be at least 1; got 0"),
    "sinks": (lambda: sd.patterns.sinks(-1), sd.PatternError, "sinks(): n must be at least 0; got -1"),
    "cap": (lambda: sd.patterns.softcap(0), sd.PatternError, "softcap(): cap must be a positive number; got 0 (int)"),
}

# fmt: on
CASES = {
    f"{group}: {name}": case
    for group, cases in {
        "tensors": TENSORS,
        "tables": TABLES,
        "lowerings": LOWERINGS,
        "analysis": ANALYSIS,
        "library": LIBRARY,
    }.items()
    for name, case in cases.items()
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_wrong_uses_and_their_messages(name: str) -> None:
    use, kind, message = CASES[name]
    with pytest.raises(kind, match=re.escape(message)) as failure:
        use()
    assert type(failure.value) is kind
    assert isinstance(failure.value, sd.SparseDSLError)


def test_errors_are_also_what_python_calls_them() -> None:
    """``except ValueError`` and the like go on working for people who do not know our classes."""
    assert issubclass(sd.PatternError, ValueError)
    assert issubclass(sd.ShapeError, ValueError)
    assert issubclass(sd.TableError, sd.PatternError)
    assert issubclass(sd.TraceError, TypeError)
    assert issubclass(sd.UnsupportedError, NotImplementedError)


def test_an_unknown_public_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"module 'sparsedsl' has no attribute 'compil'; public names are .*compile"):
        sd.compil
