"""Plans: every token has one rank, every key that a query sees is there, work is even, and no way of placing wins everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from sparsedsl.analysis import tiles
from sparsedsl.analysis.effort import EFFORT
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.parallel import TokenPlan, plan
from sparsedsl.parallel.assigning import METHODS

CAUSAL = kv_idx <= q_idx
DOC, KEEP = sd.table("doc", monotone=True), sd.table("keep", dtype=bool)
TABLES = {"doc": torch.tensor([0] * 90 + [1] * 11 + [2] * 200 + [3] * 99), "win": torch.tensor([2, 30])}
BLOCKS = torch.rand(13, 13, generator=torch.Generator().manual_seed(1)) < 0.3
PATTERNS: dict[str, Any] = {
    "causal": CAUSAL,
    "window": sd.patterns.sliding_window(40),
    "both sides": abs(q_idx - kv_idx) < 9,
    "dilated": sd.patterns.dilated(6, 4),
    "documents": CAUSAL & (DOC[q_idx] == DOC[kv_idx]),
    "heads": CAUSAL & (q_idx - kv_idx < sd.table("win")[sd.h]),
    "blocks": (CAUSAL & KEEP[q_idx // 32, kv_idx // 32]).bind(keep=BLOCKS),
}


def tables_of(mask: Any, length: int) -> dict[str, torch.Tensor]:
    return {name: table[:length] for name, table in TABLES.items() if name in mask.tables}


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(PATTERNS)), st.integers(130, 400), st.integers(1, 5), st.sampled_from([1, 8, 16]), st.sampled_from([1, 2, 3]),
    st.sampled_from(["auto", *METHODS]), st.booleans(),
)  # fmt: skip
def test_every_key_that_is_seen_is_there_and_no_granule_that_is_not(
    name: str, length: int, world: int, granule: int, factor: int, method: str, equal: bool
) -> None:
    mask = PATTERNS[name]
    if method == "cuts":
        equal = False
    tables = tables_of(mask, length)
    found = plan(mask, length, world, chunk=granule * factor, granule=granule, method=method, equal=equal, **tables)
    rows = [found.rows(rank) for rank in range(world)]
    assert found.tried[found.method][1] == found.received
    assert found.tried[found.method][0] == pytest.approx(found.imbalance)
    torch.testing.assert_close(torch.cat(rows).sort().values, torch.arange(length))
    env = {
        "q_idx": torch.arange(length)[:, None],
        "kv_idx": torch.arange(length),
        "h": torch.arange(2)[:, None, None],
        "keep": BLOCKS,
    }
    seen = evaluate(mask.expr, {**env, **tables}).expand(2, length, length).any(0)
    for rank in range(world):
        columns = seen[rows[rank]].any(0)
        granules = torch.nn.functional.pad(columns, (0, -length % granule)).view(-1, granule).any(1)
        want = granules.repeat_interleave(granule)[:length].nonzero()[:, 0]
        torch.testing.assert_close(found.keys(rank), want)
        got = torch.cat([found.sent(other, rank) for other in range(world)])
        torch.testing.assert_close(got.sort().values, want[~torch.isin(want, rows[rank])])
        assert found.traffic()[:, rank].tolist() == [found.sent(other, rank).numel() for other in range(world)]


def test_the_cheapest_way_depends_on_the_mask() -> None:
    words: dict[str, Any] = {"chunk": 1024, "granule": 128}
    causal, near = (plan(mask, 1 << 17, 8, **words) for mask in (CAUSAL, sd.patterns.sliding_window(2048)))
    assert (causal.method, round(causal.imbalance, 2)) == ("zigzag", 1.0)
    assert (near.method, near.received) == ("contiguous", 2048)
    assert round(plan(CAUSAL, 1 << 17, 8, method="contiguous", **words).imbalance, 2) == 1.87
    # Packed documents of very different lengths: neighbours are uneven, and so is a zigzag.
    ends = torch.tensor([0.02, 0.05, 0.1, 0.4, 0.43, 0.5, 0.98]) * (1 << 17)
    doc = torch.bucketize(torch.arange(1 << 17), ends.long(), right=True)
    packed = plan(CAUSAL & (DOC[q_idx] == DOC[kv_idx]), 1 << 17, 8, doc=doc, **words)
    assert packed.imbalance < 1.02 and packed.tried["contiguous"][0] > 1.5
    # With a slow network fewer keys are worth some waiting.
    slow = plan(CAUSAL & (DOC[q_idx] == DOC[kv_idx]), 1 << 17, 8, doc=doc, rates=sd.parallel.Rates(pairs=1e15), **words)
    assert slow.received < packed.received


def test_layers_share_one_placement_and_a_plan_is_the_same_on_every_rank() -> None:
    layers = {"near": sd.patterns.sliding_window(32), "whole": sd.attend(CAUSAL, score=sd.patterns.alibi(2))}
    found, again = (plan(layers, 512, 4, chunk=32, granule=16) for _ in range(2))
    assert found.hash == again.hash and found.owner == again.owner
    assert found.traffic("near").sum() < found.traffic("whole").sum()
    assert found.bytes("near", kv_heads=2, head_dim=8) == int(found.traffic("near").sum(0).max()) * 2 * 16 * 2
    text = str(found)
    assert "512 tokens on 4 ranks in chunks of 32" in text and "near" in text and found.hash in text
    assert found.hash != plan(layers, 512, 4, chunk=32, granule=32).hash
    with pytest.raises(sd.ArgumentError, match="name must be that of a pattern of the plan, of 'near', 'whole'; got None"):
        found.keys(0)


@pytest.mark.parametrize(("patterns", "words", "error", "message"), [
    (sd.patterns.token_sparse(), {}, sd.UnsupportedError, "looks at all keys from some queries"),
    (CAUSAL & (sd.table("doc")[sd.b, q_idx] == 1), {}, sd.UnsupportedError, "reads b: batch entries see different keys"),
    (CAUSAL, {"chunk": 100, "granule": 16}, sd.ArgumentError, "chunk must be a multiple of granule, 16; got 100"),
    (CAUSAL, {"world": 40}, sd.ArgumentError, "fewer than 40 ranks"),
    (CAUSAL, {"world": 0}, sd.ArgumentError, "world must be a whole number of at least 1; got 0"),
    (CAUSAL, {"method": "ring"}, sd.PatternError, "method"),
    ({}, {}, sd.ArgumentError, "patterns must be a pattern, or a mapping"),
    (CAUSAL, {"doc": torch.arange(3)}, sd.TableError, "no pattern reads doc"),
])  # fmt: skip
def test_what_cannot_be_planned_is_refused(patterns: Any, words: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan(patterns, 1024, **{"world": 4, **words})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_plan_is_the_same_whatever_the_default_type(dtype: torch.dtype) -> None:
    doc = torch.bucketize(torch.arange(1 << 14), torch.tensor([900, 4000, 11000, 15000]), right=True)
    packed = CAUSAL & (DOC[q_idx] == DOC[kv_idx])
    words: list[dict[str, Any]] = [{}, {"method": "gathered"}, {"equal": False}]
    want = [plan(packed, 1 << 14, 4, chunk=256, doc=doc, **more).hash for more in words]
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert [plan(packed, 1 << 14, 4, chunk=256, doc=doc, **more).hash for more in words] == want
    finally:
        torch.set_default_dtype(usual)


def test_a_plan_is_plain_data() -> None:
    found = plan(CAUSAL, 512, 2, chunk=64, granule=32)
    assert isinstance(found, TokenPlan) and repr(found) == f"<TokenPlan 512 tokens on 2 ranks, {found.method}>"
    told = found.to_dict()
    assert told["owner"] == list(found.owner) and told["hash"] == found.hash


def test_work_is_estimated_from_evenly_spaced_rows_where_there_are_many() -> None:
    words: dict[str, Any] = {"chunk": 256, "granule": 64, "method": "zigzag"}
    mask = CAUSAL & (DOC[q_idx] == DOC[kv_idx])
    doc = torch.bucketize(torch.arange(5000), torch.tensor([700, 1900, 4100]), right=True)
    exact = plan(mask, 5000, 3, doc=doc, **words)
    with EFFORT.using(placed_rows=5000 // 16):
        few = plan(mask, 5000, 3, doc=doc, **words)
    assert few.work != exact.work and few.owner == exact.owner
    assert few.work == pytest.approx(exact.work, rel=0.02)
    assert few.hash == exact.hash, "what is sent is never estimated"


def test_runs_of_many_tokens_cost_what_runs_cost() -> None:
    found = plan(CAUSAL, 1 << 24, 256)
    assert (found.method, found.received) == ("zigzag", (1 << 24) - (1 << 16))


NO_GROUP = (
    "mesh must be a DeviceMesh or a process group, and no process group has begun: call torch.distributed.init_process_group"
)
WINDOW = sd.patterns.sliding_window(40)


@pytest.mark.parametrize(("call", "message"), [
    (lambda found: found.on(None), NO_GROUP),
    (lambda found: found.shard(torch.zeros(1, 256), 1, None), NO_GROUP),
    (lambda found: found.unshard(torch.zeros(1, 256), 1, 3), NO_GROUP),
    (lambda found: found.shard(None, 1, None), r"x must be a tensor of which rows are tokens; got None \(NoneType\)"),
    (lambda found: found.shard(torch.zeros(1, 256), 2, None), r"dim must be the dimension of x .* from 0 to 1; got 2 \(int\)"),
    (lambda found: found.bytes(kv_heads=2, head_dim="x"), r"bytes\(\): head_dim must be a whole number of at least 1; got 'x'"),
    (lambda found: plan(WINDOW, 256, 2, rates=3), r"rates must be what a rank does in a second, sd.parallel.Rates\(.*got 3"),
    (lambda found: plan(WINDOW, 256, 2, heads="a"), r"heads must be a whole number of at least 1; got 'a'"),
    (lambda found: plan(WINDOW, 256, 2, equal=None), r"equal must be True or False; got None"),
    (lambda found: sd.parallel.Rates(pairs=-1.0), r"Rates: pairs must be a positive number, a second; got -1.0"),
    (lambda found: sd.parallel.simulate(WINDOW, 256, None), r"worlds must be a number of ranks, or several; got None"),
    (lambda found: sd.parallel.simulate(WINDOW, 256, 2, heads="a"), r"heads must be a whole number of at least 1; got 'a'"),
    (lambda found: sd.attention(*[torch.zeros(1, 1, 256, 8)] * 3, WINDOW, cp=3), r"cp must be what plan.on\(mesh\) of .* got 3"),
])  # fmt: skip
def test_what_is_given_for_something_else_is_named(call: Any, message: str) -> None:
    with pytest.raises(sd.ArgumentError, match=message):
        call(plan(WINDOW, 256, 2, chunk=128))


def test_lists_that_memory_has_no_room_for_name_what_a_plan_can_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(count: int, device: torch.device, what: str, way: str) -> None:
        raise sd.UnsupportedError(f"{what} would take at least 12 GiB, over half of the 16 GiB of cpu. {way}")

    monkeypatch.setattr(tiles, "check_room", refuse)
    with pytest.raises(sd.UnsupportedError, match=r"over half of the .* of cpu\. Take a larger granule \(now 8 keys\)$"):
        plan(PATTERNS["blocks"], 400, 2, granule=8)
