"""Keys and diagonals chosen for all queries of a head: vertical lines and slashes, votes, beside golden values and plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import kv_idx, kv_len, q_idx
from sparsedsl import testing as kit
from sparsedsl.program.effect_rules import LATER_QUERIES
from sparsedsl.program.program_text import read_program
from tests.programs.choices_recipe import dig, numbers, scores_of

Tensor = torch.Tensor
CAUSAL = kv_idx <= q_idx
ALLOW = [LATER_QUERIES]


@pytest.fixture(scope="module")
def prompt() -> dict[str, Tensor]:
    k = numbers(52, 3, 64, 8)
    k[0, :3] *= 3
    return {"q": 2 * numbers(51, 3, 64, 8)[None], "k": k[None], "v": numbers(53, 3, 64, 8)[None]}


VERT = sd.probe(sd.q, sd.k, rows=8, causal=True)
SLASH = sd.diagonals(sd.q, sd.k, rows=8)


def flags(attn: Any, label: str, **tokens: Tensor) -> list[list[int]]:
    """Head -> what was chosen."""
    return [row.nonzero()[:, 0].tolist() for row in attn.choices(**tokens)[label][0]]


def minference(vertical: int, slash: int) -> Any:
    """Columns and diagonals, of which two and four are forced."""
    lines = sd.top_k(VERT, vertical, forced=kv_idx < 2, name="lines")
    slashes = sd.top_k(SLASH, slash, forced=q_idx - kv_idx < 4, name="slashes")
    return sd.attend(CAUSAL & (lines | slashes))


def test_T14_both_add_up_to_one(backend: str, prompt: Any) -> None:
    attn = sd.compile(minference(6, 10), backend=backend, allow=ALLOW)
    for node in (VERT, SLASH):
        found = scores_of(attn, node, **prompt)
        assert found.shape == (1, 3, 64)
        torch.testing.assert_close(found.sum(2), torch.ones(1, 3, dtype=torch.float64))
    tokens = []
    for node in (VERT, SLASH):
        few = sd.compile(sd.attend(CAUSAL & sd.top_p(node, 0.9, name="few")), backend=backend, allow=ALLOW)
        tokens.append([len(head) for head in flags(few, "few", **prompt)])
    assert list(zip(*tokens, strict=True)) == [(54, 54), (53, 53), (52, 53)]


def test_T16_vertical_lines_and_slashes(backend: str, prompt: Any) -> None:
    attn = sd.compile(minference(6, 10), backend=backend, allow=ALLOW)
    assert flags(attn, "lines", **prompt)[1] == [0, 1, 6, 13, 23, 25]
    assert flags(attn, "slashes", **prompt)[1] == [0, 1, 2, 3, 16, 22, 28, 31, 37, 54]
    out = attn(**prompt)[0, 1]
    assert abs(dig(out) + 0.9050076748) < 1e-8
    t = torch.arange(64)
    apart = t[:, None] - t
    lines = torch.isin(t, torch.tensor([0, 1, 6, 13, 23, 25]))
    slashes = torch.isin(apart, torch.tensor([0, 1, 2, 3, 16, 22, 28, 31, 37, 54]))
    pairs = (apart >= 0) & (lines | slashes)
    assert int(pairs.sum()) == 705
    logits = (prompt["q"][0, 1] @ prompt["k"][0, 1].T * 8**-0.5).masked_fill(~pairs, -torch.inf)
    torch.testing.assert_close(out, logits.softmax(-1) @ prompt["v"][0, 1])
    named = sd.patterns.minference(6, 10, 8, columns=2, diagonals=4)
    torch.testing.assert_close(sd.compile(named, backend=backend, allow=ALLOW)(**prompt)[0, 1], out)
    # Fewer than are forced: the earlier of equal ones.
    assert flags(sd.compile(minference(6, 3), backend=backend, allow=ALLOW), "slashes", **prompt)[1] == [0, 1, 2]


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("mean", [[7, 8, 9, 21, 22, 25, 27, 28, 29, 30], [2, 10, 11, 12, 13, 23, 24, 25, 26, 27]]),
        ("max", [[5, 6, 7, 8, 9, 27, 28, 29, 30, 31], None]),
    ],
)
def test_T21_votes_of_the_last_queries(backend: str, how: str, wanted: Any) -> None:
    """SnapKV: what a prompt leaves to its continuation, and a mask over all keys that says the same."""
    votes = sd.smooth(sd.probe(sd.q, sd.k, rows=6, causal=True, keep="before"), 5, how)
    kept = sd.top_k(votes, 10, among=kv_idx < kv_len - 6, name="kept")
    prompt = {"q": 2 * numbers(71, 2, 40, 8)[None], "k": numbers(72, 2, 40, 8)[None], "v": numbers(73, 2, 40, 8)[None]}
    attn = sd.compile(sd.attend(CAUSAL & (kept | (kv_idx >= kv_len - 6))), backend=backend, allow=ALLOW)
    found = flags(attn, "kept", **prompt)
    assert all(other is None or one == other for one, other in zip(found, wanted, strict=True))
    if how == "max":
        return
    stays = sd.table("stays", dtype=bool)
    later = sd.compile(sd.attend(CAUSAL & (stays[sd.h, sd.minimum(kv_idx, 39)] | (kv_idx >= 34))), backend=backend)
    more = (torch.cat([prompt[x], numbers(n, 2, 3, 8)[None]], 2) for x, n in (("k", 74), ("v", 75)))
    out = later(2 * numbers(76, 2, 3, 8)[None], *more, q_offset=40, stays=attn.choices(**prompt)["kept"][0])
    assert abs(dig(out) - 0.0866095783) < 1e-8


def test_T20_lines_and_slashes_among_kept_tokens(backend: str, prompt: Any) -> None:
    """Tokens dropped a head, and lines and slashes among those that are kept, whose last queries probe."""
    seen = sd.probe(sd.q, sd.k, rows=8, causal=True, keep="before")
    tokens = sd.keep_tokens(seen, tail=0.3, least=8, always=8)
    inside = sd.attend(CAUSAL & (sd.top_p(VERT, 0.7, forced=kv_idx < 1) | sd.top_p(SLASH, 0.7, forced=q_idx - kv_idx < 1)))
    out = sd.compile(sd.compact(tokens, inside), backend=backend, allow=ALLOW)(**prompt)
    kept = sd.compile(sd.compact(tokens, CAUSAL), backend=backend, allow=ALLOW).choices(**prompt)["keep_tokens"][0]
    for head, rows in enumerate(kept):
        few = {name: x[:, head : head + 1, rows] for name, x in prompt.items()}
        alone = sd.compile(inside, backend="reference", allow=ALLOW)(**few)
        torch.testing.assert_close(out[0, head, rows], alone[0, 0])
        rest = torch.ones(64).bool().scatter(0, rows, False)
        assert not out[0, head, rest].any() and rest.any()


# ---- at random, beside loops ---------------------------------------------------------------------------------------------------------


def by_loops(q: Tensor, k: Tensor, rows: int, offset: int, distances: bool) -> Tensor:
    """Scores of keys or distances of one head, as plain sums."""
    found = torch.zeros(len(k), dtype=q.dtype)
    probing = range(max(0, len(q) - rows), len(q))
    for i in probing:
        position = offset + i
        mass = (k[: position + 1] @ q[i] * q.shape[1] ** -0.5).softmax(0)
        for j, part in enumerate(mass):
            place = position - j if distances else j
            if place < len(k):
                found[place] += part / len(probing)
    return found


@given(st.data())
@settings(max_examples=15)
def test_choices_of_keys_at_random(data: st.DataObject) -> None:
    case = data.draw(kit.shapes(max_len=20, max_heads=4).filter(lambda c: c.q_offset + c.q_len <= c.kv_len))
    distances, rows = data.draw(st.booleans()), data.draw(st.integers(1, 5))
    scores: Any = sd.diagonals(sd.q, sd.k, rows=rows) if distances else sd.probe(sd.q, sd.k, rows=rows, causal=True)
    place = q_idx - kv_idx if distances else kv_idx
    among = data.draw(
        st.sampled_from([(None, lambda n: True), (place % 3 != 1, lambda n: n % 3 != 1), (place < 9, lambda n: n < 9)])
    )
    forced = data.draw(
        st.sampled_from([(None, lambda n: False), (place < 2, lambda n: n < 2), (place % 5 == 1, lambda n: n % 5 == 1)])
    )
    count, share = data.draw(st.sampled_from([(1, None), (3, None), (40, None), (None, 0.4), (None, 0.9), (None, 1.0)]))
    words: dict[str, Any] = {"among": among[0], "forced": forced[0], "name": "few"}
    few = (
        sd.top_k(scores, count, **words)
        if count
        else sd.top_p(scores, share, inclusive=(inclusive := data.draw(st.booleans())), **words)
    )
    program = sd.Program(sd.attend(CAUSAL & (few | (q_idx == kv_idx))))
    assert read_program(program.text) == program
    q, k, v = data.draw(kit.inputs(case, dtype=torch.float64))
    attn = sd.compile(program, backend="tiled", allow=ALLOW)
    kit.assert_matches_reference(attn, q, k, v, q_offset=case.q_offset)
    found = attn.choices(q, k, v, q_offset=case.q_offset)["few"]
    for b, h in ((b, h) for b in range(case.batch) for h in range(case.heads)):
        height = by_loops(q[b, h], k[b, h * case.kv_heads // case.heads], rows, case.q_offset, distances).tolist()
        candidates = [n for n in range(case.kv_len) if among[1](n)]
        best = sorted(candidates, key=lambda n: (-round(height[n], 12), n))
        if count:
            first = [n for n in candidates if forced[1](n)]  # by number
            wanted = {*[*first, *(n for n in best if n not in first)][:count]}
        else:
            total, held, wanted = (
                sum(height[n] for n in candidates) or 1.0,
                0.0,
                {n for n in candidates if forced[1](n) or share == 1},
            )
            for n in best:
                before, held = held, held + height[n] / total
                if abs(held - share) < 1e-9 or abs(before - share) < 1e-9:
                    return
                wanted |= {n} if (before if inclusive else held) < share else set()
        assert found[b, h].nonzero()[:, 0].tolist() == sorted(wanted)


# ---- what is said of them ------------------------------------------------------------------------------------------------------------


def test_choices_by_probes_read_later_queries() -> None:
    program = minference(6, 10)
    attn = sd.compile(program, backend="tiled")
    assert attn.effects == {LATER_QUERIES}
    verdict = sd.analyse(program, 64).causal
    assert verdict.status == "REFUTED" and "which looks at the last 8 queries" in verdict.reason
    q = torch.randn(1, 1, 16, 8, requires_grad=True)
    with pytest.raises(sd.UnsupportedError, match=LATER_QUERIES):
        attn(q, q, q)
    votes = sd.given_key_scores(sd.input("votes", "batch heads keys"))
    for told in (
        sd.top_k(votes, 3),
        sd.divergence(votes, votes) < 0.5,
    ):  # whoever scored them: later keys compete with earlier ones
        attn = sd.compile(sd.attend(CAUSAL & told))
        assert attn.effects == {LATER_QUERIES}
        verdict = sd.analyse(attn.program, 64).causal
        assert verdict.status == "REFUTED" and "compares all keys of the call with each other, later ones too" in verdict.reason


def test_errors_name_the_argument() -> None:
    wrong: list[tuple[Any, str]] = [
        (lambda: sd.top_k(VERT, 3, forced=q_idx == kv_idx), "forced says of keys which all queries of a head share"),
        (lambda: sd.top_k(SLASH, 3, forced=kv_idx < 3), "forced says of diagonals, and must depend on q_idx - kv_idx alone"),
        (lambda: sd.top_k(SLASH, 3, among=sd.top_k(VERT, 3).as_expression()), "among must read positions and tables alone"),
        (lambda: sd.top_k(VERT, 3, forced=kv_idx < 1, extra=True), "leave extra out, and raise count by as many"),
        (lambda: sd.top_k(VERT, 0), "top_k(): count must be a whole number of at least 1"),
        (lambda: sd.top_p(VERT, 0), "share must be above 0 and at most 1"),
        (lambda: sd.top_p(VERT, 0.5, unmet="none"), "leave both out"),
        (lambda: sd.threshold(VERT, 0.5), "threshold(): scores must come from dot()"),
        (lambda: sd.segment_sort(SLASH, 8), "must be one score a key"),
        (lambda: sd.smooth(SLASH, 3), "must be one score a key"),
        (lambda: sd.smooth(VERT, 3, "sum"), "smooth(): how must be one of 'mean', 'max'; got 'sum'"),
        (lambda: sd.diagonals(sd.q, sd.summary(sd.k, 4), rows=8), "one row a token"),
        (lambda: sd.diagonals(sd.q, sd.k, rows=0), "diagonals(): rows must be a whole number of at least 1"),
        (lambda: sd.diagonals(sd.q, sd.k, rows=8, scale=-1), "scale must be a positive number"),
        (
            lambda: sd.attend(sd.top_k(VERT, 3), k=sd.summary(sd.k, 4), v=sd.summary(sd.v, 4)),
            "says of keys whether they are chosen",
        ),
        (lambda: sd.top_k(VERT, 3)[sd.b, sd.h], "read with three indices"),
    ]
    for make, words in wrong:
        with pytest.raises(sd.PatternError) as error:
            make()
        assert words in str(error.value), str(error.value)
