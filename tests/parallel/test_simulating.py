"""Simulations: pairs and bytes are those that can be counted by hand, times follow from the rates, and what cannot be had is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl.parallel import SimulatedStep, Simulation, plan, simulate

CAUSAL = sd.kv_idx <= sd.q_idx
WORDS: dict[str, Any] = {"heads": 8, "kv_heads": 2, "head_dim": 16, "chunk": 64, "granule": 16}
# A second is a pair of all heads, and a key with its value.
RATES: dict[str, Any] = {"flops": 4.0 * 8 * 16, "bandwidth": 2 * 2 * 16 * 2}


def steps(patterns: Any, world: int, **words: Any) -> dict[str, SimulatedStep]:
    found = simulate(patterns, 1024, world, **{**WORDS, **RATES, **words})
    return {one.way: one for one in found.steps}


def test_numbers_are_those_of_a_count_by_hand() -> None:
    found = steps(CAUSAL, 4)
    pairs = 1024 * 1025 / 2
    ring, gathered = found["ring"], found["all-gather"]
    assert ring.bytes == gathered.bytes == 768 * RATES["bandwidth"]
    assert ring.imbalance == pytest.approx(1.0) and ring.compute_seconds == pytest.approx(pairs / 4)
    assert ring.transfer_seconds == 768 and ring.seconds == max(ring.compute_seconds or 0, 768)
    assert gathered.seconds == pytest.approx(pairs / 4 + 768)
    slow = steps(CAUSAL, 4, bandwidth=RATES["bandwidth"] / 1000)["ring"]
    assert slow.seconds == slow.transfer_seconds == pytest.approx(768_000)
    # Two of eight heads a rank, and one key head, of the 768 tokens that lie elsewhere; results back.
    ulysses = found["ulysses"]
    assert ulysses.bytes == 768 * (2 + 2 + 1 + 1) * 16 * 2
    assert ulysses.seconds == pytest.approx(pairs / 4 + ulysses.bytes / RATES["bandwidth"])


def test_a_plan_is_told_by_its_own_counts() -> None:
    layers = {"near": sd.patterns.sliding_window(100), "whole": CAUSAL}
    found = simulate(layers, 1024, [2, 4], **WORDS, **RATES)
    assert [(one.world, one.way) for one in found.steps] == [
        (w, way) for w in (2, 4) for way in ("plan", "ring", "all-gather", "ulysses")
    ]
    made = plan(layers, 1024, 4, heads=8, chunk=64, granule=16, rates=sd.parallel.Rates(1.0, 1.0))
    received = sum(made.traffic(name).sum(0) for name in made.names)
    told = found.steps[4]
    assert told.bytes == made.received * RATES["bandwidth"] and told.imbalance == pytest.approx(made.imbalance)
    assert told.seconds == pytest.approx(max(a + b for a, b in zip(made.work, received.tolist(), strict=True)))
    assert found.steps[5].bytes == 2 * 768 * RATES["bandwidth"], "a ring sends every key, for both layers"


def test_ulysses_ends_where_heads_do() -> None:
    assert steps(CAUSAL, 16)["ulysses"].refused == "16 ranks for 8 heads"
    assert steps(CAUSAL, 5)["ulysses"].imbalance == pytest.approx(2 * 5 / 8)


def test_heads_are_those_of_the_pattern() -> None:
    window = (CAUSAL & (sd.q_idx - sd.kv_idx < sd.table("win")[sd.h])).bind(win=torch.tensor([4] * 6))
    found = simulate(window, 512, 2, chunk=128)
    assert (found.heads, found.kv_heads) == (6, 6)
    assert (lambda one: (one.heads, one.kv_heads))(simulate(CAUSAL, 512, 2, chunk=128)) == (32, 8)


@pytest.mark.parametrize(("words", "message"), [
    ({"kv_heads": 3}, "kv_heads must divide heads, 8; got 3"),
    ({"flops": 0.0}, "flops must be a positive number, a second; got 0.0"),
    ({"bandwidth": float("inf")}, "bandwidth must be a positive number"),
    ({"head_dim": 0}, "head_dim must be a whole number of at least 1; got 0"),
    ({"worlds": []}, "worlds must be a number of ranks, or several"),
])  # fmt: skip
def test_numbers_that_do_not_fit_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(sd.ArgumentError, match=message):
        simulate(CAUSAL, 1024, **{"worlds": 2, **WORDS, **RATES, **words})


def test_it_is_text_data_and_a_picture() -> None:
    found = simulate(CAUSAL, 1024, [4, 16], **WORDS)
    assert isinstance(found, Simulation) and repr(found) == "<Simulation of 1024 tokens on 4, 16 ranks>"
    told = found.to_dict()
    assert told["report"] == "Simulation" and told["steps"][0]["way"] == "plan" and told["steps"][-1]["refused"]
    text = str(found)
    assert len(text.splitlines()) == 3 + 8 and "16 ranks for 8 heads" in text
    pytest.importorskip("matplotlib")
    figure = found.plot()
    lines = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert lines == {"plan": [4, 16], "ring": [4, 16], "all-gather": [4, 16], "ulysses": [4]}
    with pytest.raises(sd.PatternError, match="theme must be"):
        found.plot(theme="blue")
