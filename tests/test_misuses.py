"""What people write who know attention but not yet this library: one table, use -> class of the error and its words.

``test_errors.py`` and ``lang/test_errors.py`` go through what is checked, argument by argument; here are slips as they happen: words of
other libraries, arguments in the wrong order, tensors and texts in place of expressions, names almost right.
"""

from __future__ import annotations

import functools
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sparsedsl as sd
from sparsedsl import cli, h, kv_idx, q_idx, score

P = sd.patterns
causal = kv_idx <= q_idx
doc = sd.table("doc", monotone=True)
packed = causal & (doc[q_idx] == doc[kv_idx])
dot = sd.dot(sd.q, sd.summary(sd.k, 4))
selected = sd.top_k(dot, 1)
gate = sd.input("gate", "batch kv_heads keys 4")
q = k = v = torch.zeros(1, 2, 8, 16)
ids = torch.zeros(8, dtype=torch.int64)
keep = torch.ones(8, 8, dtype=torch.bool)
attn = sd.compile(causal, backend="reference")
program = sd.compile(sd.attend(causal & selected), backend="reference")

# Python hands the wrong call to us before it becomes a TypeError of its own.
Case = tuple[Callable[[], Any], type[Exception], str]

# fmt: off
# ruff: noqa: E501 (a use and its message stand on one line)
ELSEWHERE: dict[str, Case] = {
    "is_causal": (lambda: attn(q, k, v, is_causal=True), sd.TableError, "unexpected argument is_causal: the causal mask is part of the pattern, as in sd.compile(sd.kv_idx <= sd.q_idx)"),
    "attn_mask": (lambda: attn(q, k, v, attn_mask=keep), sd.TableError, "attn_mask: the pattern is the mask. Of a boolean tensor declare a table"),
    "dropout_p": (lambda: attn(q, k, v, dropout_p=0.0), sd.TableError, "dropout_p: dropout of attention weights is not part of a pattern"),
    "enable_gqa": (lambda: attn(q, k, v, enable_gqa=True), sd.TableError, "enable_gqa: leave it out: fewer key/value heads than query heads are shared by themselves"),
    "block_mask": (lambda: attn(q, k, v, block_mask=None), sd.TableError, "block_mask: leave it out: the lists of tiles are made from the pattern"),
    "score_mod": (lambda: attn(q, k, v, score_mod=None), sd.TableError, "score_mod: the score is part of the pattern: sd.attend(mask, score=sd.trace_score(score_mod))"),
    "kernel_options": (lambda: attn(q, k, v, kernel_options={}), sd.TableError, "kernel_options: leave it out: sizes of tiles are chosen and tuned by the backend"),
    "softmax_scale": (lambda: attn(q, k, v, softmax_scale=1.0), sd.TableError, "softmax_scale: here it is scale="),
    "window_size": (lambda: attn(q, k, v, window_size=(3, 0)), sd.TableError, "window_size: the window is part of the pattern: sd.patterns.sliding_window(n)"),
    "of a program": (lambda: program(q, k, v, is_causal=True), sd.TableError, "unexpected argument is_causal: the causal mask is part of the pattern"),
    "of attend": (lambda: sd.attend(causal, dropout_p=0.1), sd.ArgumentError, "attend(): unexpected argument dropout_p: dropout of attention"),
    "of compile": (lambda: sd.compile(causal, is_causal=True), sd.ArgumentError, "compile(): unexpected argument is_causal: the causal mask is part of the pattern"),
    "of linear": (lambda: sd.linear([0.5], beta=1), sd.PatternError, "linear(): beta must be an input with the axes 'batch H keys', H one of"),
    "of bound": (lambda: sd.bound(sd.q, sd.k, 32, stride=16), sd.ArgumentError, "stride: windows that overlap are made by sd.summary(k, 32, stride=16)"),
}

NEARLY: dict[str, Case] = {
    "keyword of a call": (lambda: attn(q, k, v, retrun_lse=True), sd.TableError, "Did you mean 'return_lse'?"),
    "table of a call": (lambda: sd.compile(packed)(q, k, v, docs=ids), sd.TableError, "unexpected argument docs: the pattern reads the tables doc. Did you mean 'doc'?"),
    "table of a report": (lambda: sd.analyse(packed, 8, dco=ids), sd.TableError, "unexpected argument dco: the pattern reads doc. Did you mean 'doc'?"),
    "keyword of a report": (lambda: sd.analyse(causal, 8, blocksize=64), sd.TableError, "Did you mean 'block_size'?"),
    "table of a program's report": (lambda: sd.analyse(sd.attend(packed & selected), 8, dco=ids), sd.TableError, "Did you mean 'doc'?"),
    "table to bind": (lambda: packed.bind(dox=ids), sd.TableError, "Did you mean 'doc'?"),
    "table of a pattern to bind": (lambda: sd.attend(packed).bind(dox=ids), sd.TableError, "Did you mean 'doc'?"),
    "keyword of attend": (lambda: sd.attend(causal, scroe=score), sd.ArgumentError, "Did you mean 'score'?"),
    "keyword of a pattern": (lambda: P.sliding_window(4, two_side=True), sd.ArgumentError, "sliding_window(): unexpected argument two_side: it takes w, two_sided. Did you mean 'two_sided'?"),
    "backend": (lambda: sd.compile(causal, backend="tild"), sd.PatternError, "backend must be one of 'auto', 'reference', 'tiled', 'cpp', 'flex', 'triton'; got 'tild'. Did you mean 'tiled'?"),
    "word of a choice": (lambda: sd.summary(sd.k, 4, "maen"), sd.PatternError, "summary(): how must be one of 'mean', 'max', 'min', 'sum', 'first', 'last'; got 'maen'. Did you mean 'mean'?"),
    "weights": (lambda: sd.per_chunk(selected, "softmx"), sd.PatternError, "Did you mean 'softmax'?"),
    "dtype": (lambda: sd.analyse(causal, 8, dtype="bfloat"), sd.ShapeError, "Did you mean 'bfloat16'?"),
    "share": (lambda: P.pbs(share="heads"), sd.PatternError, "pbs(): share must be one of 'head', 'group'; got 'heads'. Did you mean 'head'?"),
    "public name": (lambda: sd.patern, AttributeError, "Did you mean 'patterns'?"),
    "name of the kit": (lambda: sd.testing.chek, AttributeError, "Did you mean 'check'?"),
    "name of modules": (lambda: sd.nn.Atention, AttributeError, "Did you mean 'Attention'?"),
    "name of models": (lambda: sd.models.aply, AttributeError, "Did you mean 'apply'?"),
    "name of a pattern": (lambda: P.slidng_window, AttributeError, "Did you mean 'sliding_window'?"),
    "option of a module": (lambda: sd.nn.Attention(causal, bakend="tiled"), sd.TableError, "Did you mean 'backend'?"),
    "word of explain": (lambda: sd.compile(causal).explain(8, hedas=2), sd.TableError, "Did you mean 'heads'?"),
    "claim of a kernel": (lambda: sd.testing.Kernel(print, implements=causal, layuot="bshd"), sd.ArgumentError, "Kernel(): unexpected argument layuot"),
    "word of a call": (lambda: sd.attention(*[torch.zeros(1, 1, 2, 2)] * 3, causal, return_sle=True), sd.TableError, "Did you mean 'return_lse'?"),
    "pattern": (lambda: P.slidng_window(4), AttributeError, "has no pattern 'slidng_window'; public names are"),
}

INSTEAD: dict[str, Case] = {
    "function not called": (lambda: sd.compile(P.causal), sd.PatternError, "pattern must be a Mask or a Pattern; got the function causal. causal is a function that makes one: call it, causal()"),
    "function with arguments not called": (lambda: sd.attend(P.sliding_window), sd.PatternError, "call it, sliding_window(w)"),
    "function in a mask": (lambda: causal & P.documents, sd.PatternError, "documents is a function that makes one: call it, documents()"),
    "score function": (lambda: sd.attend(causal, score=lambda s, b, h, i, j: s), sd.PatternError, "To use a FlexAttention score function write sd.trace_score(<lambda>)"),
    "boolean tensor": (lambda: sd.attend(keep), sd.PatternError, "the mask of attend() must be a mask; got a Tensor of shape (8, 8) and torch.bool. Tensors are read through a table: keep = sd.table('keep', dtype=bool)"),
    "numpy mask": (lambda: sd.compile(np.ones((8, 8), bool)), sd.PatternError, "got a ndarray of shape (8, 8) and bool. Tensors are read through a table"),
    "text": (lambda: sd.compile("causal"), sd.PatternError, "The text form of a pattern is read by sd.parse(text)"),
    "compiled": (lambda: sd.compile(attn), sd.PatternError, "It is compiled already; what it was made of is its .pattern"),
    "pattern as a mask": (lambda: sd.attend(sd.attend(causal)), sd.PatternError, "A Pattern is a whole attention; its parts are pattern.mask and pattern.score"),
    "pattern & mask": (lambda: P.alibi_window(4, 2) & P.documents(), sd.PatternError, "operators join masks. Write sd.attend(pattern.mask & other, score=pattern.score)"),
    "pattern == mask": (lambda: causal & (sd.attend(causal) == causal), sd.PatternError, "is a whole attention, a mask with a score: operators join masks"),
    "branch & mask": (lambda: sd.attend(causal & selected) & causal, sd.PatternError, "join branches with sd.joint() or sd.mix()"),
    "mask as a score": (lambda: sd.attend(causal, score=causal), sd.PatternError, "the score of attend() must be a logit, not a condition; got Mask(kv_idx <= q_idx) (Mask). Pairs are dropped by the mask"),
    "choice as a score": (lambda: sd.attend(causal, score=selected), sd.PatternError, "the score of attend() must be a logit, not a condition"),
    "mask as a sink": (lambda: sd.attend(causal, sink=h < 2), sd.PatternError, "the sink of attend() must be a logit, not a condition"),
    "bool as a score": (lambda: sd.attend(causal, True), sd.PatternError, "the score of attend() must be a logit, not a condition; got True (bool)"),
    "q for its length": (lambda: sd.analyse(causal, q), sd.ShapeError, "q_len must be a whole number of at least 1; got a Tensor of shape (1, 2, 8, 16) and torch.float32. Lengths and sizes are numbers: q.shape[2], k.shape[2]"),
    "no length": (lambda: sd.analyse(causal), sd.ArgumentError, "analyse(): missing a required argument: 'q_len'. It is called as analyse(pattern, q_len, kv_len=None, block_size=128, *, q_offset=0"),
    "plan of too little": (lambda: sd.parallel.plan(causal, 64), sd.ArgumentError, "plan(): missing a required argument: 'world'. It is called as plan("),
    "pattern of the library": (lambda: sd.sliding_window(4), AttributeError, "module 'sparsedsl' has no attribute 'sliding_window'; it is one of the library: sd.patterns.sliding_window"),
    "parts in a list": (lambda: sd.merge([(q, q[..., 0])]), sd.ShapeError, "merge() takes the parts one by one, not in a list; write merge(*parts)"),
    "a block mask": (lambda: sd.compile(sd.compile(causal).block_mask(8, 8)), sd.PatternError, "is read by sd.trace_mask(block_mask.mask_mod)"),
    "a traced block mask": (lambda: sd.trace_mask(sd.compile(causal).block_mask(8, 8)), sd.TraceError, "which cannot be called. A BlockMask was made of its block_mask.mask_mod"),
    "small letters": (lambda: sd.testing.check(sd.testing.Kernel(lambda q, k, v: v, implements=causal), only="num"), sd.ArgumentError, "got 'num'. Did you mean 'NUM'?"),
    "table of a shape": (lambda: sd.compile(packed)(q, k, v), sd.TableError, "pass doc=tensor with the call. doc (int) is read as doc[kv_idx], doc[q_idx]"),
    "table of a program": (lambda: sd.compile(sd.attend(packed & selected))(q, k, v), sd.TableError, "doc (int) is read as doc[kv_idx], doc[q_idx]"),
    "one way out": (lambda: sd.compile(sd.attend(sd.log(kv_idx + 1.5) < q_idx), backend="cpp")(q, k, v), sd.UnsupportedError, "write the mask with integers. Use backend='tiled' (torch's"),
    "offset of None": (lambda: sd.analyse(causal, 8, q_offset=None), sd.ShapeError, "q_offset must be a whole number of at least 0; got None (NoneType)"),
    "endless offset": (lambda: sd.analyse(causal, 8, q_offset=2**70), sd.ShapeError, "q_offset must be at most 2**60"),
    "fractional width": (lambda: sd.analyse(sd.attend(causal & selected), 8, kv_heads=1.5), sd.ShapeError, "kv_heads must be a whole number of at least 1; got 1.5 (float)"),
    "sizes": (lambda: sd.analyse(sd.attend(causal & selected), 8, sizes=3), sd.ShapeError, "sizes must be a dict, axis -> size"),
    "dtype of a program": (lambda: program.explain(8, dtype="int8"), sd.PatternError, "dtype must be one of 'float64', 'float32', 'bfloat16', 'float16'; got 'int8'"),
    "q before positions": (lambda: sd.q <= sd.k, sd.PatternError, "<Input q> is a node of a program that gives a tensor; operators have no meaning on it: it is computed at the call. For positions of queries and keys write sd.q_idx and sd.kv_idx"),
    "positions for rows": (lambda: sd.dot(q_idx, kv_idx), sd.PatternError, "dot(): x must be sd.q, sd.k, sd.v, an input, a summary or reordered rows; got Index(q_idx) (Index)"),
    "tensors for rows": (lambda: sd.dot(q, k), sd.PatternError, "got a Tensor of shape (1, 2, 8, 16) and torch.float32. Nodes stand for the tensors of a call; other tensors come in by name: sd.input(name, axes)"),
    "wrong order": (lambda: sd.top_k(4, dot), sd.PatternError, "top_k(): scores must come from dot(), bound(), antidiagonal(), given_scores() or what is made of them; got 4 (int)"),
    "mask for scores": (lambda: sd.top_k(causal, 4), sd.PatternError, "top_k(): scores must come from dot()"),
    "power of scores": (lambda: sd.top_k(dot ** 2, 4), sd.PatternError, "This is the logit of a pair, for sd.attend(..., score=). Scores stay scores under + and -"),
    "product of scores": (lambda: dot * dot, sd.PatternError, "scores of blocks are joined by + and - alone, which give scores again"),
    "factors of other rows": (lambda: dot * sd.input("w", "batch heads keys"), sd.PatternError, "scores are multiplied by a factor for each row, an input with the axes 'batch', heads and 'queries'"),
    "scores over zero": (lambda: dot / 0, sd.PatternError, "cannot be divided by 0"),
    "scores and infinity": (lambda: dot + float("inf"), sd.PatternError, "scores are scaled and moved by finite numbers; got inf"),
    "mask by scores": (lambda: sd.attend(causal & (dot > 0)), sd.PatternError, "is learned but read in the mask"),
    "a number joined": (lambda: sd.joint(causal, 3), sd.PatternError, "joint() joins attentions: patterns, masks, or what attend(), recall(), ... give; got 3 (int)"),
    "a pattern function joined": (lambda: sd.joint(causal, P.sinks), sd.PatternError, "call it, sinks(n)"),
    "Python's max": (lambda: max(q_idx, kv_idx), sd.PatternError, "sd.minimum(a, b), sd.maximum(a, b) for Python's min and max"),
    "blocks by /": (lambda: q_idx / 64 == kv_idx / 64, sd.PatternError, "For blocks of tokens write `//`: q_idx // 64 == kv_idx // 64"),
    "round": (lambda: round(q_idx / 64), sd.PatternError, "Whole numbers: x // n rounds down"),
    "index into an index": (lambda: q_idx[0], sd.PatternError, "Tables are read by position: t = sd.table('t'); t[sd.q_idx]"),
    "dot product of positions": (lambda: q_idx @ kv_idx, sd.PatternError, "Dot products of queries and keys are sd.score"),
    "a flag of a table": (lambda: sd.table("t", monotone=keep), sd.TableError, "table 't': monotone must be True or False; got a Tensor of shape (8, 8)"),
    "an array for a word": (lambda: sd.compile(causal, backend=np.ones(3)), sd.PatternError, "backend must be one of"),
    "a tensor for a name": (lambda: sd.top_k(dot, 1, name=ids), sd.PatternError, "top_k(): name must be a Python identifier"),
    "allow of a pattern": (lambda: sd.compile(causal, allow=ids), sd.PatternError, "a static pattern has no effects; leave it out"),
    "size of a figure": (lambda: sd.plot(causal, 8, figsize=3), sd.PatternError, "plot(): figsize must be (width, height) in inches; got 3 (int)"),
    "panels": (lambda: sd.plot(causal, 8, panels=3), sd.PatternError, "panels must be some of"),
    "rename": (lambda: sd.trace_mask(lambda b, h, i, j: i >= j, rename=3), sd.TraceError, "rename must be a dict, table name -> new name; got 3 (int)"),
    "a class traced": (lambda: sd.trace_mask(dict), sd.TraceError, "got the class dict, which is no function of them"),
    "names of tables": (lambda: P.documents(np.ones(3), offsets="start"), sd.TableError, "table name must be a Python identifier"),
    "seed of the kit": (lambda: sd.testing.check(causal, examples=1, seed=[1]), sd.SparseDSLError, "seed must be a whole number or None; got [1] (list)"),
    "keyword of the kit": (lambda: sd.testing.shapes(max_length=3), sd.ArgumentError, "shapes(): unexpected argument max_length: it takes max_len"),
    "round trip of a text": (lambda: sd.testing.assert_text_round_trip("q_idx"), sd.PatternError, "expression must be an index, a mask or a score; got 'q_idx' (str)"),
    "target": (lambda: sd.build(causal, target="sm_9"), sd.UnsupportedError, "got 'sm_9'. Did you mean 'sm_90'?"),
    "NaN": (lambda: sd.attend(causal, score=math.nan), sd.PatternError, "the score of attend() must not be NaN"),
}

CASES = {f"{group}: {name}": case for group, cases in {"elsewhere": ELSEWHERE, "nearly": NEARLY, "instead": INSTEAD}.items() for name, case in cases.items()}
# fmt: on


@pytest.mark.parametrize("name", CASES)
def test_misuses_are_told_what_was_meant(name: str) -> None:
    use, kind, message = CASES[name]
    with pytest.raises(kind, match=re.escape(message)) as failure:
        use()
    assert type(failure.value) is kind


@pytest.mark.parametrize("logit", [1, q_idx - kv_idx, sd.table("bias", dtype=float)[h]])
def test_scores_that_never_read_the_logit_are_warned_of(logit: Any) -> None:
    text = "does not read sd.score: queries and keys have no effect on the logits"
    found = sd.attend(causal, score=logit)
    tables = {"bias": torch.zeros(1)} if "bias" in found.tables else {}
    assert any(text in warning for warning in sd.analyse(found, 8, **tables).warnings)
    assert text in str(sd.analyse(found, 8, **tables))
    assert not any(text in warning for warning in sd.analyse(sd.attend(causal, score=score + logit), 8, **tables).warnings)
    chosen = sd.attend(causal & selected, score=logit)
    assert any(text in warning for warning in sd.analyse(chosen, 8, **tables).warnings)


def test_the_functions_of_the_door_are_pickled_by_their_public_names() -> None:
    for function in (sd.attend, sd.top_k, P.sliding_window):
        assert pickle.loads(pickle.dumps(function)) is function
    local = pickle.loads(pickle.dumps(functools.partial(P.sliding_window, 4)))
    assert local().same_as(P.sliding_window(4))
    error = pickle.loads(pickle.dumps(sd.MissingPackageError("sd.plot", "matplotlib", "plots")))
    assert isinstance(error, sd.UnsupportedError) and "pip install '.[plots]' in a checkout" in str(error)


def test_errors_of_the_functions_themselves_stay_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError):
        sd.trace_mask(lambda b, h, i, j: i >= 1 // 0)


@pytest.mark.parametrize(
    "words, message",
    [
        (["explain", "sparsedsl.patterns:causal", "--q-len", "8", "--hedas", "4"], "Did you mean '--heads'?"),
        (["explian", "sparsedsl.patterns:causal"], "Did you mean 'explain'?"),
        (["explain", "sparsedsl.patterns:casual", "--q-len", "8"], "Did you mean 'causal'?"),
        (["explain", "sparsedsl.patterns:causal", "--q-len", "8", "--backend", "tild"], "Did you mean 'tiled'?"),
    ],
)
def test_the_command_line_says_what_was_meant(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(words)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("package, extra", [("hypothesis", "testing"), ("transformers", "models")])
def test_missing_packages_name_the_extra(package: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import sys

    for name in [name for name in sys.modules if name.startswith(f"sparsedsl.{extra}")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(vars(sd), extra, raising=False)
    with pytest.raises(sd.MissingPackageError, match=re.escape(f"pip install '.[{extra}]' in a checkout")) as failure:
        getattr(sd, extra)
    assert isinstance(failure.value, ImportError)
    if extra == "testing":
        assert cli.main(["check", "sparsedsl.patterns:causal"]) == 2
        assert "needs the package hypothesis" in capsys.readouterr().err


def test_tensors_of_counterexamples_lie_in_a_private_folder() -> None:
    """Nobody can have put a link, or a file to be loaded, where the next one is written."""
    from sparsedsl.testing.call_shapes import tensor_code

    value = torch.arange(1000)
    path = re.fullmatch(r"torch.load\('(.*)'\)", tensor_code(value))
    assert path is not None
    from pathlib import Path

    file = Path(path[1])
    assert file.parent.stat().st_mode & 0o077 == 0
    assert torch.equal(torch.load(file), value)
    assert tensor_code(value) == tensor_code(value.clone())
