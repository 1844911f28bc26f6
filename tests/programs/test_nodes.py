"""What single nodes mean, beside other implementations: combinations of branches, summaries, rules, orders, and their limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import testing as kit

Tensor = torch.Tensor
B, HQ, H, L, D = 2, 4, 2, 29, 8
CASE = kit.AttentionCase(batch=B, heads=HQ, kv_heads=H, q_len=L, kv_len=L, head_dim=D, head_dim_v=D)
CAUSAL = sd.kv_idx <= sd.q_idx
ENDED = (sd.kv_idx // 4 + 1) * 4 <= sd.q_idx
MEANS = sd.dot(sd.q, sd.summary(sd.k, 4))


@pytest.fixture(scope="module")
def qkv(draw: Any) -> dict[str, Tensor]:
    return {name: draw(B, n, L, D, seed=i) for i, (name, n) in enumerate({"q": HQ, "k": H, "v": H}.items())}


def test_joint_branches_are_one_softmax(qkv: Any, backend: str, assert_close: Any) -> None:
    far, near = CAUSAL & (sd.q_idx - sd.kv_idx >= 5), sd.patterns.sliding_window(5)
    out, lse = sd.compile(sd.joint(far, near), backend=backend)(**qkv, return_lse=True)
    assert_close((out, lse), sd.compile(CAUSAL, backend="reference")(**qkv, return_lse=True))
    alone = sd.compile(sd.joint(far, near, sd.q_idx < sd.kv_idx - 100), backend=backend)(**qkv)  # a branch without pairs
    assert_close(alone, out)


def test_a_branch_twice_counts_twice(qkv: Any, backend: str, assert_close: Any) -> None:
    once = sd.compile(CAUSAL, backend="reference")(**qkv, return_lse=True)
    out, lse = sd.compile(sd.joint(CAUSAL, CAUSAL), backend=backend)(**qkv, return_lse=True)
    assert_close((out, lse), (once[0], once[1] + torch.log(torch.tensor(2.0, dtype=torch.float64))))


def test_mixed_branches_are_a_weighted_sum(qkv: Any, draw: Any, backend: str, assert_close: Any) -> None:
    gate = draw(B, HQ, L, 2, seed=7)
    parts = [sd.compile(p, backend="reference")(**qkv) for p in (CAUSAL, sd.patterns.ring_linear([0.5] * HQ))]
    mixed = sd.mix(CAUSAL, sd.linear([0.5] * HQ), weights=sd.input("gate", "batch heads queries 2"))
    assert_close(sd.compile(mixed, backend=backend)(**qkv, gate=gate), gate[..., :1] * parts[0] + gate[..., 1:] * parts[1])


@pytest.mark.parametrize("how", ["mean", "max", "min", "sum", "first", "last"])
def test_summaries(qkv: Any, backend: str, assert_close: Any, how: str) -> None:
    """Attention to summaries, of which the last is ragged."""
    rows = list(qkv["k"].split(4, 2)), list(qkv["v"].split(4, 2))
    made = {
        "mean": lambda x: x.mean(2), "max": lambda x: x.amax(2), "min": lambda x: x.amin(2), "sum": lambda x: x.sum(2),
        "first": lambda x: x[:, :, 0], "last": lambda x: x[:, :, -1],
    }[how]  # fmt: skip
    k, v = (torch.stack([made(x) for x in part], 2) for part in rows)
    attn = sd.compile(sd.attend(True, k=sd.summary(sd.k, 4, how), v=sd.summary(sd.v, 4, how)), backend=backend)
    assert_close(attn(**qkv), sd.compile(True, backend="reference")(qkv["q"], k, v))


def test_scores_as_a_bias(qkv: Any, backend: str, assert_close: Any, grads: Any) -> None:
    """Scores of blocks in the logits: gradients reach q and k through both."""
    pooled = sd.dot(sd.summary(sd.q, 4), sd.summary(sd.k, 4))

    def dense(return_lse: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(HQ // H, 1) for x in (k, v))
        blocks = [torch.stack([x.mean(2) for x in y.split(4, 2)], 2) for y in (q, k)]
        bias = (blocks[0] @ blocks[1].transpose(2, 3)).repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :L, :L]
        future = torch.arange(L) > torch.arange(L)[:, None]
        return ((q @ k.transpose(2, 3) + bias) / D**0.5).masked_fill(future, -torch.inf).softmax(-1) @ v

    attn = sd.compile(sd.attend(CAUSAL, sd.score + pooled), backend=backend)
    assert_close(attn(**qkv), dense(False, **qkv))
    assert_close(tuple(grads(attn, qkv).values()), tuple(grads(dense, qkv).values()))


def table_of(attn: Any, qkv: Any, label: str) -> Tensor:
    found = attn.choices(**qkv)[label]
    return found if isinstance(found, Tensor) else found.table()


@pytest.mark.parametrize("extra", [False, True])
def test_forced_units_come_first_or_on_top(qkv: Any, backend: str, extra: bool) -> None:
    forced = sd.kv_idx < 4
    selected = sd.top_k(MEANS, 2, among=ENDED, forced=forced, extra=extra, name="selected")
    found = table_of(sd.compile(sd.attend(ENDED & selected), backend=backend), qkv, "selected")
    over = torch.arange(L) // 4
    assert found[:, :, over > 0, 0].all()
    assert (found.sum(-1) == torch.minimum(over, torch.tensor(2 + extra))).all()


@pytest.mark.parametrize("group", ["over_group", "over_heads"])
@pytest.mark.parametrize("how", ["sum", "mean", "max"])
def test_one_choice_for_many_heads(qkv: Any, backend: str, group: str, how: str) -> None:
    selected = sd.top_k(getattr(MEANS, group)(how), 1, among=ENDED, name="selected")
    found = table_of(sd.compile(sd.attend(ENDED & selected), backend=backend), qkv, "selected")
    k = torch.stack([x.mean(2) for x in qkv["k"].split(4, 2)], 2).repeat_interleave(HQ // H, 1)
    scores = (qkv["q"] @ k.transpose(2, 3)).unflatten(1, (H if group == "over_group" else 1, -1))
    scores = scores.amax(2) if how == "max" else getattr(scores, how)(2)
    over = torch.arange(k.shape[2]) < torch.arange(L)[:, None] // 4
    best = scores.masked_fill(~over, -torch.inf).argmax(-1)
    assert torch.equal(found, torch.nn.functional.one_hot(best, k.shape[2]).bool() & over)


@pytest.mark.parametrize(("inclusive", "unmet"), [(True, "all"), (False, "all"), (True, "none")])
def test_a_share_of_the_mass(qkv: Any, backend: str, inclusive: bool, unmet: str) -> None:
    selected = sd.top_p(MEANS, 0.6, among=ENDED, inclusive=inclusive, unmet=unmet, name="selected")
    found = table_of(sd.compile(sd.attend(ENDED & selected), backend=backend), qkv, "selected")
    k = torch.stack([x.mean(2) for x in qkv["k"].split(4, 2)], 2).repeat_interleave(HQ // H, 1)
    over = torch.arange(k.shape[2]) < torch.arange(L)[:, None] // 4
    p = (qkv["q"] @ k.transpose(2, 3) / D**0.5).masked_fill(~over, -torch.inf).softmax(-1).nan_to_num(0.0)
    ranked, place = p.sort(-1, descending=True)
    held = ranked.cumsum(-1)
    taken = (held - ranked < 0.6) if inclusive else held < 0.6
    assert torch.equal(found, torch.zeros_like(taken).scatter(-1, place, taken & (ranked > 0)))


def test_a_threshold(qkv: Any, backend: str) -> None:
    selected = sd.threshold(MEANS, 0.1, among=ENDED, name="selected")
    found = table_of(sd.compile(sd.attend(ENDED & selected), backend=backend), qkv, "selected")
    k = torch.stack([x.mean(2) for x in qkv["k"].split(4, 2)], 2).repeat_interleave(HQ // H, 1)
    over = torch.arange(k.shape[2]) < torch.arange(L)[:, None] // 4
    assert torch.equal(found, ((qkv["q"] @ k.transpose(2, 3) / D**0.5) >= 0.1) & over)


def test_equal_scores_take_the_earlier_unit(qkv: Any, backend: str) -> None:
    t = qkv | {"q": (4 * qkv["q"]).round(), "k": torch.ones_like(qkv["k"])}  # whole numbers: sums are equal in any order
    scores = sd.dot(sd.q, sd.summary(sd.k, 4), scale=0.5)
    selected = sd.top_k(scores, 2, among=ENDED, name="selected")
    found = table_of(sd.compile(sd.attend(ENDED & selected), backend=backend), t, "selected")
    assert not found[..., 2:].any() and found[:, :, 8:, :2].all()


FIRST, SECOND = sd.top_k(MEANS, 1, name="first"), sd.top_k(sd.bound(sd.q, sd.k, 2), 3, name="second")
SHARED = sd.top_k(MEANS.over_group("sum"), 2, name="shared")
WINDOW = sd.q_idx - sd.kv_idx < 6
CAPPED, BIASED = sd.tanh(sd.score / 2) * 2, sd.score - 0.1 * (sd.q_idx - sd.kv_idx)
LEARNED = sd.score * 0.5 + sd.table("slope", learned=True)[sd.h, sd.kv_idx % 3]
BLOCKS = sd.top_k(sd.dot(sd.summary(sd.q, 8), sd.summary(sd.k, 8)), 1, name="blocks")
MASKS = {
    "one": CAUSAL & (WINDOW | FIRST),
    "two": CAUSAL & (WINDOW | FIRST | SECOND),
    "both": CAUSAL & FIRST & SECOND,
    "either": CAUSAL & (FIRST ^ SECOND),
    "one without the other": CAUSAL & FIRST & ~SECOND,
    "all but": CAUSAL & ~FIRST,
    "all but, or another": CAUSAL & (~FIRST | SECOND),
    "heads that share": CAUSAL & (SHARED | FIRST),
    "by head": CAUSAL & (WINDOW | FIRST & (sd.h % 2 == 0)),
    "blocks of queries": CAUSAL & (BLOCKS | FIRST),
    "of another query": CAUSAL & (FIRST | SECOND[sd.b, sd.h, sd.maximum(sd.q_idx - 1, 0), sd.kv_idx // 2]),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("score", [None, CAPPED, BIASED, LEARNED], ids=["plain", "capped", "biased", "learned"])
def test_choices_are_operands_of_masks_beside_any_score(name: str, score: Any) -> None:
    program = sd.attend(MASKS[name], score, sink=0.3 if name == "two" else None)
    q, k, v = (kit.tensor(*s, seed=i, dtype=torch.float64) for i, s in enumerate((CASE.q_shape, CASE.k_shape, CASE.v_shape)))
    named = {"slope": kit.tensor(HQ, 3, seed=5, dtype=torch.float64).requires_grad_()} if score is LEARNED else {}
    attn = sd.compile(program, backend="tiled", allow=["selection reads later queries"])
    done = kit.assert_matches_reference(attn, q, k, v, **named)
    assert {"out", "lse", "dq", "dk", "dv"} <= set(done)


def test_weights_add_up(backend: str) -> None:
    window = sd.patterns.sliding_window(5)
    for program in (sd.joint(window, ENDED & sd.top_k(MEANS, 2, among=ENDED)), sd.patterns.moba(4, 2)):
        kit.assert_weights_sum(sd.compile(program, backend=backend), CASE)
    kit.assert_weights_sum(sd.compile(sd.patterns.hsa(4, 2, "softmax1"), backend=backend), CASE, total=(0.0, 1.0))
    with pytest.raises(kit.Counterexample, match="add up to"):
        kit.assert_weights_sum(sd.compile(sd.patterns.nha(3, 4), backend=backend), CASE)  # slots begin with nothing in them


@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(0, L, L), (2, 0, L), (2, 1, 0)])
@pytest.mark.parametrize("name", ["hsa", "moba", "nha", "ring"])
def test_calls_of_size_zero(backend: str, name: str, batch: int, q_len: int, kv_len: int) -> None:
    pattern = {
        "hsa": sd.patterns.hsa(8, 2), "moba": sd.patterns.moba(8, 2), "nha": sd.patterns.nha(3, 4), "ring": sd.linear([0.5] * HQ),
    }[name]  # fmt: skip
    if name in ("nha", "ring") and kv_len < q_len:
        return  # every query stands at a key
    shapes = {"q": (HQ, q_len), "k": (H, kv_len), "v": (H, kv_len)}
    t = {key: torch.ones(batch, *shape, D) for key, shape in shapes.items()}
    if name == "hsa":
        t |= {"retrieval_q": torch.ones(batch, H, q_len, 3), "landmarks": torch.ones(batch, H, kv_len // 8, 3)}
    elif name == "nha":
        t["gate"] = torch.ones(batch, H, kv_len, 3)
    out = sd.compile(pattern, backend=backend)(**t)
    assert out.shape == (batch, HQ, q_len, D) and (kv_len > 0 or (out == 0).all())


def test_noise_is_the_same_however_a_call_is_cut(qkv: Any, backend: str) -> None:
    selected = sd.top_k(MEANS.gumbel(sd.input("seed", "1")), 2, among=ENDED)
    attn, seed = sd.compile(sd.attend(ENDED & selected), backend=backend), torch.tensor([3])
    whole = attn(**qkv, seed=seed)
    rows = [attn(qkv["q"][:, :, i : i + 1], qkv["k"], qkv["v"], q_offset=i, seed=seed) for i in range(L)]
    torch.testing.assert_close(torch.cat(rows, dim=2), whole)


def test_tables_that_are_declared_otherwise_are_other_nodes() -> None:
    """A monotone table and any table of one name: a program of one is not a program of the other."""
    roots = []
    for words in ({}, {"monotone": True}, {"dtype": bool}, {"values_in": (0, 3)}):
        doc = sd.table("doc", **words)
        mask = doc[sd.kv_idx] if words.get("dtype") is bool else doc[sd.q_idx] == doc[sd.kv_idx]
        roots.append(sd.Program(sd.attend(mask & (sd.kv_idx <= sd.q_idx))).root)
        roots.append(sd.Program(sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4)), 2, among=mask)).root)
    assert len(set(map(id, roots))) == len(roots) and len({root.key for root in roots}) == len(roots)
    doc = sd.table("doc")
    falls = torch.tensor([3, 1, 3, 1, 0, 0, 2, 1])
    q = torch.randn(1, 1, 8, 4, generator=torch.Generator().manual_seed(0))
    sd.compile(doc[sd.q_idx] == doc[sd.kv_idx])(q, q, q, doc=falls)


def test_inputs_of_one_name_are_one_input() -> None:
    """A call gives one tensor by a name: two nodes of it would read it as two things, or one of them not at all."""
    axes = "batch kv_heads keys/4 head_dim"
    mean, top = (sd.input("rows", axes, default=sd.summary(sd.k, 4, how)) for how in ("mean", "max"))
    for one, other in ((mean, top), (mean, sd.input("rows", axes)), (mean, sd.input("rows", "batch kv_heads keys/8 head_dim"))):
        first, second = (sd.attend(CAUSAL & sd.top_k(sd.dot(sd.q, x), 2, among=CAUSAL)) for x in (one, other))
        program = sd.Program(sd.mix(first, second, weights=sd.input("w", "batch heads queries 2")))
        for use in (sd.compile, lambda program: sd.analyse(program, 64)):
            with pytest.raises(sd.PatternError, match="two different inputs of one program are called 'rows'"):
                use(program)


def test_scores_of_no_block_are_moved_and_scaled(backend: str) -> None:
    """A call that leaves an incomplete block out may have none at all: nothing is chosen, whatever is added to the scores."""
    by = 0.1 - sd.given_scores(sd.input("by", "batch one queries keys/4")) / 2
    attn = sd.compile(sd.attend(CAUSAL & (sd.top_k(by, 2) | (sd.q_idx == sd.kv_idx))), backend=backend)
    q = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    for blocks in (0, 1):
        out = attn(q, q, q, by=torch.ones(1, 1, 3, blocks, dtype=torch.float64))
        assert torch.allclose(out, sd.compile(CAUSAL if blocks else sd.q_idx == sd.kv_idx, backend="reference")(q, q, q))
