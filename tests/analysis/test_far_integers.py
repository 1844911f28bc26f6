"""Integers at the ends of int64: every path gives what Python's integers give, or refuses with an error of ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.effort import EFFORT
from sparsedsl.analysis.exactness import exact_domain
from sparsedsl.analysis.rows import count_rows
from sparsedsl.analysis.tiles import classify
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.exact import evaluate_exactly
from sparsedsl.testing.far_integers import FarCase, declared, far_cases, far_texts
from sparsedsl.testing.list_checks import tile_classes
from sparsedsl.testing.plain import PositionTables, plain_value

INT64 = torch.iinfo(torch.int64)
causal = kv_idx <= q_idx
doc, end, start = sd.table("doc"), sd.table("end"), sd.table("start")


def positions(domain: Domain) -> dict[str, Any]:
    q = torch.arange(domain.rows)[:, None] + domain.q_offset
    return {"b": 0, "h": 0, "q_idx": q, "kv_idx": torch.arange(domain.kv_len), **domain.lengths}


PATHS = ("lists", "rows", "tiled", "functions", "block mask")


def assert_exact(case: FarCase, path: str) -> None:
    """The reference and one more path agree with Python's integers, or both refuse."""
    pattern, wanted = case.pattern, case.allowed()
    q, k, v = (torch.randn(1, 1, n, 8, dtype=torch.float64) for n in (case.q_len, case.kv_len, case.kv_len))

    def run(backend: str) -> Any:
        return sd.compile(pattern, backend=backend)(q, k, v, q_offset=case.q_offset, return_lse=True, **case.own)

    try:
        out, lse = run("reference")
    except (sd.TableError, sd.UnsupportedError, sd.ShapeError) as refused:
        event(f"refused: {type(refused).__name__}")
        with pytest.raises(type(refused)):
            run("tiled")
        if path == "lists":
            with pytest.raises(sd.SparseDSLError):
                sd.analyse(pattern, case.q_len, case.kv_len, q_offset=case.q_offset, **case.own)
        return
    domain = Domain(case.q_len, case.kv_len, case.q_offset, tables=case.own)
    exact = exact_domain(pattern.exprs, domain)
    event("squeezed" if exact is not domain else "as they are")
    expr = pattern.mask.expr
    env = positions(domain)
    shape = wanted.shape
    assert torch.equal(evaluate_exactly(expr, {**env, **domain.tables}).expand(shape), wanted), "exactly"
    assert torch.equal(evaluate(expr, {**env, **exact.tables}).expand(shape), wanted), "squeezed"
    logits = (q @ k.mT)[0, 0] * 8**-0.5
    assert torch.allclose(lse[0, 0], logits.masked_fill(~wanted, float("-inf")).logsumexp(1), atol=1e-9), "reference"
    classes = tile_classes(wanted[None, None], (4, 3))
    match path:
        case "lists":
            assert torch.equal(classify(expr, exact, (4, 3)).classes(), classes)
        case "rows":
            rows = count_rows(expr, exact, classify(expr, exact, (1, 16)))
            assert (rows.allowed, rows.empty) == (int(wanted.sum()), int((~wanted.any(1)).sum()))
        case "tiled":
            for got, right in zip(run("tiled"), (out, lse), strict=True):
                assert torch.allclose(got, right, atol=1e-9)
        case "functions":
            lengths = {"q_len": domain.lengths["q_len"], "kv_len": case.kv_len}
            mod = sd.compile(pattern).mask_mod(q_offset=case.q_offset, **lengths, **case.own)
            found = mod(0, 0, torch.arange(case.q_len)[:, None], torch.arange(case.kv_len))
            assert torch.equal(torch.as_tensor(found).expand(shape), wanted)
        case "block mask":
            mask = sd.compile(pattern).block_mask(case.q_len, case.kv_len, q_offset=case.q_offset, block_size=(4, 3), **case.own)
            assert torch.equal(mask.to_dense()[0, 0].bool(), classes[0, 0] > 0)


@settings(max_examples=12)
@given(far_cases(places=4), st.integers(0, len(PATHS) - 1))
def test_every_path_gives_what_pythons_integers_give(cases, first):
    for number, case in enumerate(cases):
        assert_exact(case, PATHS[(first + number) % len(PATHS)])


def holds(text: str, witness: Any, others: dict[str, torch.Tensor]) -> bool:
    """A mask at a witness, in Python's integers. ``others``: tables that the text reads and its simplified form does not."""
    lengths = (witness.q_len or witness.q_idx + 1, witness.kv_len or witness.kv_idx + 1)
    # Arrays of Python's integers, as `~` of Python's own True is -2, which is true again.
    numbers = (np.asarray([number], dtype=object) for number in (*witness.indices, *lengths))
    point = dict(zip(("b", "h", "q_idx", "kv_idx", "q_len", "kv_len"), numbers, strict=True))
    tables = {name: np.asarray(table.tolist(), dtype=object) for name, table in {**others, **witness.tables}.items()}
    return bool(plain_value(text, point, tables))


def assert_right_verdict(case: FarCase, other: str) -> None:
    """What is proved holds where Python's integers are asked, and a witness refutes in Python's integers."""
    verdict = sd.implies(case.pattern, sd.parse(declared(other)))
    event(verdict.status)
    if verdict == sd.PROVED:
        assert not (case.allowed() & ~case.allowed(other)).any()
    elif verdict == sd.REFUTED:
        assert holds(case.text, verdict.witness, case.tables), verdict
        assert not holds(other, verdict.witness, case.tables), verdict


@settings(max_examples=6)
@given(far_cases(depth=1), far_texts(depth=1))
def test_verdicts_hold_in_pythons_integers(cases, other):
    (case,) = cases
    with EFFORT.using(proof_ms=200):
        for text in (other, f"({case.text} | {other})", f"({other} & (kv_idx <= q_idx))"):
            assert_right_verdict(case, text)


# ---- by name ----------------------------------------------------------------------------------------------------------------------

LENGTH = 120


def documents_apart() -> torch.Tensor:
    return torch.where(torch.arange(LENGTH) % 3 == 0, -(2**62) - 1, 2**62)


FAR = {
    "documents farther apart than int64": ((doc[q_idx] == doc[kv_idx]) & causal, {"doc": documents_apart()}),
    "documents in order": ((doc[q_idx] <= doc[kv_idx]) & causal, {"doc": documents_apart()}),
    "no end": ((kv_idx < end[q_idx]) & causal, {"end": torch.full((LENGTH,), INT64.max)}),
    "an end before all": ((kv_idx < end[q_idx]) & causal, {"end": torch.full((LENGTH,), INT64.min)}),
    "no start": ((kv_idx >= start[q_idx]) & causal, {"start": torch.full((LENGTH,), INT64.min)}),
    "a start after all": ((kv_idx >= start[q_idx]) | (kv_idx == q_idx), {"start": torch.full((LENGTH,), INT64.max)}),
    "padding beside documents": (
        (doc[q_idx] == doc[kv_idx]) & (doc[kv_idx] != 3),
        {"doc": torch.where(torch.arange(LENGTH) < 50, INT64.min, torch.arange(LENGTH) // 60)},
    ),
    "ends that meet": (
        (kv_idx < sd.minimum(end[q_idx], start[q_idx] + 5)) & causal,
        {"end": torch.full((LENGTH,), INT64.max), "start": torch.arange(LENGTH) // 2},
    ),
    "the least int32": (
        sd.table("doc", monotone=True)[kv_idx] >= sd.table("doc", monotone=True)[q_idx],
        {"doc": torch.tensor([-(2**31)] * 60 + [7] * (LENGTH - 60), dtype=torch.int32)},
    ),
}


def python_mask(mask: Any, tables: dict[str, torch.Tensor], q_offset: int = 0) -> torch.Tensor:
    """Pair by pair in Python's integers, from the mask's text."""
    where = PositionTables(q_len=LENGTH, kv_len=LENGTH, q_offset=q_offset, exact=True)
    whole = {name: np.asarray(table.tolist(), dtype=object) for name, table in tables.items()}
    found = np.asarray(plain_value(str(mask), where, whole)).astype(bool)
    return torch.as_tensor(np.broadcast_to(found, where.shape).copy())[0, 0]


@pytest.mark.parametrize("name", FAR)
@pytest.mark.parametrize("backend", ["reference", "tiled", "auto"])
def test_values_that_are_only_compared_may_lie_anywhere(name, backend):
    mask, tables = FAR[name]
    q, k, v = (torch.randn(1, 1, LENGTH, 8, dtype=torch.float64) for _ in range(3))
    allowed = python_mask(mask, tables)
    weights = ((q @ k.mT) * 8**-0.5).masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(sd.compile(mask, backend=backend)(q, k, v, **tables), weights @ v, atol=1e-9, rtol=1e-9)
    report = sd.analyse(mask, LENGTH, block_size=16, **tables)
    assert report.density == pytest.approx(float(allowed.double().mean()))
    assert torch.equal(report.lists.classes(), tile_classes(allowed[None, None], (16, 16)))


def test_a_leaking_order_is_refuted_and_seen():
    order = doc[kv_idx] <= doc[q_idx]
    verdict = sd.implies(order, causal)
    assert verdict == sd.REFUTED
    assert sd.analyse(order, 4, doc=torch.tensor([INT64.max, 0, 0, INT64.min])).causal == sd.REFUTED


REFUSED = {
    "product": (q_idx * (1 << 62) + kv_idx >= 5, {}, 0, r"\*q_idx may be anything from .* exactly up to 2\*\*60"),
    "sum of values": (
        doc[q_idx] + doc[kv_idx] > 0,
        {"doc": documents_apart()},
        0,
        r"'doc' holds values from -4611686018427387905 to 46",
    ),
    "value as a number": (
        doc[q_idx] % 4 == doc[kv_idx] - doc[q_idx],
        {"doc": documents_apart()},
        0,
        "more than a comparison|holds",
    ),
    "offset": (kv_idx * 3 <= q_idx * 5, {}, 1 << 62, r"q_offset must be at most 2\*\*60.* 4611686018427387904"),
    "offset times 5": (
        kv_idx * 3 <= q_idx * 5,
        {},
        (1 << 60) - LENGTH,
        r"q_offset 1152921504606846856.* 5\*q_idx - 3\*kv_idx may be",
    ),
    "constant": (
        kv_idx + doc[q_idx] <= 2**62,
        {"doc": torch.zeros(LENGTH, dtype=torch.int64)},
        0,
        r"4611686018427387904.*2\*\*60",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_wrap_around_is_refused_everywhere(name):
    mask, tables, offset, message = REFUSED[name]
    q = torch.zeros(1, 1, LENGTH, 8)
    for backend in ("reference", "tiled", "flex", "auto"):
        with pytest.raises(sd.SparseDSLError, match=message):
            sd.compile(mask, backend=backend)(q, q, q, q_offset=offset, **tables)
    attn = sd.compile(mask)
    for ask in (
        lambda: sd.analyse(mask, LENGTH, LENGTH, q_offset=offset, **tables),
        lambda: attn.block_mask(LENGTH, LENGTH, q_offset=offset, **tables),
        lambda: attn.explain(LENGTH, LENGTH, q_offset=offset, **tables),
        lambda: attn.mask_mod(q_len=offset + LENGTH, kv_len=LENGTH, q_offset=offset, **tables),
    ):
        with pytest.raises(sd.SparseDSLError, match=message):
            ask()


def test_values_of_scores_keep_their_place():
    """A table that is compared in a score, and one that is used as a number there."""
    near = sd.attend(causal, score=sd.where(doc[q_idx] == doc[kv_idx], sd.score, sd.score - 1))
    far = sd.attend(causal, score=sd.score + doc[kv_idx] * 1e-19)
    both = sd.attend(causal & (doc[q_idx] < doc[kv_idx]), score=sd.score + doc[kv_idx] * 1e-19)
    q, k, v = (torch.randn(1, 1, LENGTH, 8, dtype=torch.float64) for _ in range(3))
    for pattern in (near, far):
        outs = [sd.compile(pattern, backend=b)(q, k, v, doc=documents_apart()) for b in ("reference", "tiled")]
        torch.testing.assert_close(*outs, atol=1e-9, rtol=1e-9)
        assert not torch.allclose(outs[0], sd.compile(causal)(q, k, v))
    with pytest.raises(sd.TableError, match="may be compared"):
        sd.compile(both)(q, k, v, doc=documents_apart())


def test_a_table_beside_a_choice_of_itself_is_a_mask_like_any_other():
    mask = doc[q_idx] < sd.where(doc[q_idx] < 5, sd.minimum(q_idx, doc[q_idx]), q_idx)
    q = torch.zeros(1, 1, LENGTH, 8)
    assert sd.compile(mask, backend="reference")(q, q, q, doc=documents_apart()).shape == q.shape


def test_a_minimum_that_is_also_a_factor_is_taken_apart_once():
    least = sd.minimum(q_idx, doc[kv_idx])
    for mask in (least + least * start[q_idx] <= 30, least * abs(least - 3) + least <= 4):
        tables = {"doc": torch.arange(LENGTH) % 7, "start": torch.arange(LENGTH) % 5 - 2}
        tables = {name: table for name, table in tables.items() if name in mask.tables}
        report = sd.analyse(mask, LENGTH, block_size=16, **tables)
        assert torch.equal(report.lists.classes(), tile_classes(python_mask(mask, tables)[None, None], (16, 16)))


def test_ordinary_tables_are_left_alone():
    table = torch.arange(LENGTH)
    domain = Domain(LENGTH, LENGTH, tables={"doc": table})
    assert exact_domain((((doc[q_idx] == doc[kv_idx]) & causal).expr,), domain) is domain


def test_a_squeezed_table_is_made_once_and_again_when_it_is_written_to():
    table, mask = documents_apart(), (doc[q_idx] == doc[kv_idx]).expr
    first, second = (exact_domain((mask,), Domain(LENGTH, LENGTH, offset, tables={"doc": table})) for offset in (0, 7))
    assert first.tables["doc"] is second.tables["doc"]
    table[0] = 5
    third = exact_domain((mask,), Domain(LENGTH, LENGTH, tables={"doc": table}))
    assert third.tables["doc"][0] == 5


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_types_that_torch_cannot_compare_are_refused(dtype):
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(sd.TableError, match=r"doc\.to\(torch\.int64\)"):
        sd.compile(doc[q_idx] >= kv_idx)(q, q, q, doc=torch.zeros(4, dtype=dtype))


def test_no_tensor_holds_values_beyond_int64():
    with pytest.raises(sd.TableError, match="no tensor holds integers of values_in"):
        sd.table("t", values_in=(2**63, 2**64))
    wide = sd.table("t", values_in=(-(2**70), 2**70))
    assert sd.implies(q_idx >= 0, wide[q_idx] <= 2**63 - 1) == sd.PROVED


def test_programs_compare_far_values_too():
    selected = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 16)), 2)
    same = doc[q_idx] == doc[kv_idx]
    q, k, v = (torch.randn(1, 1, LENGTH, 8, dtype=torch.float64) for _ in range(3))
    far = documents_apart()
    near = torch.arange(LENGTH) % 3
    near = (near > 0).long()
    for backend in ("reference", "tiled"):
        attn = sd.compile(sd.attend(causal & same & (selected | (q_idx - kv_idx < 9))), backend=backend)
        torch.testing.assert_close(attn(q, k, v, doc=far), attn(q, k, v, doc=near))
    with pytest.raises(sd.TableError, match="'doc' holds values"):
        sd.compile(sd.attend(causal & (doc[q_idx] + doc[kv_idx] > 0) & selected))(q, k, v, doc=far)


@pytest.mark.parametrize("value", [INT64.min, INT64.min + 1, INT64.max - 1, INT64.max])
def test_a_constant_at_the_end_of_int64_is_no_float(value: int) -> None:
    """As floats the two last numbers of either end are equal: a call must not go on with them."""
    mask = doc[kv_idx] == value
    assert str(value) in mask.text
    ids = torch.tensor([INT64.min, INT64.min + 1, 0, INT64.max - 1, INT64.max])
    q = k = v = torch.randn(1, 1, 5, 8)
    for backend in ("reference", "tiled"):
        with pytest.raises(sd.TableError, match=f"compares with the constant {value}"):
            sd.compile(mask, backend=backend)(q, k, v, doc=ids)


@pytest.mark.parametrize("constant", [2**63, -(2**63) - 1, 2**70])
def test_a_constant_beyond_int64_is_refused(constant: int) -> None:
    with pytest.raises(sd.PatternError, match=f"{constant} is no whole number of 64 bits"):
        _ = doc[kv_idx] == constant
