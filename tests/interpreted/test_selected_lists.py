"""The kernels over picked chunks, interpreted, against attention in float64 that builds every matrix.

A result may be off by twice as much as the plainest implementation in the same precision, plus one rounding of everything that is
added up in it before anything cancels, as in ``sparsedsl/testing/numerics.py``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx, table
from sparsedsl.analysis.domain import Domain
from sparsedsl.backends.triton import selected_passes
from sparsedsl.backends.triton.selected import selected_attention
from sparsedsl.backends.triton.selected_interval import Interval, interval_of
from sparsedsl.backends.triton.selected_lists import by_chunk, unions
from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.selection.selected_blocks import SelectedBlocks
from sparsedsl.selection.selected_call import SelectedCall

INF = float("inf")


@dataclass(frozen=True)
class Case:
    """One call: sizes, kind of attention, and what is random in it. ``list_heads`` and ``weight_heads``: 0 for none."""

    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    list_heads: int = 2
    rows: int = 20
    keys: int = 40
    chunk: int = 16
    slots: int = 2
    head_dim: int = 16
    head_dim_v: int = 16
    weight_heads: int = 0
    softmax1: bool = False
    interval: bool = False
    same_lists: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case; ``weights`` and ``inside`` may be None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    weights: torch.Tensor | None
    selected: SelectedBlocks
    inside: Interval | None
    grad_out: torch.Tensor
    grad_lse: torch.Tensor


def inputs_of(case):
    made = torch.Generator().manual_seed(case.seed)

    def normal(*shape):
        return torch.randn(shape, generator=made).to(case.dtype)

    blocks = -(-case.keys // case.chunk)
    lead = (1 if case.same_lists else case.batch, case.list_heads, case.rows)
    order = torch.rand((*lead, blocks), generator=made).argsort(-1)
    order = torch.nn.functional.pad(order[..., : case.slots], (0, max(0, case.slots - blocks)), value=blocks)
    counts = torch.randint(0, min(case.slots, blocks) + 1, lead, generator=made)
    indices = torch.where(torch.arange(case.slots) < counts[..., None], order, blocks).sort(-1).values
    indices = torch.where(indices == blocks, -1, indices).int()
    inside = None
    if case.interval:
        first = torch.randint(0, case.keys, (case.batch, 1, case.rows), generator=made)
        last = first + torch.randint(-2, case.keys, first.shape, generator=made)
        inside = Interval(first.int(), last.int())
    weights = None
    if case.weight_heads:
        weights = torch.rand((case.batch, case.weight_heads, case.rows, case.slots), generator=made)
    q = normal(case.batch, case.heads, case.rows, case.head_dim)
    k = normal(case.batch, case.kv_heads, case.keys, case.head_dim)
    v = normal(case.batch, case.kv_heads, case.keys, case.head_dim_v)
    grad_out = normal(case.batch, case.heads, case.rows, case.head_dim_v)
    grad_lse = torch.randn((case.batch, case.heads, case.rows), generator=made)
    selected = SelectedBlocks(indices, counts.int(), 1, case.chunk, blocks)
    return Inputs(q, k, v, weights, selected, inside, grad_out, grad_lse)


INTERVAL = ((kv_idx >= table("first")[sd.b, q_idx]) & (kv_idx <= table("last")[sd.b, q_idx])).expr


def attended(q, k, v, selected, *, scale=1.0, inside=None, **words):
    """Attention of the kernels; ``inside``: an interval of keys for each query, ``(B, 1, Sq)`` each end."""
    domain = Domain(*(max(1, size) for size in (q.shape[2], k.shape[2])), 0, max(1, q.shape[0]), q.shape[1])
    if inside is not None:
        tables = {name: end[:, 0] for name, end in zip(("first", "last"), inside, strict=True)}
        words |= {"mask": INTERVAL, "tables": tables}
        domain = dataclasses.replace(domain, tables=tables)
        assert interval_of(INTERVAL, domain, q.device) is not None
    return selected_attention(q, k, v, SelectedCall(selected, scale, domain, **words))


def scale_of(case):
    return case.head_dim**-0.5


@dataclass(frozen=True)
class Dense:
    """Attention with every matrix built: results, the weight of each pair, and of each pair within its softmax."""

    out: torch.Tensor
    lse: torch.Tensor
    pairs: torch.Tensor
    shares: torch.Tensor
    logits: torch.Tensor


def dense(case, x, q, k, v, weights, rounded):
    """Attention in the dtype of q; weights of pairs and out rounded to ``rounded`` if given."""
    key = torch.arange(case.keys)
    chunk_of = key // case.chunk
    batch, heads = case.batch, case.heads
    # chosen[b, h, i, slot, key]: the key is in the chunk at that slot
    chosen = (x.selected.indices[..., None] == chunk_of).expand(batch, -1, -1, -1, -1)
    chosen = chosen.repeat_interleave(heads // case.list_heads, 1)
    if x.inside is not None:
        first, last = (end.expand(batch, heads, case.rows)[..., None, None] for end in x.inside)
        chosen = chosen & (key >= first) & (key <= last)
    k, v = (t.repeat_interleave(heads // case.kv_heads, 1) for t in (k, v))
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale_of(case)
    held = logits[:, :, :, None].masked_fill(~chosen, -INF)
    zero = torch.zeros((*held.shape[:-1], 1), dtype=q.dtype)
    if weights is None:
        held = held.amax(3, keepdim=True)  # no two slots have the same chunk
        zero = zero[:, :, :, :1]
    if case.softmax1:
        held = torch.cat([held, zero], -1)
    empty = (held == -INF).all(-1, keepdim=True)
    lse = torch.logsumexp(held.masked_fill(empty, 0.0), -1, keepdim=True)
    shares = torch.exp(held - lse).masked_fill(empty, 0.0)[..., : case.keys]
    pairs, lse = shares, lse.masked_fill(empty, -INF)[..., 0, 0]
    if weights is not None:
        weights = weights.repeat_interleave(heads // case.weight_heads, 1)
        exists = (x.selected.indices >= 0).repeat_interleave(heads // case.list_heads, 1)
        weights = torch.where(exists, weights, 0.0)
        pairs = shares * weights[..., None]
        total = weights.sum(-1)
        lse = torch.where(total > 0, torch.where(total > 0, total, 1.0).log(), -INF)
    pairs = pairs.sum(3)
    out = pairs @ v if rounded is None else (pairs.to(rounded).to(pairs) @ v).to(rounded)
    return Dense(out, lse, pairs, shares, logits)


def results_of(case, x, dtype, rounded):
    """Results and gradients of :func:`dense` by name, and what :func:`dense` built."""
    leaves = {"q": x.q, "k": x.k, "v": x.v} | ({} if x.weights is None else {"weights": x.weights})
    leaves = {name: t.to(dtype, copy=True).requires_grad_() for name, t in leaves.items()}
    found = dense(case, x, leaves["q"], leaves["k"], leaves["v"], leaves.get("weights"), rounded)
    return {"out": found.out.detach(), "lse": found.lse.detach()} | gradients(found.out, found.lse, leaves, x), found


def gradients(out, lse, leaves, x):
    total = (out * x.grad_out.to(out)).sum() + (torch.where(torch.isfinite(lse), lse, 0.0) * x.grad_lse.to(lse)).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {f"grad_{name}": torch.zeros_like(t) if g is None else g for (name, t), g in zip(leaves.items(), found, strict=True)}


def sizes_of(case, x, exact, built):
    """How much is added up in each result before anything cancels."""
    group = case.heads // case.kv_heads
    q, k, v, grad_out = (t.double() for t in (x.q, x.k, x.v, x.grad_out))
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    pairs, shares, logits = built.pairs.detach().abs(), built.shares.detach(), built.logits.detach()
    slopes = torch.einsum("bhqd,bhkd->bhqk", grad_out, v).abs()
    slopes = torch.maximum(slopes, torch.einsum("bhqd,bhkd->bhqk", grad_out**2, v**2).sqrt())
    mean = (shares * slopes[:, :, :, None]).sum(-1)
    grad_lse = x.grad_lse.double().abs()
    by_logit = pairs * (slopes + mean.amax(3)[..., None] + grad_lse[..., None]) * scale_of(case)
    sizes = {
        "out": (pairs @ v.abs()).amax(), "lse": 1 + logits.abs().amax(), "grad_q": (by_logit @ k.abs()).amax(),
        "grad_k": group * (by_logit.mT @ q.abs()).amax(), "grad_v": group * (pairs.mT @ grad_out.abs()).amax(),
    }  # fmt: skip
    if x.weights is not None:
        least = exact["lse"][torch.isfinite(exact["lse"])].exp()
        sizes["grad_weights"] = case.heads * (mean.amax() + (grad_lse.amax() / least.amin() if least.numel() else 0.0))
    return {name: float(size) for name, size in sizes.items()}


def assert_right(case):
    """All results and gradients of a case."""
    x = inputs_of(case)
    exact, built = results_of(case, x, torch.float64, None)
    plain, _ = results_of(case, x, torch.float32, case.dtype)
    leaves = {"q": x.q, "k": x.k, "v": x.v} | ({} if x.weights is None else {"weights": x.weights})
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    words = {"scale": scale_of(case), "inside": x.inside, "weights": leaves.get("weights"), "softmax1": case.softmax1}
    out, lse = attended(leaves["q"], leaves["k"], leaves["v"], x.selected, **words)
    assert (out.dtype, lse.dtype) == (case.dtype, torch.float32)
    got = {"out": out.detach(), "lse": lse.detach()} | gradients(out, lse, leaves, x)
    largest = float(built.logits.detach().abs().max())
    for name, size in sizes_of(case, x, exact, built).items():
        kinds = [torch.finfo(torch.float32 if name in ("lse", "grad_weights") else case.dtype), torch.finfo(torch.float32)]
        finite = torch.isfinite(exact[name])
        assert torch.equal(torch.isfinite(got[name]), finite), f"{name}: {got[name]} for {exact[name]}"
        rounding = max(kind.eps for kind in kinds) + kinds[1].eps * (1 + largest)
        if name == "grad_weights":  # from products of rounded weights, as those of out
            rounding = max(rounding, torch.finfo(case.dtype).eps)
        error = (plain[name].double() - exact[name])[finite].abs()
        step = kinds[0].smallest_normal * kinds[0].eps  # of numbers so small that their digits run out
        allowed = 2 * ((float(error.max()) if error.numel() else 0.0) + rounding * size) + step
        off = torch.where(finite, (got[name].double() - exact[name]).abs(), 0.0)
        assert float(off.max()) <= allowed, f"{name} is off by {float(off.max()):.3g}, allowed {allowed:.3g}"


KINDS = {
    "joint": {},
    "weighted": {"weight_heads": 2},
    "weighted_one": {"weight_heads": 4, "softmax1": True},
    "joint_one": {"softmax1": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_T12_merged_tiles_and_their_gradients(kind, dtype):
    assert_right(Case(dtype=dtype, **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_few_queries_share_slots_among_programs(kind, monkeypatch):
    splits = []
    count = selected_passes.split_count
    monkeypatch.setattr(selected_passes, "split_count", lambda *a: splits.append(count(*a)) or splits[-1])
    assert_right(Case(rows=3, keys=200, slots=9, **KINDS[kind]))
    assert splits == [4]


# query heads, key heads, heads of lists: many heads in a tile, one, three; lists shared by key heads, or several for one key head
HEADS = [(1, 1, 1), (2, 2, 1), (4, 1, 4), (6, 2, 3), (3, 1, 1), (6, 3, 1), (16, 1, 1), (80, 1, 1)]


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "x".join(map(str, heads)))
@pytest.mark.parametrize("weighted", [False, True], ids=["joint", "weighted"])
def test_any_ratio_of_heads(heads, weighted):
    rows = {80: 2, 3: 40}.get(
        heads[0], 19
    )  # three heads side by side leave two of 32 rows over, which must not take the next query's
    assert_right(Case(1, *heads, rows=rows, weight_heads=heads[1] if weighted else 0))


@pytest.mark.parametrize(("chunk", "keys"), [(8, 37), (24, 50), (48, 97), (80, 130), (128, 140)])
def test_any_chunk_and_a_ragged_last_one(chunk, keys):
    assert_right(Case(chunk=chunk, keys=keys, rows=17, weight_heads=2))
    assert_right(Case(chunk=chunk, keys=keys, rows=17, heads=2, softmax1=True))


@pytest.mark.parametrize("widths", [(16, 32), (24, 8), (5, 3), (64, 16)], ids=lambda widths: "x".join(map(str, widths)))
def test_any_width_of_heads(widths):
    assert_right(Case(head_dim=widths[0], head_dim_v=widths[1], weight_heads=4))


@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_an_interval_only(kind):
    assert_right(Case(interval=True, batch=2, same_lists=True, slots=3, **KINDS[kind]))


@st.composite
def cases(draw):
    group, kv_heads = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.sampled_from([1, 2]))
    heads = group * kv_heads
    return Case(
        batch=draw(st.sampled_from([1, 2])), heads=heads, kv_heads=kv_heads,
        list_heads=draw(st.sampled_from([1, kv_heads, heads])), rows=draw(st.integers(1, 36)), keys=draw(st.integers(1, 70)),
        chunk=draw(st.sampled_from([16, 16, 16, 9, 20])),
        slots=draw(st.integers(1, 5)), head_dim=draw(st.sampled_from([8, 16])), head_dim_v=draw(st.sampled_from([16, 4])),
        weight_heads=draw(st.sampled_from([0, 1, kv_heads, heads])), softmax1=draw(st.booleans()), interval=draw(st.booleans()),
        same_lists=draw(st.booleans()), dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.float16])),
        seed=draw(st.integers(0, 1000)),
    )  # fmt: skip


@settings(max_examples=10)
@given(cases())
def test_random_calls(case):
    assert_right(case)


# ---- what must be exactly so ------------------------------------------------------------------------------------


def called(case, x, names=("q", "k", "v", "weights"), **words):
    """Results of a case, and the leaves that ask for gradients."""
    tensors = {"q": x.q, "k": x.k, "v": x.v, "weights": x.weights}
    leaves = {name: t.clone().requires_grad_(name in names) for name, t in tensors.items() if t is not None}
    words = {"scale": scale_of(case), "inside": x.inside, "weights": leaves.get("weights"), "softmax1": case.softmax1} | words
    out, lse = attended(leaves["q"], leaves["k"], leaves["v"], x.selected, **words)
    return out, lse, leaves


@pytest.mark.parametrize("kind", KINDS)
def test_T01_rows_without_chunks_and_chunks_without_rows_are_exactly_zero(kind):
    case = Case(keys=60, slots=2, **KINDS[kind])
    x = inputs_of(case)
    x.selected.indices[..., 5:12, :], x.selected.counts[..., 5:12] = -1, 0
    x.selected.indices[x.selected.indices == 3] = -1
    x = dataclasses.replace(x, selected=dataclasses.replace(x.selected, counts=(x.selected.indices >= 0).sum(-1).int()))
    out, lse, leaves = called(case, x)
    found = gradients(out, lse, leaves, x)
    assert not out[:, :, 5:12].any()
    assert (lse[:, :, 5:12] == (0.0 if kind == "joint_one" else -INF)).all()
    assert not found["grad_q"][:, :, 5:12].any()
    assert not found["grad_k"][:, :, 48:].any()
    assert not found["grad_v"][:, :, 48:].any()
    assert found["grad_k"][:, :, :48].any()
    assert found["grad_v"][:, :, :48].any()
    for grad in found.values():
        assert torch.isfinite(grad).all()


def test_T06_one_chunk_is_plain_attention_and_its_weight_has_the_gradient_of_a_factor():
    case = Case(slots=1, keys=16, weight_heads=4)
    x = inputs_of(case)
    x = dataclasses.replace(x, weights=torch.ones_like(x.weights))
    out, lse, leaves = called(case, x)
    chosen = (x.selected.counts > 0).repeat_interleave(2, 1)[..., None]
    k, v = (t.repeat_interleave(2, 1) for t in (x.k, x.v))
    wanted = torch.nn.functional.scaled_dot_product_attention(x.q, k, v) * chosen
    torch.testing.assert_close(out, wanted)
    (found,) = torch.autograd.grad((out * x.grad_out).sum(), leaves["weights"])
    torch.testing.assert_close(found[..., 0], (wanted * x.grad_out).sum(-1))
    assert torch.equal(lse, torch.where(chosen[..., 0], 0.0, -INF))


@pytest.mark.parametrize("names", [("q",), ("k",), ("v",), ("weights",)], ids=lambda names: names[0])
@pytest.mark.parametrize("loss", ["out", "lse"])
def test_gradients_of_one_tensor_from_one_result(names, loss):
    case = Case(weight_heads=2)
    x = inputs_of(case)
    grads = {}
    for asked in (names, ("q", "k", "v", "weights")):
        out, lse, leaves = called(case, x, asked)
        total = (out * x.grad_out).sum() if loss == "out" else torch.where(torch.isfinite(lse), lse * x.grad_lse, 0.0).sum()
        grads[asked] = torch.autograd.grad(total, leaves[names[0]])[0]
    assert torch.equal(*grads.values())
    assert bool(grads[names].any()) == (loss == "out" or names == ("weights",))


def test_layouts_of_tensors_do_not_matter_and_are_kept():
    case = Case(batch=2, rows=18, weight_heads=2)
    x = inputs_of(case)
    out, lse, leaves = called(case, x)
    wanted = gradients(out, lse, leaves, x)
    by_token = dataclasses.replace(x, q=x.q.transpose(1, 2).contiguous().transpose(1, 2), k=x.k.mT.contiguous().mT)
    other, other_lse, leaves = called(case, by_token)
    assert torch.equal(out, other)
    assert torch.equal(lse, other_lse)
    assert other.stride() == by_token.q.stride()
    for name, grad in gradients(other, other_lse, leaves, x).items():
        assert torch.equal(grad, wanted[name]), name


def test_heads_whose_offsets_take_64_bits(sparse):
    case = Case(heads=2, kv_heads=2, batch=1, keys=20, rows=2, slots=2, dtype=torch.float16)
    x = inputs_of(case)
    wanted, *_ = called(case, x)
    far = []
    for t in (x.q, x.k, x.v):
        room = sparse(2**31 + t.numel(), t.dtype)
        far.append(room.as_strided(t.shape, (0, 2**31, t.shape[3], 1)).copy_(t))
    out, _ = attended(*far, x.selected, scale=scale_of(case))
    assert torch.equal(out, wanted)


# As far apart as rows of a tile may lie, and further: those are copied.
@pytest.mark.parametrize(("distance", "length"), [((1 << 23) - 8, 340), (1 << 26, 36)], ids=["far", "further"])
def test_rows_whose_offsets_take_64_bits(apart, distance, length):
    x = inputs_of(Case(heads=2, kv_heads=1, list_heads=1, keys=length, rows=length, chunk=64, slots=2, dtype=torch.float16))

    def run(x):
        given = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
        out, lse = attended(*given, x.selected, scale=0.25)
        return out, lse, *torch.autograd.grad(out, given, x.grad_out)

    far = {name: apart(getattr(x, name), distance) for name in ("q", "k", "v", "grad_out")}
    near, far = run(x), run(dataclasses.replace(x, **far))
    for one, other in zip(near, far, strict=True):
        assert torch.equal(one, other)


def test_lists_whose_entries_take_64_bits(sparse):
    """So long that ``query * width`` does; nobody looks at what lies after the end of a list, nor at the bits of who chose it."""
    case = Case(heads=2, kv_heads=1, list_heads=1, rows=3, slots=2)
    x = inputs_of(case)
    chosen = x.selected.indices
    bits = torch.tensor([[1, 2], [2, 3], [3, 1]], dtype=torch.int32).view(1, 1, 3, 2)
    mask = sympy.Symbol("one") & (kv_idx <= q_idx + 37).expr | sympy.Symbol("two") & (kv_idx % 3 != 0).expr
    words = {"mask": mask, "choices": ("one", "two"), "scale": scale_of(case)}
    wanted, _ = attended(x.q, x.k, x.v, x.selected, members=bits, **words)
    long = [sparse(3 << 30, torch.int32).view(1, 1, 3, 1 << 30) for _ in range(2)]
    for room, t in zip(long, (chosen, bits), strict=True):
        room[..., :2] = t
    selected = dataclasses.replace(x.selected, indices=long[0])
    out, _ = attended(x.q, x.k, x.v, selected, members=long[1], **words)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"rows": 0}, {"keys": 0}, {"slots": 0}], ids=lambda sizes: next(iter(sizes)))
def test_calls_of_size_zero_have_results_and_gradients(sizes):
    case = Case(**sizes, weight_heads=2)
    blocks = -(-case.keys // case.chunk)
    dims = {"q": (4, case.rows, 16), "k": (2, case.keys, 16), "v": (2, case.keys, 16), "weights": (2, case.rows, case.slots)}
    leaves = {name: torch.ones(case.batch, *size, requires_grad=True) for name, size in dims.items()}
    lists = torch.full((case.batch, 2, case.rows, case.slots), -1, dtype=torch.int32)
    selected = SelectedBlocks(lists, torch.zeros(lists.shape[:3], dtype=torch.int32), 1, case.chunk, blocks)
    out, lse = attended(leaves["q"], leaves["k"], leaves["v"], selected, scale=1.0, weights=leaves["weights"])
    assert out.shape == (case.batch, 4, case.rows, 16)
    assert not out.any()
    assert (lse == -INF).all()
    for grad in torch.autograd.grad(out.sum(), list(leaves.values())):
        assert not grad.any()


# ---- lists --------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(cases(), st.integers(1, 32))
def test_unions_hold_each_chunk_once_and_who_picked_it(case, queries):
    selected = inputs_of(case).selected
    found = unions(selected.indices, queries, selected.blocks)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in found.counts.shape)).tolist():
        b, h, tile = place
        lists = selected.indices[b, h, tile * queries : (tile + 1) * queries].tolist()
        wanted = sorted({chunk for row in lists for chunk in row if chunk >= 0})
        count = int(found.counts[b, h, tile])
        assert found.chunks[b, h, tile].tolist() == wanted + [-1] * (found.chunks.shape[3] - count)
        owners = [sum(1 << m for m, row in enumerate(lists) if chunk in row) for chunk in wanted]
        assert [owner % 2**32 for owner in found.owners[b, h, tile, :count].tolist()] == owners


@settings(max_examples=40)
@given(cases())
def test_queries_by_chunk(case):
    selected = inputs_of(case).selected
    found = by_chunk(selected.indices, selected.blocks)
    for b in range(selected.indices.shape[0]):
        for h in range(case.list_heads):
            flat = selected.indices[b, h].flatten().tolist()
            for chunk in range(selected.blocks):
                start, end = found.starts[b, h, chunk : chunk + 2].tolist()
                assert found.places[b, h, start:end].tolist() == [at for at, one in enumerate(flat) if one == chunk]


def test_lists_are_made_without_a_look_at_their_contents():
    lists = torch.zeros((1, 2, 50, 4), dtype=torch.int32, device="meta")
    assert unions(lists, 16, 1000).chunks.shape == (1, 2, 4, 64)
    assert by_chunk(lists, 1000).starts.shape == (1, 2, 1001)


# ---- refusals -----------------------------------------------------------------------------------------------------


def small(dtype=torch.float32, width=16, chunk=16, q_block=1):
    q, k = torch.ones(1, 2, 3, width, dtype=dtype), torch.ones(1, 1, 20, width, dtype=dtype)
    lists = torch.zeros(1, 1, 3, 1, dtype=torch.int32)
    return q, k, k, SelectedBlocks(lists, torch.ones(1, 1, 3, dtype=torch.int32), q_block, chunk, -(-20 // chunk))


WEIGHTS = {"weights": torch.ones(1, 1, 3, 1)}


@pytest.mark.parametrize(
    ("made", "words", "message"),
    [
        ({"dtype": torch.float64}, {}, "q is float64"),
        ({"width": 272}, {}, "heads may be 256 wide"),
        ({"chunk": 131}, {}, "read in equal tiles of 16 to 128, and 131 has no such divisor"),
        ({"chunk": 129}, WEIGHTS, "a block may have 128 tokens, as its softmax is taken in one tile"),
        ({"chunk": 128, "width": 256}, WEIGHTS, "128 keys of 256 numbers in float32 take 131,072 bytes"),
        ({"q_block": 64}, {}, "got q_block 64"),
    ],
    ids=["float64", "width", "chunk", "weighed chunk", "tile", "q_block"],
)
def test_what_the_kernels_cannot_do_names_the_way_out(made, words, message):
    with pytest.raises(UnsupportedError, match=message) as raised:
        attended(*small(**made), scale=1.0, **words)
    assert "backend='tiled'" in str(raised.value)


def test_weights_and_lists_of_another_shape_are_refused():
    q, k, v, selected = small()
    with pytest.raises(ShapeError, match=r"weights must be \(B, Hw, Sq, W\) = \(1, Hw, 3, 1\)"):
        attended(q, k, v, selected, scale=1.0, weights=torch.ones(1, 2, 3, 2))
    with pytest.raises(ShapeError, match=r"selected.indices must be \(B or 1, Hs, Sq, W\)"):
        attended(q[:, :, :2], k, v, selected, scale=1.0)
    with pytest.raises(ShapeError, match="got selected blocks of 2 chunks"):
        attended(q, k[:, :, :8], v[:, :, :8], selected, scale=1.0)


def test_no_second_derivatives():
    q, k, v, selected = small()
    q.requires_grad_()
    out, _ = attended(q, k, v, selected, scale=1.0)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="no second derivatives"):
        grad.sum().backward()
