"""The lightning indexer of DSA, blocks within blocks (HISA), and compressed entries (CSA, HCA), beside golden values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from sparsedsl import testing as kit
from sparsedsl.program.program_text import read_program
from tests.programs.choices_recipe import chosen, dig, numbers, scores_of

Tensor = torch.Tensor
CAUSAL = kv_idx <= q_idx
IQ, IK = sd.input("iq", "batch index_heads queries index_dim"), sd.input("ik", "batch one keys index_dim")
W = sd.input("w", "batch index_heads queries")


def index(scores: Any) -> Any:
    """Of the heads of an indexer one score."""
    return (W * scores.relu()).over_heads("sum") / 4**0.5


@pytest.fixture(scope="module")
def tokens() -> dict[str, Tensor]:
    sizes = {
        "iq": (1, 4, 24, 8),
        "ik": (2, 1, 24, 8),
        "w": (3, 4, 24),
        "q": (4, 2, 24, 8),
        "k": (5, 1, 24, 8),
        "v": (6, 1, 24, 8),
    }
    return {name: numbers(*size)[None] * (2 if name == "q" else 1) for name, size in sizes.items()}


def test_T01_scores_of_the_indexer(backend: str, tokens: Any) -> None:
    found = {}
    for name, node in {"relu": index(sd.dot(IQ, IK)), "plain": (W * sd.dot(IQ, IK)).over_heads("sum") * 4**-0.5}.items():
        attn = sd.compile(sd.attend(CAUSAL & sd.top_k(node, 5)), backend=backend)
        found[name] = scores_of(attn, node, **tokens)[0, 0]
    wanted = torch.tensor([0.1262863511, 0.3456717894, -0.1863081261], dtype=torch.float64)
    assert torch.allclose(found["relu"][23, :3], wanted, atol=1e-9)
    assert abs(dig(found["relu"]) + 2.333410886) < 1e-8 and abs(dig(found["plain"]) + 1.086229579) < 1e-8
    seen = found["relu"][torch.ones(24, 24).tril().bool()]
    assert round(float((seen < 0).double().mean()), 2) == 0.54 and int((seen == 0).sum()) == 12
    rotated = tokens | {name: tokens[name] @ hadamard() for name in ("iq", "ik")}
    node = index(sd.dot(IQ, IK))
    turned = scores_of(sd.compile(sd.attend(CAUSAL & sd.top_k(node, 5)), backend=backend), node, **rotated)
    assert torch.allclose(turned[0, 0], found["relu"], atol=1e-12)


def hadamard() -> Tensor:
    """Signs of a rotation of eight dimensions."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return torch.kron(torch.kron(two, two), two) * 8**-0.5


def test_T02_dsa(backend: str, tokens: Any) -> None:
    attn = sd.compile(sd.attend(CAUSAL & sd.top_k(index(sd.dot(IQ, IK)), 5, name="picks")), backend=backend)
    lists = chosen(attn, "picks", **tokens)[0]
    assert (lists[0], lists[3]) == ([0], [0, 1, 2, 3])
    assert (lists[10], lists[23]) == ([0, 1, 3, 6, 10], [1, 5, 6, 15, 19])
    out = attn(**tokens)
    assert abs(float(out[0, 1, 23, 0]) + 0.1597145633) < 1e-9 and abs(dig(out) - 5.770875710) < 1e-8
    assert sd.analyse(attn.program, 24).causal == sd.PROVED


def test_equal_scores_of_the_indexer_take_the_earlier_key(backend: str, tokens: Any) -> None:
    """A relu's zeros tie, and beat what is below 0."""
    found = chosen(
        sd.compile(sd.attend(CAUSAL & sd.top_k(index(sd.dot(IQ, IK)), 5, name="picks")), backend=backend), "picks",
        **(tokens | {"iq": -tokens["ik"].abs().expand(1, 4, 24, 8), "ik": tokens["ik"].abs()}),
    )[0]  # fmt: skip
    assert all(row == list(range(min(5, t + 1))) for t, row in enumerate(found))


FIRST, OWN, ENDED = kv_idx < 4, q_idx // 4 == kv_idx // 4, (kv_idx // 4 + 1) * 4 <= q_idx


def hisa(blocks: int) -> Any:
    """The best of blocks by their mean index key, and the best keys in these."""
    coarse = sd.top_k(index(sd.dot(IQ, sd.summary(IK, 4))), blocks, among=ENDED | OWN, forced=FIRST | OWN)
    return sd.attend(CAUSAL & sd.top_k(index(sd.dot(IQ, IK)), 5, among=CAUSAL & coarse, name="picks"))


def test_T04_blocks_within_blocks(backend: str, tokens: Any) -> None:
    found = chosen(sd.compile(hisa(3), backend=backend), "picks", **tokens)[0]
    assert (found[10], found[23]) == ([0, 1, 3, 6, 10], [0, 1, 4, 5, 6])
    whole = chosen(sd.compile(hisa(6), backend=backend), "picks", **tokens)[0]
    both = sum(len(set(a) & set(b)) for a, b in zip(found, whole, strict=True))
    assert abs(both / sum(map(len, whole)) - 0.8363636364) < 1e-9
    dsa = sd.compile(sd.attend(CAUSAL & sd.top_k(index(sd.dot(IQ, IK)), 5)), backend=backend)
    assert torch.equal(sd.compile(hisa(6), backend=backend)(**tokens), dsa(**tokens))


def test_T04_the_own_block_is_compared_by_a_mean_that_reads_ahead(tokens: Any) -> None:
    verdict = sd.analyse(sd.Program(hisa(3)), 24).causal
    assert verdict.status == "REFUTED" and "block of 4 keys may end after the query" in verdict.reason
    ended = sd.top_k(index(sd.dot(IQ, sd.summary(IK, 4))), 3, among=ENDED)
    within = sd.attend(ENDED & sd.top_k(index(sd.dot(IQ, IK)), 5, among=ENDED & ended))
    assert sd.analyse(sd.Program(within), 24).causal == sd.PROVED
    kit.assert_causal(sd.compile(within, backend="tiled"), kit.AttentionCase(heads=2, kv_heads=2, q_len=24, kv_len=24))


INNER = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4)).over_group("max"), 2, among=(kv_idx // 4 + 1) * 4 <= q_idx)
# Masks of candidates that read a choice, and the same as a function of the blocks chosen; the first two are followed along lists.
WITHIN: dict[str, tuple[Any, Any]] = {
    "in its blocks": (CAUSAL & INNER, lambda chosen, t, j: j <= t and j // 4 in chosen),
    "in its blocks alone": (INNER.as_expression(), lambda chosen, t, j: j // 4 in chosen),
    "or near": (INNER | (abs(q_idx - kv_idx) < 3), lambda chosen, t, j: j // 4 in chosen or abs(t - j) < 3),
    "elsewhere": (CAUSAL & ~INNER, lambda chosen, t, j: j <= t and j // 4 not in chosen),
}


@pytest.mark.parametrize("name", WITHIN)
@given(st.data())
@settings(max_examples=6)
def test_choices_within_choices_beside_loops(name: str, data: st.DataObject) -> None:
    case = data.draw(kit.shapes(max_len=22, max_heads=4).filter(lambda c: c.q_offset + c.q_len <= c.kv_len))
    block, heads = data.draw(st.sampled_from((1, 2))), data.draw(st.sampled_from(("heads", "kv_heads")))
    by = sd.dot(sd.q, sd.k if block == 1 else sd.summary(sd.k, block))
    by = by if heads == "heads" else by.over_group("sum")
    count, extra = data.draw(st.sampled_from((1, 3, 40))), data.draw(st.booleans())
    forced, is_forced = data.draw(
        st.sampled_from(((None, lambda t, j: False), (kv_idx < 3, lambda t, j: j < 3), (q_idx == kv_idx, lambda t, j: j == t)))
    )
    mask, holds = WITHIN[name]
    picked = sd.top_k(by, count, among=mask, forced=forced, extra=extra, name="picked")
    program = sd.Program(sd.attend(CAUSAL & (picked | (q_idx == kv_idx))))
    assert read_program(program.text) == program
    q, k, v = data.draw(kit.inputs(case, dtype=torch.float64))
    attn = sd.compile(program, backend="tiled")
    kit.assert_matches_reference(attn, q, k, v, q_offset=case.q_offset)
    found = attn.choices(q, k, v, q_offset=case.q_offset)
    lists, inner = found.pop("picked").table(), next(iter(found.values())).table()
    size, group = lists.shape[1], case.heads // case.kv_heads
    for b, h, row in torch.cartesian_prod(*map(torch.arange, lists.shape[:3])).tolist():
        t, mine = case.q_offset + row, range(h * case.heads // size, (h + 1) * case.heads // size)
        keys = [k[b, g // group] for g in mine]
        heights, there, first = [], [], []
        for start in range(0, case.kv_len, block):
            some = range(start, min(start + block, case.kv_len))
            heights.append(
                sum(float(q[b, g, row] @ rows[start : start + block].mean(0)) for g, rows in zip(mine, keys, strict=True))
            )
            chosen = [inner[b, g // group, row].nonzero()[:, 0].tolist() for g in mine]
            there.append(any(holds(one, t, j) for one in chosen for j in some))
            first.append(there[-1] and any(is_forced(t, j) for j in some))
        order = sorted((u for u, ok in enumerate(there) if ok and not first[u]), key=lambda u: (-heights[u], u))
        forced_ones = [u for u, ok in enumerate(first) if ok]
        wanted = [*forced_ones, *order[:count]] if extra and forced is not None else [*forced_ones, *order][:count]
        assert lists[b, h, row].nonzero()[:, 0].tolist() == sorted(wanted)


# ---- entries -------------------------------------------------------------------------------------------------------------------------


def entries(c: Tensor, z: Tensor, bias: Tensor, m: int) -> Tensor:
    """Windows of m tokens, weighed channel by channel; with twice as many channels the half of the window before beside it."""
    width, found = c.shape[1], []
    overlap = bias.shape[1] // 2 if bias.shape[1] == 16 else 0
    for w in range(len(c) // m):
        rows, logits = c[w * m : (w + 1) * m], z[w * m : (w + 1) * m] + bias
        if overlap:
            before = slice((w - 1) * m, w * m) if w else slice(0, 0)
            first = bias[: before.stop - before.start, :overlap]
            logits = torch.cat([z[before, :overlap] + first, logits[:, overlap:]])
            rows = torch.cat([c[before, :overlap], rows[:, overlap:]])
        found.append((logits.softmax(0) * rows).sum(0))
    assert width in (8, 16)
    return torch.stack(found)


CSA = entries(numbers(11, 26, 16), 2 * numbers(12, 26, 16), numbers(13, 4, 16), 4)


def test_T05_entries() -> None:
    assert CSA.shape == (6, 8)
    assert abs(float(CSA[0, 0]) - 0.0975075527) < 1e-9 and abs(float(CSA[5, 0]) - 0.5668737116) < 1e-9
    assert abs(dig(CSA) - 0.3022605170) < 1e-9
    hca = entries(numbers(14, 26, 8), 2 * numbers(15, 26, 8), numbers(16, 8, 8), 8)
    assert hca.shape == (3, 8) and abs(dig(hca) + 0.3170417876) < 1e-9


def test_T06_csa_picks_entries(backend: str) -> None:
    """Choices of rows of four tokens, in an attention to such rows, are of one row each."""
    done = (kv_idx + 1) * 4 <= q_idx + 1
    e, ek = sd.input("e", "batch kv_heads keys/4 head_dim"), sd.input("ek", "batch one keys/4 index_dim")
    picks = sd.top_k(index(sd.dot(IQ, ek)), 2, name="picks")
    sink = sd.table("sink", dtype=float)
    near = sd.attend(sd.patterns.sliding_window(5), sink=sink[sd.h])
    attn = sd.compile(sd.joint(near, sd.attend(done & picks, k=e, v=e)), backend=backend)
    kv = numbers(17, 26, 8)[None, None]
    given = {"q": 2 * numbers(19, 2, 26, 8)[None], "k": kv, "v": kv, "sink": numbers(18, 2), "e": CSA[None, None]}
    given |= {"iq": numbers(20, 4, 26, 8)[None], "w": numbers(21, 4, 26)[None], "ek": numbers(22, 6, 8)[None, None]}
    lists = chosen(attn, "picks", **given)[0]
    assert (lists[2], lists[3], lists[15], lists[25]) == ([], [0], [0, 3], [1, 3])
    out = attn(**given)
    assert abs(float(out[0, 0, 25, 0]) - 0.0448233809) < 1e-9 and abs(dig(out) + 2.686873376) < 1e-8
    assert sd.analyse(attn.program, 26, sink=given["sink"]).causal == sd.PROVED
    # The same by hand: one softmax over the window, what was picked, and the sink.
    for t in (3, 25):
        rows = torch.cat([kv[0, 0, max(0, t - 4) : t + 1], CSA[lists[t]]])
        logits = torch.cat([rows @ given["q"][0, 1, t] * 8**-0.5, given["sink"][1:]])
        torch.testing.assert_close(out[0, 1, t], logits.softmax(0)[:-1] @ rows)


def test_T06_hca(backend: str) -> None:
    made = entries(numbers(14, 26, 8), 2 * numbers(15, 26, 8), numbers(16, 8, 8), 8)
    e = sd.input("e", "batch kv_heads keys/8 head_dim")
    near, far = sd.patterns.sliding_window(5), sd.attend((kv_idx + 1) * 8 <= q_idx + 1, k=e, v=e)
    kv, q = numbers(17, 26, 8)[None, None], 2 * numbers(19, 2, 26, 8)[None]
    out = sd.compile(sd.joint(near, far), backend=backend)(q, kv, kv, e=made[None, None])
    rows = torch.cat([kv[0, 0, 20:25], made[:3]])
    torch.testing.assert_close(out[0, 1, 24], (rows @ q[0, 1, 24] * 8**-0.5).softmax(0) @ rows)


@pytest.mark.parametrize("block", [8, 16])
def test_blocks_of_rows_are_chosen_in_an_attention_to_rows(backend: str, block: int) -> None:
    """Blocks of several rows, and rows that an input lacks."""
    e = sd.input("e", "batch kv_heads keys/4 head_dim")
    picks = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, block)), 2, name="picks")
    attn = sd.compile(sd.attend(((kv_idx + 1) * 4 <= q_idx + 1) & picks, k=e, v=e), backend=backend)
    q, kv = numbers(1, 1, 2, 42, 8), numbers(2, 1, 1, 42, 8)
    lists = chosen(attn, "picks", q=q, k=kv, v=kv, e=kv[:, :, :40:4])
    out = attn(q, kv, kv, e=kv[:, :, :40:4])
    for t in (20, 41):
        rows = [r for r in range(10) if (r + 1) * 4 <= t + 1 and r * 4 // block in lists[1][t]]
        few = kv[0, 0, :40:4][rows]
        torch.testing.assert_close(out[0, 1, t], (few @ q[0, 1, t] * 8**-0.5).softmax(0) @ few)
    few = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 2)), 2)
    with pytest.raises(sd.PatternError, match="a row must lie in one of them"):
        sd.attend(few, k=e, v=e)
