"""Rows read and written where they lie: attention in C++ by numbers of rows against the dense meaning on gathered copies, and programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx, score
from sparsedsl.backends.cpp.pooling import pooled_rows
from sparsedsl.errors import ShapeError
from sparsedsl.execute.static import StaticAttention
from sparsedsl.lang.pattern import Pattern
from sparsedsl.runtime.call import check_call
from sparsedsl.runtime.placed_rows import gather_rows, scatter_rows
from sparsedsl.runtime.places import Places

Tensor = torch.Tensor
CAUSAL = kv_idx <= q_idx
bias, sink = sd.table("bias", learned=True), sd.table("sink", learned=True)
kept = sd.table("kept", dtype=bool)
PATTERNS: dict[str, Any] = {
    "all": sd.attend(True),
    "causal": sd.attend(CAUSAL),
    "window": sd.attend(sd.patterns.sliding_window(9)),
    "dilated": sd.attend(sd.patterns.dilated(4, step=3)),
    "pair by pair": sd.attend((kv_idx * 3 + q_idx) % 4 != 0),
    "by head": sd.attend((kv_idx * 3 + q_idx + h) % 4 != 0),
    "table": sd.attend(CAUSAL & kept[kv_idx]),
    "learned": sd.attend(CAUSAL, score=score + bias[h, sd.minimum(abs(q_idx - kv_idx), 7)], sink=sink[h]),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def numbers(generator: torch.Generator, batch: int, heads: int, rows: int, count: int, ascending: bool = False) -> Tensor:
    """Of so many rows, no row twice."""
    found = torch.rand(batch, heads, rows, generator=generator).argsort(-1)[..., :count]
    return found.sort(-1).values if ascending else found


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    """Sizes, and which rows are taken."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 5]))
    heads, rows, keys = kv_heads * group, draw(st.sampled_from([1, 7, 40, 150])), draw(st.sampled_from([3, 17, 70, 200]))
    width, width_v = draw(st.sampled_from([1, 8, 16, 20])), draw(st.sampled_from([3, 16]))
    sizes = (heads, rows, width), (kv_heads, keys, width), (kv_heads, keys, width_v)
    places = {}
    for name, length, some in (("keys", keys, [1, kv_heads, heads]), ("queries", rows, [1, heads])):
        if draw(st.booleans()):
            count = draw(st.sampled_from([1, length - length // 3, length]))
            places[name] = numbers(generator, draw(st.sampled_from([1, batch])), draw(st.sampled_from(some)), length, count)
    tensors = [torch.randn(batch, *size, generator=generator) for size in sizes]
    return {"tensors": tensors, "places": Places(**places), "offset": draw(st.sampled_from([0, 5])), "generator": generator}


def tables_of(pattern: Pattern, q: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    heads = q.shape[1]
    known = {
        "bias": torch.randn(heads, 8, generator=generator, dtype=torch.float64), "kept": torch.rand(200, generator=generator) < 0.7,
        "sink": torch.randn(heads, generator=generator, dtype=torch.float64),
    }  # fmt: skip
    return {name: known[name] for name in pattern.tables}


def results(run: Any, tensors: list[Tensor], tables: dict[str, Tensor]) -> list[Tensor]:
    """Out, LSE, and gradients of q, k, v and the tables that learn."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    given = {name: t.clone().requires_grad_() if t.is_floating_point() else t for name, t in tables.items()}
    out, lse = run(*leaves, given)
    slopes = [torch.randn(t.shape, generator=torch.Generator().manual_seed(n)).to(t) for n, t in enumerate((out, lse))]
    total = (out * slopes[0]).sum() + torch.where(lse.isfinite(), lse * slopes[1], 0.0).sum()
    wanted = [*leaves, *(t for t in given.values() if t.requires_grad)]
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    return [out.detach(), lse.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted, strict=True))]


def placed(pattern: Pattern, x: dict[str, Any], backend: str = "cpp") -> Any:
    """The call by numbers of rows."""
    static = StaticAttention(pattern)

    def run(q: Tensor, k: Tensor, v: Tensor, tables: dict[str, Tensor]) -> Any:
        call = check_call(pattern, q, k, v, tables, q_offset=x["offset"], places=x["places"])
        return static.attend(call, backend, lse=True)

    return run


def dense(pattern: Pattern, x: dict[str, Any]) -> Any:
    """The meaning of the pattern, on copies of the rows."""
    attn, places = sd.compile(pattern, backend="reference"), x["places"]

    def run(q: Tensor, k: Tensor, v: Tensor, tables: dict[str, Tensor]) -> Any:
        rows = q if places.queries is None else gather_rows(q, places.queries)
        k, v = (t if places.keys is None else gather_rows(t, places.keys) for t in (k, v))
        out, lse = attn(rows, k, v, q_offset=x["offset"], return_lse=True, **tables)
        if places.queries is None:
            return out, lse
        return scatter_rows(out, places.queries, q.shape[2]), scatter_rows(lse, places.queries, q.shape[2], -torch.inf)

    return run


def assert_as_on_copies(pattern: Pattern, x: dict[str, Any], dtype: torch.dtype, backend: str = "cpp") -> None:
    tensors, allowed = [t.to(dtype) for t in x["tensors"]], TOLERANCE[dtype]
    tables = tables_of(pattern, tensors[0], x["generator"])
    got, wanted = (
        results(placed(pattern, x, backend), tensors, tables),
        results(dense(pattern, x), [t.double() for t in tensors], tables),
    )
    for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
        size = 1 + (float(other[other.isfinite()].abs().max()) if other.isfinite().any() else 0.0)
        torch.testing.assert_close(one.double(), other, atol=allowed * size, rtol=allowed, msg=lambda m, n=number: f"{n}: {m}")


@pytest.mark.parametrize("name", PATTERNS)
@given(x=calls())
@settings(max_examples=15, deadline=None)
def test_results_and_gradients_are_those_on_copies(name: str, x: dict[str, Any]) -> None:
    assert_as_on_copies(PATTERNS[name], x, torch.float64)


@pytest.mark.parametrize("name", ["causal", "by head", "learned"])
@given(x=calls(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=10, deadline=None)
def test_types_of_less_precision(name: str, x: dict[str, Any], dtype: torch.dtype) -> None:
    assert_as_on_copies(PATTERNS[name], x, dtype)


@given(x=calls(), backend=st.sampled_from(["tiled", "reference", "auto"]))
@settings(max_examples=10, deadline=None)
def test_backends_that_do_not_follow_numbers_take_copies(x: dict[str, Any], backend: str) -> None:
    assert_as_on_copies(PATTERNS["learned"], x, torch.float64, backend)


def order_of(seed: int, heads: int, length: int, count: int) -> Tensor:
    return numbers(torch.Generator().manual_seed(seed), 1, heads, length, count)


def test_digits_do_not_depend_on_threads() -> None:
    places = Places(order_of(0, 4, 700, 700), order_of(1, 4, 600, 500).sort(-1).values)
    x = {"places": places, "offset": 0}
    tensors = [torch.randn(1, heads, length, 16) for heads, length in ((4, 600), (2, 700), (2, 700))]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(placed(PATTERNS["causal"], x), tensors, {}))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("what", [float("nan"), float("inf"), 1e38])
def test_rows_that_nobody_sees_may_hold_anything(what: float) -> None:
    places = Places(order_of(0, 2, 40, 30), order_of(1, 2, 40, 20).sort(-1).values)
    x = {"places": places, "offset": 0}
    q, k, v = (torch.randn(1, heads, 40, 8) for heads in (2, 1, 1))
    wanted = results(placed(PATTERNS["causal"], x), [q, k, v], {})
    seen = torch.zeros(40, dtype=torch.bool)
    for head in range(2):  # of 20 queries, the first 20 keys
        seen[places.keys[0, head, :20]] = True
    assert not seen.all()
    q, k, v = q.clone(), k.clone(), v.clone()
    k[:, :, ~seen] = v[:, :, ~seen] = what
    for head in range(2):
        q[0, head, [i for i in range(40) if i not in places.queries[0, head].tolist()]] = what
    for one, other in zip(results(placed(PATTERNS["causal"], x), [q, k, v], {}), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_places_that_do_not_fit_are_refused() -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    with pytest.raises(ShapeError, match="do not fit k"):
        check_call(PATTERNS["all"], q, k, k, {}, places=Places(torch.zeros(2, 3, 5, dtype=torch.int64)))
    with pytest.raises(ShapeError, match="do not fit q"):
        check_call(PATTERNS["all"], q, k, k, {}, places=Places(None, torch.zeros(3, 4, 5, dtype=torch.int64)))


@given(seed=st.integers(0, 2**31), heads=st.sampled_from([(1, 4), (2, 4), (4, 1), (3, 3)]), block=st.sampled_from([1, 16, 70]),
       how=st.sampled_from(["mean", "max"]), dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]))  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_pooled_rows_are_those_of_a_copy(seed: int, heads: tuple[int, int], block: int, how: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, heads[0], 150, 24, generator=generator).to(dtype)
    places = numbers(generator, 1 + seed % 2, heads[1], 150, 140)
    got, wanted = pooled_rows(x, block, how, "zero", places), pooled_rows(gather_rows(x, places), block, how, "zero")
    assert got is not None and wanted is not None and torch.equal(got, wanted)


# ---- programs ----------------------------------------------------------------------------------------------------------------------

LATER = ["selection reads later queries"]
PROGRAMS: dict[str, Any] = {
    "pbs": sd.patterns.pbs(8, 16, 0.7),
    "pbs, one order a group": sd.patterns.pbs(8, 16, 0.7, share="group"),
    "tokens": sd.patterns.token_sparse(0.2, 16, 7, 30),
    "tokens, window inside": sd.patterns.token_sparse(0.2, 16, 7, 30, inside=sd.attend(sd.patterns.sliding_window(9), sink=0.5)),
    "tokens, pbs inside": sd.patterns.token_sparse(0.2, 16, 7, 30, inside=sd.patterns.pbs(8, 16, 0.7)),
}


@pytest.mark.parametrize("backend", ["cpp", "auto"])
@pytest.mark.parametrize("length", [64, 101])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_reorder_and_drop(name: str, length: int, backend: str) -> None:
    def found(backend: str) -> list[Tensor]:
        attn = sd.compile(PROGRAMS[name], backend=backend, allow=LATER)
        generator = torch.Generator().manual_seed(length)
        tensors = [torch.randn(2, heads, length, 12, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
        with torch.no_grad():
            plain = attn(*tensors)
        got = results(lambda q, k, v, tables: attn(q, k, v, return_lse=True), tensors, {})
        torch.testing.assert_close(plain, got[0])
        return got

    for one, other in zip(found(backend), found("reference"), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "copies"), [("pbs", 0), ("pbs, one order a group", 0), ("tokens", 0), ("tokens, pbs inside", 6)]
)
def test_no_copy_is_made_where_rows_are_followed(name: str, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsedsl.execute import node_rules

    made: list[Any] = []
    monkeypatch.setattr(node_rules, "gather_rows", lambda x, places: made.append(x) or gather_rows(x, places))
    q, k, v = (torch.randn(2, heads, 64, 16) for heads in (4, 2, 2))
    with torch.no_grad():
        sd.compile(PROGRAMS[name], backend="cpp")(q, k, v)
    assert len(made) == copies
