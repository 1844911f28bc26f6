"""Breaking a stick in generated C++: keys in order however they are found, shares of keys, many digits, and where nothing is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx, score
from sparsedsl.execute.static import StaticAttention
from sparsedsl.runtime.call import check_call
from sparsedsl.runtime.placed_rows import gather_rows
from sparsedsl.runtime.places import Places
from sparsedsl.testing import AttentionCase, assert_matches_reference, inputs, patterns, shapes, tables_for, tensor

earlier = kv_idx < q_idx
bias, chosen = sd.table("bias", learned=True), sd.table("chosen", dtype=bool)


def stick(mask: Any, logit: Any = score) -> Any:
    return sd.attend(mask, score=logit, normaliser="stick_breaking")


PATTERNS = {
    "earlier keys": stick(earlier),
    "two runs": stick((earlier & (q_idx - kv_idx < 40)) | (kv_idx < 9)),
    "blocks, full and partial ones in turn": stick(chosen[q_idx // 32, kv_idx // 48], score + 2),
    "residues, with a learned table": stick(earlier & ((q_idx - kv_idx) % 3 == 0), 2 * score + bias[h, q_idx % 5]),
}
TABLES = {"bias": tensor(4, 5, seed=4), "chosen": (torch.arange(200)[:, None] * 3 + torch.arange(200)) % 5 < 2}
CALLS = {"many queries": (200, 200, 0), "ragged": (37, 150, 113), "more queries than keys": (90, 40, 0)}


def qkv(queries: int, keys: int, **words: Any) -> list[torch.Tensor]:
    return [tensor(2, heads, n, 16, seed=seed, **words) for seed, (heads, n) in enumerate(((4, queries), (2, keys), (2, keys)))]


def assert_right(pattern: Any, q: Any, k: Any, v: Any, **words: Any) -> None:
    """Output and all gradients are those of plain attention, as closely as the precision allows."""
    attn = sd.compile(pattern, backend="cpp")
    learned = {f"d{name}" for name, spec in attn.pattern.tables.items() if spec.learned}
    assert {"out", "dq", "dk", "dv"} | learned == set(assert_matches_reference(attn, q, k, v, **words))


@pytest.mark.parametrize("name", PATTERNS)
def test_however_keys_are_found(name: str) -> None:
    tables = {table: TABLES[table] for table in sd.compile(PATTERNS[name]).pattern.tables}
    for queries, keys, offset in CALLS.values():
        assert_right(PATTERNS[name], *qkv(queries, keys), q_offset=offset, **tables)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_types(dtype: torch.dtype) -> None:
    assert_right(PATTERNS["earlier keys"], *qkv(90, 90, dtype=dtype))
    assert_right(PATTERNS["earlier keys"], *qkv(1, 90, dtype=dtype), q_offset=89)


@pytest.mark.parametrize("name", ["earlier keys", "blocks, full and partial ones in turn"])
@pytest.mark.parametrize("queries", [1, 3])
def test_shares_of_the_keys_are_joined_from_the_last(name: str, queries: int) -> None:
    """A call with one strip a head has its keys shared among threads; what is left by late shares reaches early ones here."""
    weak = sd.attend(PATTERNS[name].mask, score=score - 7, normaliser="stick_breaking")
    tables = {"chosen": TABLES["chosen"]} if weak.tables else {}
    assert_right(weak, *qkv(queries, 5000), q_offset=5000 - queries, **tables)


def test_logits_of_any_size() -> None:
    """Logits of 10,000 and of -10,000 in turn: a key takes all or nothing, and what is left stays exact."""
    far = stick(earlier, score + 10_000 * ((q_idx + kv_idx) % 3 - 1))
    assert_right(far, *qkv(90, 90))
    q, k, v = qkv(90, 90)
    assert_right(PATTERNS["earlier keys"], 3000 * q, k, v)


def test_many_small_shares_do_not_drown() -> None:
    """Each of 20,000 keys takes 1e-5 of what is left: float32 gives what float64 does, whose errors would add up to more."""
    weak = sd.compile(stick(True, 0 * score - 11.5), backend="cpp")
    q, k, v = (tensor(1, 1, n, 8, seed=n) for n in (1, 20_000, 20_000))
    found, exact = weak(q, k, torch.ones_like(v)), weak(q.double(), k.double(), torch.ones_like(v).double())
    assert 0.1 < float(exact.min()) < 0.3
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_keys_that_nothing_is_left_for_are_not_read() -> None:
    q, k, v = qkv(100, 400)
    attn = sd.compile(stick(earlier, score + 3), backend="cpp")
    wanted = sd.compile(attn.pattern, backend="reference")(q, k, v, q_offset=300)
    k[:, :, :100], v[:, :, :100] = float("nan"), float("nan")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = attn(*leaves, q_offset=300)
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=1e-5)
    assert all(bool(grad[:, :, 100:].isfinite().all()) for grad in torch.autograd.grad(out.sum(), leaves[1:]))


def test_the_same_bits_on_any_number_of_threads() -> None:
    attn, found, before = sd.compile(PATTERNS["earlier keys"], backend="cpp"), [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            leaves = [t.requires_grad_() for t in qkv(300, 300)]
            out = attn(*leaves)
            found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_keys_that_lie_in_another_order() -> None:
    """What decides is the position of a key and not where its row lies."""
    generator = torch.Generator().manual_seed(3)
    order = torch.rand(2, 2, 90, generator=generator).argsort(-1)[..., :70]
    q, k, v = qkv(70, 90, dtype=torch.float64)
    pattern = PATTERNS["earlier keys"]
    call = check_call(pattern, q, k, v, {}, q_offset=0, places=Places(keys=order))
    out, _ = StaticAttention(pattern).attend(call, "cpp", lse=False)
    wanted = sd.compile(pattern, backend="reference")(q, gather_rows(k, order), gather_rows(v, order))
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=1e-10)


@given(case=shapes(max_len=70, head_dims=(8, 24)), pattern=patterns(), data=st.data())
@settings(max_examples=3, deadline=None)
def test_random_patterns(case: AttentionCase, pattern: Any, data: Any) -> None:
    broken = stick(pattern.mask, pattern.score)
    assert_right(broken, *data.draw(inputs(case)), q_offset=case.q_offset, **data.draw(tables_for(broken, case)))
