"""Windows that overlap, and blocks chosen by their mass: NSA as published, InfLLM v2, beside golden values and plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from sparsedsl import testing as kit
from sparsedsl.selection.derived_scores import OverlapScores
from sparsedsl.selection.scores import TensorScores
from tests.programs.choices_recipe import chosen, dig, numbers, scores_of

Tensor = torch.Tensor
CAUSAL, DONE = kv_idx <= q_idx, kv_idx * 4 + 8 <= q_idx + 1
FORCED = (kv_idx < 16) | (q_idx // 16 - kv_idx // 16 < 2)
KC = sd.input("kc", "batch kv_heads keys/8+4 head_dim")
VC = sd.summary(sd.v, 8, stride=4)
PAID = sd.dot(sd.q, KC).softmax(DONE)


def phi(x: Tensor) -> Tensor:
    """A row for each window of eight keys: a perceptron of all their entries."""
    rows = [x[:, c : c + 8] + numbers(34, 8, 8) for c in range(0, x.shape[1] - 7, 4)]
    flat = torch.stack(rows, 1).flatten(2) if rows else x.new_zeros(x.shape[0], 0, 64)
    return (flat @ numbers(35, 64, 6) + numbers(36, 6)).relu() @ numbers(37, 6, 8)


@pytest.fixture(scope="module")
def tokens() -> dict[str, Tensor]:
    k = numbers(32, 2, 70, 8)
    made = {"q": 2 * numbers(31, 4, 70, 8), "k": k, "v": numbers(33, 2, 70, 8), "kc": 0.2 * phi(k)}
    return {name: x[None] for name, x in made.items()}


def branch(picked: Any) -> Any:
    """The second branch of NSA."""
    return sd.attend(CAUSAL & picked)


def picks(count: int = 4, how: str = "strips") -> Any:
    """Its choice."""
    return sd.top_k(PAID.over_group("sum").overlap(16, how), count, forced=FORCED, name="picks")


def test_T07_windows(backend: str, tokens: Any) -> None:
    kc = phi(tokens["k"][0])
    assert kc.shape == (2, 16, 8)
    assert abs(float(kc[1, 15, 0]) - 2.2551013360) < 1e-9 and abs(dig(kc) - 1.213516796) < 1e-8
    attn = sd.compile(sd.attend(DONE, k=KC, v=VC), backend=backend)
    assert abs(dig(scores_of(attn, VC, **tokens) if backend == "reference" else means(attn, tokens)) + 1.240237891) < 1e-8


def means(attn: Any, tokens: Any) -> Tensor:
    from tests.programs.choices_recipe import value_of

    return value_of(attn, VC, **tokens)


def test_T08_attention_to_windows(backend: str, tokens: Any) -> None:
    attn = sd.compile(sd.attend(DONE, k=KC, v=VC), backend=backend)
    mass = scores_of(sd.compile(branch(picks()), backend=backend), PAID, **tokens)[0]
    assert abs(float(mass[0, 40, 0]) - 0.1032822787) < 1e-9 and abs(dig(mass) + 0.8944060629) < 1e-8
    out = attn(**tokens)
    assert abs(dig(out) + 2.562412536) < 1e-8 and not out[:, :, :7].any()


def test_T09_blocks_by_strips(backend: str, tokens: Any) -> None:
    node = PAID.over_group("sum").overlap(16)
    mass = scores_of(sd.compile(branch(picks()), backend=backend), node, **tokens)[0]
    wanted = torch.tensor([0.9255176987, 1.1915165419, 1.1868130183, 0.6961527411, 0.0], dtype=torch.float64)
    assert torch.allclose(mass[0, 60], wanted, atol=1e-9)
    one = OverlapScores(TensorScores(torch.eye(16)[None, None]), 2, 4, "strips", 5).scores()[0, 0]
    assert one[3:8, 1].tolist() == [1, 2, 2, 2, 1] and not one[8:, 1].any() and not one[:3, 1].any()


def test_T10_choices(backend: str, tokens: Any) -> None:
    found = chosen(sd.compile(branch(picks()), backend=backend), "picks", **tokens)
    assert (found[0][69], found[1][69], found[0][64]) == ([0, 2, 3, 4], [0, 1, 3, 4], [0, 1, 3, 4])
    total = sum((g + 1) * (t + 1) * (u + 1) for g, rows in enumerate(found) for t, row in enumerate(rows) for u in row)
    assert total == 57567
    assert chosen(sd.compile(branch(picks(3)), backend=backend), "picks", **tokens)[0][69] == [0, 3, 4]


def test_T11_the_whole_of_nsa(backend: str, tokens: Any, grads: Any, assert_close: Any) -> None:
    gate = sd.input("gate", "batch heads queries 3")
    nsa = sd.mix(sd.attend(DONE, k=KC, v=VC), branch(picks()), sd.patterns.sliding_window(9), weights=gate)
    given = tokens | {"gate": torch.sigmoid(numbers(38, 4, 70, 3))[None]}
    attn = sd.compile(nsa, backend=backend)
    out = attn(**given)
    assert abs(float(out[0, 3, 69, 0]) - 0.0498656548) < 1e-9 and abs(dig(out) + 7.451846491) < 1e-8
    assert sd.analyse(attn.program, 70).causal == sd.PROVED
    other = sd.compile(nsa, backend="reference")
    assert_close(tuple(grads(attn, given).values()), tuple(grads(other, given).values()))


def test_T12_blocks_by_their_greatest_window(backend: str, tokens: Any) -> None:
    node = PAID.over_group("sum").overlap(16, "max")
    attn = sd.compile(branch(picks(how="max")), backend=backend)
    wanted = torch.tensor([0.1547907292, 0.2070838585, 0.1559646056, 0.1559646056, 0.0], dtype=torch.float64)
    assert torch.allclose(scores_of(attn, node, **tokens)[0, 0, 60], wanted, atol=1e-9)
    found, sums = (chosen(sd.compile(branch(picks(how=how)), backend=backend), "picks", **tokens) for how in ("max", "strips"))
    assert (found[0][69], found[1][69]) == ([0, 2, 3, 4], [0, 2, 3, 4])
    assert sum(a != b for one, other in zip(found, sums, strict=True) for a, b in zip(one, other, strict=True)) == 4


def test_T13_windows_are_complete(backend: str) -> None:
    for count, wanted in {7: 0, 8: 1, 11: 1, 12: 2, 70: 16}.items():
        x = numbers(1, 1, 1, count, 8)
        attn = sd.compile(sd.attend(DONE, k=sd.summary(sd.k, 8, stride=4), v=VC), backend=backend)
        out = attn(x, x, x)
        assert phi(x[0]).shape[1] == wanted == max(0, (count - 8) // 4 + 1)
        assert not out[:, :, :7].any() and (count < 8 or out[:, :, 7].any())
        with pytest.raises(sd.ShapeError, match=f"size {wanted + 1} for 'keys/8\\+4'; wanted {wanted}"):
            sd.compile(sd.attend(DONE, k=KC, v=VC), backend=backend)(x, x, x, kc=numbers(2, 1, 1, wanted + 1, 8))
        picked = sd.compile(branch(picks()), backend=backend)(x, x, x, kc=0.2 * phi(x[0])[None])  # without a window at all too
        assert picked.isfinite().all()


@pytest.mark.parametrize("compiled", ["tiled", "auto"])
def test_warm_calls_without_a_window_are_ordinary_ones(compiled: str) -> None:
    attn = sd.compile(sd.attend(DONE, k=sd.summary(sd.k, 8, stride=4), v=VC), backend=compiled)
    with torch.no_grad():
        for count in (30, 31, 5, 7, 8, 30):
            x = torch.ones(1, 1, count, 8)
            out = attn(x[:, :, -1:], x, x, q_offset=count - 1)
            assert torch.equal(out, torch.full_like(out, float(count >= 8)))


@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 4), st.sampled_from(["strips", "max"]), st.integers(0, 99))
@settings(max_examples=40)
def test_pieces_of_blocks_are_those_of_the_whole(windows: int, length: int, size: int, how: str, seed: int) -> None:
    """Against a loop over windows and blocks, whole and in any piece."""
    blocks = -(-(windows + length - 1) // size) + seed % 3
    mass = torch.rand(1, 2, 3, windows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wanted = torch.zeros(1, 2, 3, blocks, dtype=torch.float64)
    for u in range(blocks):
        for c in range(windows):
            shared = len(set(range(u * size, (u + 1) * size)) & set(range(c, c + length)))
            part = mass[..., c]
            wanted[..., u] = (
                wanted[..., u] + shared * part if how == "strips" else torch.maximum(wanted[..., u], part * (shared > 0))
            )
    source = OverlapScores(TensorScores(mass), length, size, how, blocks)
    torch.testing.assert_close(source.scores(), wanted)
    for start in range(0, blocks, 2):
        part = source.block(slice(1, 3), slice(start, min(start + 2, blocks)))
        torch.testing.assert_close(part, wanted[:, :, 1:3, start : start + 2])
    if blocks:
        places = torch.arange(blocks).flip(0).expand(1, 1, 3, -1)
        torch.testing.assert_close(source.at(places), wanted.flip(3))


def test_windows_learn(assert_close: Any, grads: Any, draw: Any) -> None:
    """Through means of windows gradients reach the keys; a later key moves nothing."""
    own = sd.summary(sd.k, 8, stride=4), sd.summary(sd.v, 8, "max", stride=4)
    seen = sd.dot(sd.q, own[0]).softmax(DONE).over_group("sum").overlap(8)
    program = sd.joint(sd.attend(DONE, k=own[0], v=own[1]), sd.attend(CAUSAL & sd.top_k(seen, 2, forced=kv_idx < 8)))
    given = {"q": draw(2, 4, 29, 8), "k": draw(2, 2, 29, 8, seed=1), "v": draw(2, 2, 29, 8, seed=2)}
    tiled, reference = (sd.compile(program, backend=name) for name in ("tiled", "reference"))
    assert_close(tuple(grads(tiled, given).values()), tuple(grads(reference, given).values()))
    case = kit.AttentionCase(heads=4, kv_heads=2, q_len=29, kv_len=29)
    kit.assert_causal(tiled, case)
    kit.assert_prefill_equals_decode(tiled, case, chunks=(5,))


def test_what_windows_are_not() -> None:
    windows, scores = sd.summary(sd.k, 8, stride=4), sd.dot(sd.q, KC)
    wrong: list[tuple[Any, str]] = [
        (lambda: sd.summary(sd.k, 8, stride=9), "at most block, which is 8"),
        (lambda: sd.summary(sd.q, 8, stride=4), "windows of keys"),
        (lambda: sd.summary(sd.k, 8, stride=4, pad="zero"), "with pad='valid'"),
        (lambda: sd.summary(windows, 2), "'keys/8+4' counts windows that overlap, and no blocks of tokens"),
        (lambda: sd.top_k(scores, 2), r"scores.softmax(...).overlap(64)"),
        (lambda: scores.regroup(2), "counts windows"),
        (lambda: scores.overlap(16), "overlap() joins mass of windows"),
        (lambda: scores.softmax().overlap(10), "must be multiples of their stride 4; got 10"),
        (lambda: sd.dot(sd.q, sd.summary(sd.k, 4)).softmax().overlap(16), "Blocks side by side are joined by regroup()"),
        (lambda: sd.bound(sd.q, windows, 2), "counts windows"),
        (lambda: sd.attend(sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4)), 2), k=windows, v=VC), "a row must lie in one of them"),
        (lambda: sd.input("x", "batch keys/4+8"), "windows are of keys, and begin at least once in their length"),
        (lambda: sd.input("x", "batch queries/8+4"), "windows are of keys"),
    ]
    for make, words in wrong:
        with pytest.raises(sd.PatternError) as error:
            make()
        assert words in str(error.value), str(error.value)


def test_windows_that_end_later_are_seen_by_the_proof() -> None:
    early = kv_idx * 4 + 7 <= q_idx + 1
    read = sd.attend(early, k=KC, v=VC)
    compared = branch(sd.top_k(sd.dot(sd.q, KC).softmax(early).over_group("sum").overlap(16), 2))
    verdict = sd.analyse(sd.Program(read), 70).causal
    assert verdict.status == "REFUTED" and verdict.witness.q_idx == 6
    verdict = sd.analyse(sd.Program(compared), 70).causal
    assert verdict.status == "REFUTED" and "a window of 8 keys may end after the query" in verdict.reason
