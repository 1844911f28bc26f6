"""Schedules: what they promise about queries and residue classes is true, they are the same each time, and they cost what they compute."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx
from sparsedsl.analysis.domain import Domain
from sparsedsl.backends.tiled.attention import TiledKernel
from sparsedsl.runtime.call import check_call
from sparsedsl.testing import masks, shapes, tables_for
from sparsedsl.tiling.cost import heads_at_once
from sparsedsl.tiling.cutting import CUTTING
from sparsedsl.tiling.residues import residue_classes
from sparsedsl.tiling.schedule import KeyTile, ResiduePlan, Schedule, StridedSeries
from sparsedsl.tiling.scheduling import HEIGHTS, HeadShape, make_schedule
from sparsedsl.tuning.machine import BUILT_IN

causal = kv_idx <= q_idx
shape = HeadShape(group=2, strips_of=4, head_dim=64, head_dim_v=64)


def rows_of(plan: ResiduePlan, group: int, groups: tuple[int, int], domain: Domain) -> torch.Tensor:
    """How often each query row of a group, one of ``(batch, heads)``, is in a strip of a residue, ``(rows,)``."""
    seen = torch.zeros(domain.rows, dtype=torch.int32)
    if plan.lists is not None:
        # A residue's mask may read less than the whole: its lists are then the same for all heads, or for all batch entries.
        (batch, heads), (b, h) = plan.lists.shape[:2], divmod(group, groups[1])
        listed = (plan.lists.full.counts + plan.lists.partial.counts)[b % batch, h % heads]
        seen += (listed > 0).repeat_interleave(plan.lists.block[0])[: domain.rows]
        return seen
    for series in plan.strided_series:
        for turn in range(series.count if series.group == group else 0):
            first = series.q_start + turn * series.step
            places = torch.arange(first, first + series.height) * plan.residue.q_step + plan.residue.q_start - domain.q_offset
            seen[places] += 1
    return seen


def assert_promises_hold(schedule: Schedule, domain: Domain) -> None:
    for group in range(schedule.groups[0] * schedule.groups[1]):
        seen = [rows_of(plan, group, schedule.groups, domain) for plan in schedule.residue_classes]
        assert all(int(rows.max()) <= 1 for rows in seen), "two strips of one residue share a query"
        together = torch.stack(seen).sum(0) if seen else torch.zeros(domain.rows)
        assert schedule.overlap or int(together.max()) <= 1, "two residue classes share a query, and their results are not merged"
        assert not schedule.covers or int(together.min()) >= 1, "a query is in no strip, and its result is not set"
    assert schedule.pairs == sum(plan.pairs for plan in schedule.residue_classes) and schedule.seconds >= 0


@given(mask=masks(), case=shapes(max_len=70, max_heads=3), height=st.sampled_from((None, 3, 16, 64)), data=st.data())
@settings(max_examples=150)
def test_what_a_schedule_promises(mask, case, height, data):
    tables = data.draw(tables_for(mask, case))
    domain = Domain(case.q_len, case.kv_len, case.q_offset, case.batch, case.heads, tables)
    schedule = make_schedule(mask.expr, domain, BUILT_IN, shape, height)
    assert_promises_hold(schedule, domain)
    assert height is None or schedule.height in (0, height)
    assert str(schedule)


@pytest.mark.parametrize(
    "mask",
    [
        ((kv_idx % 4 == 1) & causal & (q_idx > 50)) | ((q_idx * kv_idx) % 3 < 2),
        ((q_idx - kv_idx) % 4 == 0) | ((q_idx + kv_idx) % 4 == 1),
        ((q_idx - kv_idx) % 4 == 0) | ((q_idx - kv_idx) % 6 == 1),
        (q_idx - kv_idx < 10) & causal & (q_idx < 50 + 10 * h),
        (kv_idx % 8 == 7) & causal,
    ],
    ids=str,
)
@pytest.mark.parametrize("offset", [0, 61])
def test_promises_about_lanes_that_meet(mask, offset):
    domain = Domain(100, 200, offset, 1, 4)
    schedule = make_schedule(mask.expr, domain, BUILT_IN, shape, 16)
    assert_promises_hold(schedule, domain)


def test_the_pairs_computed_are_few_more_than_those_allowed():
    domain, window = Domain(8192, 8192), causal & (q_idx - kv_idx < 512)
    schedule = make_schedule(window.expr, domain, BUILT_IN, shape)
    allowed = 8192 * 512 - 512 * 511 // 2
    assert allowed <= schedule.pairs <= 1.6 * allowed
    assert schedule.covers and not schedule.overlap and schedule.groups == (1, 1) and schedule.height in HEIGHTS


def test_dilation_computes_no_pair_between_residues():
    domain, mask = Domain(4096, 4096), sd.patterns.dilated(64, step=8)
    schedule = make_schedule(mask.expr, domain, BUILT_IN, shape)
    assert len(schedule.residue_classes) == 8 and not schedule.overlap and schedule.covers
    assert schedule.pairs <= 3 * 4096 * 64


def test_groups_are_what_the_mask_reads():
    mask = causal & (q_idx - kv_idx < 10 + 10 * h)
    schedule = make_schedule(mask.expr, Domain(200, 200, 0, 3, 4), BUILT_IN, shape, 64)
    assert schedule.groups == (1, 4) and {f.group for f in schedule.residue_classes[0].strided_series} == {0, 1, 2, 3}


def test_blocks_that_no_interval_solves_are_scattered_tiles():
    mask = ((q_idx // 64) * (kv_idx // 64)) % 5 == 1
    schedule = make_schedule(mask.expr, Domain(1000, 1000), BUILT_IN, shape)
    (plan,) = schedule.residue_classes
    assert plan.lists is not None and plan.lists.block == (64, 64) and not plan.strided_series and plan.pairs == schedule.pairs
    assert "scattered tiles" in str(schedule)


def test_the_mask_that_allows_nothing():
    schedule = make_schedule((q_idx < -1).expr, Domain(10, 10), BUILT_IN, shape)
    assert schedule.residue_classes == () and schedule.pairs == 0 and not schedule.covers


def test_a_schedule_is_the_same_each_time(monkeypatch):
    from sparsedsl.tuning.rates import machine

    monkeypatch.setenv("SPARSEDSL_TUNE", "off")
    mask = sd.patterns.strided(8, local=200) | (kv_idx < 4)
    made = [make_schedule(mask.expr, Domain(5000, 5000), machine(), shape) for _ in range(2)]
    assert str(made[0]) == str(made[1]) and made[0].seconds == made[1].seconds
    assert [p.strided_series for p in made[0].residue_classes] == [p.strided_series for p in made[1].residue_classes]


def test_what_a_schedule_prints():
    schedule = make_schedule((causal & (q_idx - kv_idx < 64)).expr, Domain(256, 256), BUILT_IN, shape, 64)
    head, *body = str(schedule).splitlines()
    assert head.startswith("strips of up to 64 queries, ") and head.endswith(" us expected")
    assert body[0].startswith("  1 strip of 64 queries from query 0: ")
    many = Schedule(
        (
            ResiduePlan(
                residue_classes(causal.expr)[0],
                0,
                9,
                tuple(StridedSeries(0, n, 1, 1, 0, (KeyTile(0, 1, 0, None),)) for n in range(9)),
            ),
        ),
        (1, 1),
        False,
        True,
        1,
        0.0,
    )
    assert str(many).splitlines()[-1] == "  .. 3 more of such runs"


def test_a_schedule_names_heads_and_prints_nothing_of_no_size():
    windows = torch.tensor([8, 32, 8, 8])
    mask = causal & (q_idx - kv_idx < sd.table("w", values_in=(1, 64))[sd.h])
    told = str(make_schedule(mask.expr, Domain(256, 256, 0, 1, 4, {"w": windows}), BUILT_IN, shape, 64)).splitlines()
    assert told[0].split(", ")[1].endswith("pairs computed for one head of each kind")
    assert [line.strip() for line in told if line.strip().endswith(":")] == ["heads 0, 2, 3:", "head 1:"]
    two = mask & (kv_idx % 2 == sd.b % 2)
    told = str(make_schedule(two.expr, Domain(256, 256, 0, 2, 2, {"w": windows[:2]}), BUILT_IN, shape, 64))
    assert "batch entry 1, head 1" in told or "scattered" in told
    nothing = make_schedule((causal & (kv_idx > q_idx)).expr, Domain(256, 256), BUILT_IN, shape)
    assert str(nothing) == "nothing to compute: no query sees a key"
    scattered = make_schedule(((q_idx * kv_idx) % 3 == 0).expr, Domain(256, 256), BUILT_IN, shape)
    assert str(scattered).startswith("tiles, each for itself, ")
    assert not any(word in str(made) for made in (nothing, scattered) for word in ("0 queries", "0 keys"))


# ---- the cost model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [causal & (q_idx - kv_idx < 256), causal, q_idx // 700 == kv_idx // 700], ids=str)
def test_the_height_is_the_cheapest(mask):
    domain = Domain(4096, 4096)
    seconds = {height: make_schedule(mask.expr, domain, BUILT_IN, shape, height).seconds for height in HEIGHTS}
    chosen = make_schedule(mask.expr, domain, BUILT_IN, shape)
    assert chosen.seconds == min(seconds.values()) == seconds[chosen.height]


@pytest.mark.parametrize(
    "mask", [causal & (q_idx - kv_idx < 256), causal & ((q_idx * kv_idx) % 3 == 0)], ids=["strips", "scattered"]
)
def test_costs_grow_with_the_work(mask):
    def seconds(sizes=shape, machine=BUILT_IN, length=1024):
        return make_schedule(mask.expr, Domain(length, length), machine, sizes, 128).seconds

    assert seconds(length=4096) > 3 * seconds()
    assert seconds(dataclasses.replace(shape, strips_of=8)) > 1.5 * seconds()
    assert (
        seconds(dataclasses.replace(shape, mod_ns=1.0)) > seconds()
        and seconds(dataclasses.replace(shape, head_dim=128)) > seconds()
    )
    slow = {n: tuple(x / 10 for x in getattr(BUILT_IN, n)) for n in ("linear_gflops", "matmul_gflops", "batched_gflops")}
    assert seconds(machine=dataclasses.replace(BUILT_IN, **slow)) > 2 * seconds()


class Counting(TorchDispatchMode):
    """How many operations torch is asked for, views among them."""

    asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.asked += 1
        return func(*args, **(kwargs or {}))


STRIDED = causal & ((q_idx - kv_idx) % 32 == 0)


@pytest.mark.parametrize(
    "mask",
    [causal & (q_idx - kv_idx < 256), STRIDED, STRIDED | (causal & (q_idx - kv_idx < 256)), causal & ((q_idx * kv_idx) % 3 == 0)],
    ids=["window", "stride", "window and stride", "scattered"],
)
@pytest.mark.parametrize("heads", [1, 3])
def test_small_operations_are_priced_as_often_as_they_are_asked_for(mask, heads, options):
    """On a machine on which nothing else takes time, the seconds are their number."""
    options(CUTTING, height=64)
    rates = {name: tuple(1e30 for _ in getattr(BUILT_IN, name)) for name in ("linear_gflops", "matmul_gflops", "batched_gflops")}
    machine = dataclasses.replace(BUILT_IN, **rates, softmax_ns=0.0, pass_ns=0.0, gather_gbs=1e30, call_us=1e6)
    made = make_schedule(mask.expr, Domain(2048, 2048), machine, HeadShape(1, heads, 8, 8))
    kernel, q = TiledKernel(sd.attend(mask)), torch.zeros(1, heads, 2048, 8)
    call = check_call(kernel.pattern, q, q, q, {})
    kernel.forward(call, made)  # masks of tiles are kept for the next
    with Counting() as count:
        kernel.forward(call, made)
    assert made.seconds == pytest.approx(count.asked, rel=0.15)


@pytest.mark.parametrize("rows", [1, 16, 100, 1000, 10**6])
def test_logits_held_at_once_are_bounded(rows):
    for heads in (1, 7, 1000):
        several = heads_at_once(rows, heads)
        assert 1 <= several <= heads and (several == 1 or rows * several * CUTTING.now.keys <= 1 << 20)
