"""The kernels along lists under any mask and any score, interpreted, against attention in float64 that builds every matrix.

The oracle reads lists, bits and expressions of its own, written in torch beside the expressions of the language. A result may be off by
four times as much as the same oracle in float32, plus eight roundings of what is added up in it before anything cancels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import b, h, kv_idx, kv_len, q_idx, q_len, score, table
from sparsedsl.analysis.domain import Domain
from sparsedsl.backends.triton.limits import LIMITS
from sparsedsl.backends.triton.selected import selected_attention
from sparsedsl.selection.selected_blocks import SelectedBlocks
from sparsedsl.selection.selected_call import SelectedCall

INF = float("inf")
ONE, TWO = sympy.Symbol("one"), sympy.Symbol("two")
doc, gate = table("doc"), table("gate", dtype=float, learned=True)
bias, far = table("bias", dtype=float, learned=True), table("far", dtype=float, learned=True)
slope = table("slope", dtype=float, learned=True)


@dataclass(frozen=True)
class Words:
    """An expression of the language, and what it means in torch: a function of indices, tables and, of a score, the logit."""

    expr: Any
    meaning: Callable[..., torch.Tensor]
    tables: tuple[str, ...] = ()


def at(table: torch.Tensor, *indices: torch.Tensor) -> torch.Tensor:
    """Entries, indices clamped into the table."""
    return table[tuple(index.clamp(0, size - 1) for index, size in zip(indices, table.shape, strict=True))]


MASKS = {
    "all": Words(sympy.true, lambda i: i.key >= 0),
    "causal": Words((kv_idx <= q_idx).expr, lambda i: i.key <= i.query),
    "every third": Words((kv_idx % 3 != 0).expr, lambda i: i.key % 3 != 0),
    "documents": Words((doc[q_idx] == doc[kv_idx]).expr, lambda i: at(i.doc, i.query) == at(i.doc, i.key), ("doc",)),
    "by head": Words(((kv_idx + h + b) % 2 == 0).expr, lambda i: (i.key + i.head + i.batch) % 2 == 0),
    "from the end": Words((kv_len - kv_idx > q_len - q_idx - 4).expr, lambda i: i.keys - i.key > i.end - i.query - 4),
    "buckets": Words(
        ((kv_idx <= q_idx) & sd.parse("f32_to_int64(f32_mul(f32_log(q_idx - kv_idx + 1), 3.5)) < 7")).expr,
        lambda i: (i.key <= i.query) & ((torch.log((i.query - i.key + 1).clamp(min=1).float()) * 3.5).long() < 7),
    ),
    "both": Words(sympy.And(ONE, TWO), lambda i: i.one & i.two),
    "not the second": Words(sympy.And(ONE, sympy.Not(TWO)), lambda i: i.one & ~i.two),
    "second if causal": Words(
        sympy.Or(ONE, sympy.And(TWO, (kv_idx <= q_idx).expr)), lambda i: i.one | (i.two & (i.key <= i.query))
    ),
}
SCORES = {
    "plain": Words(score, lambda s, i: s),
    "cap": Words(sd.tanh(score / 2) * 2, lambda s, i: torch.tanh(s / 2) * 2),
    "alibi": Words(score - 0.25 * (h + 1) * (q_idx - kv_idx), lambda s, i: s - 0.25 * (i.head + 1) * (i.query - i.key)),
    "bias": Words(
        score + bias[h, q_idx - kv_idx + 9], lambda s, i: s + at(i.bias, i.head, i.query - i.key + 9), ("bias",)
    ),
    "gates": Words(
        score + gate[b, h, q_idx] - gate[b, h, kv_idx],
        lambda s, i: s + at(i.gate, i.batch, i.head, i.query) - at(i.gate, i.batch, i.head, i.key),
        ("gate",),
    ),
    "learned slope": Words(
        score * slope[h] + slope[0] * kv_idx / 16, lambda s, i: s * at(i.slope, i.head) + i.slope[0] * i.key / 16, ("slope",)
    ),
    "a table of products": Words(
        sd.tanh(score + far[q_idx * kv_idx % 7]) * far[q_idx],
        lambda s, i: torch.tanh(s + at(i.far, i.query * i.key % 7)) * at(i.far, i.query),
        ("far",),
    ),
    "drops": Words(
        sd.where(score > 0, score, float("-inf")), lambda s, i: torch.where(s > 0, s, torch.full_like(s, -INF))
    ),
    "no products": Words(bias[h, kv_idx] * 2, lambda s, i: at(i.bias, i.head, i.key) * 2 + 0 * s, ("bias",)),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call. ``weight_heads``: 0 for one softmax over all."""

    mask: str = "all"
    score: str = "plain"
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    list_heads: int = 2
    rows: int = 20
    keys: int = 50
    offset: int = 7
    block: int = 16
    slots: int = 3
    head_dim: int = 16
    head_dim_v: int = 8
    weight_heads: int = 0
    softmax1: bool = False
    same_lists: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Indices:
    """What expressions mean: positions and tables that broadcast to ``(B, H, Sq, Skv)``."""

    batch: torch.Tensor
    head: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    keys: int
    end: int
    one: torch.Tensor
    two: torch.Tensor
    doc: torch.Tensor
    gate: torch.Tensor
    bias: torch.Tensor
    far: torch.Tensor
    slope: torch.Tensor


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case by name; those of ``leaves`` ask for gradients."""

    leaves: dict[str, torch.Tensor]
    doc: torch.Tensor
    blocks: SelectedBlocks
    members: torch.Tensor
    grad_out: torch.Tensor
    grad_lse: torch.Tensor


def inputs_of(case: Case) -> Inputs:
    made = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=made)

    blocks = -(-case.keys // case.block)
    lead = (1 if case.same_lists else case.batch, case.list_heads, case.rows)
    order = torch.rand((*lead, blocks), generator=made).argsort(-1)
    order = torch.nn.functional.pad(order[..., : case.slots], (0, max(0, case.slots - blocks)), value=blocks)
    counts = torch.randint(0, min(case.slots, blocks) + 1, lead, generator=made)
    lists = torch.where(torch.arange(case.slots) < counts[..., None], order, blocks).sort(-1).values
    lists = torch.where(lists == blocks, -1, lists).int()
    bits = torch.randint(1, 4, lists.shape, generator=made, dtype=torch.int32)
    leaves = {
        "q": normal(case.batch, case.heads, case.rows, case.head_dim), "k": normal(case.batch, case.kv_heads, case.keys, case.head_dim),
        "v": normal(case.batch, case.kv_heads, case.keys, case.head_dim_v),
        "gate": normal(case.batch, case.heads, case.keys + 3), "bias": normal(case.heads, 31), "far": normal(9),
        "slope": normal(case.heads),
    }  # fmt: skip
    if case.weight_heads:
        leaves["weights"] = torch.rand((case.batch, case.weight_heads, case.rows, case.slots), generator=made)
    names = {"q", "k", "v", "weights", *SCORES[case.score].tables}
    return Inputs(
        {name: t for name, t in leaves.items() if name in names},
        torch.randint(0, 3, (case.keys + case.rows,), generator=made),
        SelectedBlocks(lists, (lists >= 0).sum(-1, dtype=torch.int32), 1, case.block, blocks),
        bits,
        normal(case.batch, case.heads, case.rows, case.head_dim_v),
        normal(case.batch, case.heads, case.rows),
    )


def oracle(case: Case, x: Inputs, leaves: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """out and LSE in the dtype of the leaves."""
    by_head = case.heads // case.list_heads
    repeat_kv = [t.expand(case.batch, -1, -1, -1).repeat_interleave(by_head, 1) for t in (x.blocks.indices, x.members)]
    slots = repeat_kv[0][..., None] == torch.arange(case.keys) // case.block  # (B, H, Sq, W, Skv)
    bits = (slots * repeat_kv[1][..., None]).sum(3)
    none = torch.zeros(1)
    indices = Indices(
        torch.arange(case.batch).view(-1, 1, 1, 1), torch.arange(case.heads).view(-1, 1, 1),
        (torch.arange(case.rows) + case.offset)[:, None], torch.arange(case.keys), case.keys, case.offset + case.rows,
        bits & 1 != 0, bits & 2 != 0, x.doc, *(leaves.get(name, none) for name in ("gate", "bias", "far", "slope")),
    )  # fmt: skip
    group = case.heads // case.kv_heads
    k, v = (leaves[name].repeat_interleave(group, 1) for name in "kv")
    logits = leaves["q"] @ k.mT * case.head_dim**-0.5
    logits = SCORES[case.score].meaning(logits, indices)
    allowed = MASKS[case.mask].meaning(indices).expand(logits.shape)
    held = logits[..., None, :].masked_fill(~(slots & allowed[..., None, :]), -INF)  # (B, H, Sq, W, Skv)
    if not case.weight_heads:
        held = held.amax(3, keepdim=True)
    zero = torch.zeros((*held.shape[:-1], 1), dtype=held.dtype)
    empty = (held == -INF).all(-1, keepdim=True)
    filled = held.masked_fill(empty, 0.0)
    top = torch.logsumexp(torch.cat([filled, zero], -1) if case.softmax1 else filled, -1, keepdim=True)
    shares = torch.exp(filled - top).masked_fill(empty, 0.0)
    if not case.weight_heads:
        lse = torch.where(empty, 0.0 if case.softmax1 else -INF, top)[..., 0, 0]
        return shares[:, :, :, 0] @ v, lse
    weights = leaves["weights"].repeat_interleave(case.heads // case.weight_heads, 1)
    weights = torch.where(repeat_kv[0] >= 0, weights, 0.0)
    total = weights.sum(-1)
    lse = torch.where(total > 0, torch.where(total > 0, total, 1.0).log(), -INF)
    return (shares * weights[..., None]).sum(3) @ v, lse


def results_of(x: Inputs, out: torch.Tensor, lse: torch.Tensor, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """out, LSE and the gradients of all leaves."""
    loss = (out * x.grad_out.to(out)).sum() + (torch.where(torch.isfinite(lse), lse, 0.0) * x.grad_lse.to(lse)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    grads = {f"d{name}": torch.zeros_like(t) if g is None else g for (name, t), g in zip(leaves.items(), found, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **grads}


def wanted_of(case: Case, x: Inputs, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    leaves = {name: t.to(dtype).clone().requires_grad_() for name, t in x.leaves.items()}
    return results_of(x, *oracle(case, x, leaves), leaves)


def got_of(case: Case, x: Inputs, **words: Any) -> dict[str, torch.Tensor]:
    leaves = {name: t.clone().requires_grad_() for name, t in x.leaves.items()}
    mask, scored = MASKS[case.mask], SCORES[case.score]
    tables = {name: leaves[name] for name in scored.tables} | ({"doc": x.doc} if "doc" in mask.tables else {})
    joined = {ONE, TWO} & mask.expr.free_symbols
    call = SelectedCall(
        x.blocks, case.head_dim**-0.5, Domain(case.rows, case.keys, case.offset, case.batch, case.heads, tables), mask.expr,
        scored.expr.expr, tables, ("one", "two") if joined else (), x.members if joined else None, leaves.get("weights"), case.softmax1,
    )  # fmt: skip
    out, lse = selected_attention(leaves["q"], leaves["k"], leaves["v"], dataclasses.replace(call, **words))
    return results_of(x, out, lse, leaves)


def assert_right(case: Case, **words: Any) -> None:
    """Results and gradients of a case."""
    x = inputs_of(case)
    exact, plain, got = wanted_of(case, x, torch.float64), wanted_of(case, x, torch.float32), got_of(case, x, **words)
    eps = torch.finfo(torch.float32).eps
    # Sums over so many pairs at most, of numbers of about 1.
    pairs = {"lse": 4, "dslope": case.batch * case.rows * case.slots * case.block * 4}
    for name, wanted in exact.items():
        finite = torch.isfinite(wanted)
        assert torch.equal(torch.isfinite(got[name]), finite), f"{name}: {got[name]} for {wanted}"
        size = pairs.get(name, case.heads * case.slots * case.block) * 8 * eps
        error = (plain[name].double() - wanted)[finite].abs().amax() if finite.any() else 0.0
        off = float(torch.where(finite, got[name].double() - wanted, 0.0).abs().amax())
        assert off <= 4 * float(error) + size, f"{name} is off by {off:.3g}, allowed {4 * float(error) + size:.3g}: {case}"


@pytest.mark.parametrize("scored", SCORES)
def test_any_score(scored):
    assert_right(Case(score=scored))
    assert_right(Case(score=scored, mask="every third", weight_heads=2, softmax1=True))


@pytest.mark.parametrize("mask", MASKS)
def test_any_mask(mask):
    assert_right(Case(mask=mask, batch=2))
    assert_right(Case(mask=mask, score="cap", weight_heads=4, same_lists=True))


@pytest.mark.parametrize("mask", ["not the second", "documents"])
def test_few_queries_share_slots_among_programs(mask):
    assert_right(Case(mask=mask, score="alibi", rows=3, keys=200, slots=9, softmax1=True))


def test_long_blocks_are_so_many_short_ones_with_the_same_bits():
    assert_right(Case(mask="second if causal", score="bias", block=160, keys=400, rows=18))


def test_gradients_pair_by_pair_in_pieces_are_those_in_one(options):
    case = Case(score="bias", rows=40, batch=2)
    x = inputs_of(case)
    whole = got_of(case, x)
    options(LIMITS, listed_pair_bytes=1 << 16)
    for name, found in got_of(case, x).items():
        assert torch.equal(found, whole[name]), name


@st.composite
def cases(draw):
    group, kv_heads = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.sampled_from([1, 2]))
    heads = group * kv_heads
    return Case(
        draw(st.sampled_from(sorted(MASKS))), draw(st.sampled_from(sorted(SCORES))), draw(st.sampled_from([1, 2])), heads, kv_heads,
        draw(st.sampled_from([1, kv_heads, heads])), draw(st.integers(1, 36)), draw(st.integers(1, 70)), draw(st.integers(0, 20)),
        draw(st.sampled_from([16, 16, 9, 20])), draw(st.integers(1, 5)), draw(st.sampled_from([8, 16])),
        draw(st.sampled_from([16, 4])), draw(st.sampled_from([0, 0, 1, kv_heads, heads])), draw(st.booleans()), draw(st.booleans()),
        draw(st.integers(0, 1000)),
    )  # fmt: skip


@settings(max_examples=8)
@given(cases())
def test_random_calls(case):
    assert_right(case)
