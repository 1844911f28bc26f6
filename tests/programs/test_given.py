"""Choices and scores made elsewhere: lists, bitmaps, scores of blocks and of keys, checked, and as those that are made here."""

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
LISTS = sd.given(sd.input("blocks", "batch one queries width"), unit=4)
BITS = sd.given(sd.input("bits", "batch one queries keys/4"))


@pytest.fixture(scope="module")
def problem() -> dict[str, Tensor]:
    return {"q": 2 * numbers(85, 2, 26, 8)[None], "k": numbers(86, 1, 26, 8)[None], "v": numbers(87, 1, 26, 8)[None]}


def as_lists(bits: Tensor, seed: int = 0) -> Tensor:
    """The same as lists, padded, in any order."""
    lists = torch.full((*bits.shape[:3], bits.shape[3] + 1), -1)
    for place in torch.cartesian_prod(*map(torch.arange, bits.shape[:3])):
        row = bits[tuple(place)].nonzero()[:, 0]
        lists[tuple(place)][1 : 1 + len(row)] = row[torch.randperm(len(row), generator=torch.Generator().manual_seed(seed))]
    return lists


@pytest.mark.parametrize("how", ["lists", "bitmap"])
def test_T26_blocks_of_four_tokens(backend: str, problem: Any, how: str) -> None:
    bits = (numbers(88, 26, 7) > 0.2)[None, None]
    named = {"blocks": as_lists(bits)} if how == "lists" else {"bits": bits}
    attn = sd.compile(sd.attend(CAUSAL & (LISTS if how == "lists" else BITS)), backend=backend)
    out, lse = attn(**problem, **named, return_lse=True)
    empty = (lse[0, 0] == -torch.inf).nonzero()[:, 0].tolist()
    assert empty == [0, 1, 2, 3, 9, 10, 11, 12, 16, 23] and not out[0, :, empty].any()
    assert abs(float(lse[0, 0, 25]) - 2.9267438166) < 1e-9 and abs(dig(out) - 0.5077640069) < 1e-8
    assert sd.analyse(attn.program, 26).causal == sd.PROVED


def test_lists_are_those_of_a_choice_made_here(backend: str, draw: Any, grads: Any, assert_close: Any) -> None:
    """What a layer chose is given to the next, in outputs and gradients; for heads of a group, weighed too."""
    scores = sd.dot(sd.q, sd.summary(sd.k, 4)).over_group("sum")
    ended = (kv_idx // 4 + 1) * 4 <= q_idx
    given = {"q": draw(2, 4, 29, 8), "k": draw(2, 2, 29, 8, seed=1), "v": draw(2, 2, 29, 8, seed=2)}
    made = sd.compile(sd.attend(ended & sd.top_k(scores, 3, name="made")), backend=backend)
    found = made.choices(**given)["made"]
    table = found if isinstance(found, Tensor) else found.table()
    again = sd.given(sd.input("blocks", "batch kv_heads queries width"), unit=4)
    for first, second in (
        (sd.top_k(scores, 3, among=ended), again),
        (sd.top_k(scores, 3, among=ended), sd.given(sd.input("bits", "batch kv_heads queries keys/4"))),
    ):
        named = {"blocks": as_lists(table, 3)} if second is again else {"bits": table}
        for weighed in (False, True):
            programs = [
                sd.attend(
                    ended & choice, normaliser=sd.per_chunk(choice, scores=sd.dot(sd.q, sd.summary(sd.k, 4))) if weighed else None
                )
                for choice in (first, second)
            ]
            old, new = (sd.compile(program, backend=backend) for program in programs)
            assert_close(new(**given, **named), old(**given))
            assert_close(tuple(grads(new, given | named)[x] for x in "qkv"), tuple(grads(old, given)[x] for x in "qkv"))


def test_given_blocks_of_queries(backend: str, draw: Any, assert_close: Any) -> None:
    bits = draw(2, 2, 8, 8, seed=4) > 0
    choice = sd.given(sd.input("bits", "batch heads queries/4 keys/4"), name="bits_given")
    t = {"q": draw(2, 2, 29, 8), "k": draw(2, 2, 29, 8, seed=1), "v": draw(2, 2, 29, 8, seed=2)}
    out = sd.compile(sd.attend(CAUSAL & choice), backend=backend)(**t, bits=bits)
    wide = bits.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :29, :29] & torch.ones(29, 29).tril().bool()
    logits = (t["q"] @ t["k"].mT * 8**-0.5).masked_fill(~wide, -torch.inf)
    assert_close(out, logits.softmax(-1).nan_to_num(0.0) @ t["v"])
    lists = sd.given(sd.input("lists", "batch heads queries/4 width"), 4)
    assert_close(sd.compile(sd.attend(CAUSAL & lists), backend=backend)(**t, lists=as_lists(bits)), out)


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([[0, 7]] * 26, "lists blocks of 4 keys by number, 0 to 6 here, and -1 for none; got 7"),
        ([[0, -2]] * 26, "got -2"),
        ([[0, 1]] * 25 + [[3, 3]], "names a block twice in the list of (batch entry, head, row) (0, 0, 25)"),
    ],
)
def test_lists_are_checked(backend: str, problem: Any, blocks: Any, words: str) -> None:
    attn = sd.compile(sd.attend(CAUSAL & LISTS), backend=backend)
    with pytest.raises(sd.TableError) as error:
        attn(**problem, blocks=torch.tensor(blocks)[None, None])
    assert words in str(error.value)


def test_types_and_rows_are_checked(backend: str, problem: Any) -> None:
    lists, bits = (sd.compile(sd.attend(CAUSAL & choice), backend=backend) for choice in (LISTS, BITS))
    wrong: list[tuple[Any, type[Exception], str]] = [
        (
            lambda: lists(**problem, blocks=torch.zeros(1, 1, 26, 2)),
            sd.TableError,
            "must list blocks for 26 rows as int32 or int64",
        ),
        (
            lambda: lists(**problem, blocks=torch.zeros(1, 1, 26, 2).bool()),
            sd.TableError,
            "A bitmap is declared with the axis keys/4",
        ),
        (lambda: bits(**problem, bits=torch.zeros(1, 1, 26, 7)), sd.TableError, "must be a bitmap of 26 rows, torch.bool"),
        (lambda: bits(**problem, bits=torch.zeros(1, 1, 26, 5).bool()), sd.ShapeError, "has size 5 for 'keys/4'; wanted 6 to 7"),
    ]
    for call, kind, words in wrong:
        with pytest.raises(kind) as error:
            call()
        assert words in str(error.value), str(error.value)
    out = bits(**problem, bits=torch.ones(1, 1, 26, 6).bool())  # the row of the incomplete last block left out
    assert torch.equal(out, sd.compile(sd.attend(CAUSAL & (kv_idx < 24)), backend=backend)(**problem)) or torch.allclose(
        out, sd.compile(sd.attend(CAUSAL & (kv_idx < 24)), backend="reference")(**problem)
    )


def test_declarations_are_checked() -> None:
    wrong: list[tuple[Any, str]] = [
        (lambda: sd.given(sd.input("x", "batch one queries width")), "say of how many keys, unit="),
        (
            lambda: sd.given(sd.input("x", "batch one queries keys/4"), 8),
            "says blocks of 4 keys; unit must be that or None, got 8",
        ),
        (lambda: sd.given(sd.input("x", "batch queries width"), 8), "given(): x must be an input with the axes"),
        (lambda: sd.given(sd.dot(sd.q, sd.k), 8), "given(): x must be an input"),
        (lambda: sd.given_scores(sd.input("x", "batch queries keys")), "given_scores(): x must be an input with the axes"),
        (
            lambda: sd.given_key_scores(sd.input("x", "batch heads queries")),
            "given_key_scores(): x must be an input with the axes",
        ),
        (lambda: sd.per_chunk(LISTS), "was chosen by nothing that is known here; say what weighs it, scores="),
    ]
    for make, words in wrong:
        with pytest.raises(sd.PatternError) as error:
            make()
        assert words in str(error.value), str(error.value)


# ---- scores --------------------------------------------------------------------------------------------------------------------------


def test_given_scores_choose_as_those_made_here(backend: str, draw: Any) -> None:
    """A gate that was made elsewhere, a head of the keys, with and without the row of the last block."""
    t = {"q": draw(2, 4, 30, 8), "k": draw(2, 2, 30, 8, seed=1), "v": draw(2, 2, 30, 8, seed=2)}
    means = torch.stack([x.mean(2) for x in t["k"].split(4, 2)], 2)
    made = sd.dot(sd.q, sd.summary(sd.k, 4)).over_group("sum")
    given_scores = sd.given_scores(sd.input("gate", "batch kv_heads queries keys/4"))
    gate = ((t["q"] @ means.repeat_interleave(2, 1).mT) * 8**-0.5).unflatten(1, (2, 2)).sum(2)
    for rule in (lambda s: sd.top_k(s, 3), lambda s: sd.threshold(s.softmax(CAUSAL), 0.2), lambda s: sd.top_p(2 * s - 1, 0.7)):
        old, new = (sd.compile(sd.attend(CAUSAL & rule(s)), backend=backend) for s in (made, given_scores))
        torch.testing.assert_close(new(**t, gate=gate), old(**t))
    few = sd.compile(sd.attend(CAUSAL & sd.top_k(given_scores, 3, name="few")), backend=backend)
    assert not any(7 in row for head in chosen(few, "few", **t, gate=gate[..., :7]) for row in head)
    with pytest.raises(sd.TableError, match="'gate' holds -inf; which blocks are candidates is said by masks"):
        few(**t, gate=gate.masked_fill(gate < 0, -torch.inf))


def test_given_scores_learn_as_weights(draw: Any, grads: Any, assert_close: Any) -> None:
    ended = (kv_idx // 4 + 1) * 4 <= q_idx
    by = sd.given_scores(sd.input("gate", "batch kv_heads queries keys/4"))
    factor = sd.input("w", "batch heads queries")
    picked = sd.top_k(by, 2, among=ended)
    program = sd.attend(ended & picked, normaliser=sd.per_chunk(picked, scores=factor * (by.relu() - by / 3)))
    t = {"q": draw(2, 4, 30, 8), "k": draw(2, 2, 30, 8, seed=1), "v": draw(2, 2, 30, 8, seed=2), "w": draw(2, 4, 30, seed=3)}
    t["gate"] = draw(2, 2, 30, 7, seed=5)
    tiled, reference = (sd.compile(program, backend=name) for name in ("tiled", "reference"))
    assert_close(tuple(grads(tiled, t).values()), tuple(grads(reference, t).values()))
    assert all(x.abs().sum() > 0 for x in grads(tiled, t).values())


def test_given_scores_of_keys(backend: str, draw: Any) -> None:
    """Sorted by them, and kept by them: as by the probe that they were taken from."""
    probe = sd.probe(sd.q, sd.k, rows=8, causal=True)
    t = {"q": draw(2, 2, 32, 8), "k": draw(2, 2, 32, 8, seed=1), "v": draw(2, 2, 32, 8, seed=2)}
    votes = sd.given_key_scores(sd.input("votes", "batch heads keys"))
    allow = ["selection reads later queries"]
    for make in (
        lambda s: sd.compact(sd.keep_tokens(s, tail=0.3, always=4), CAUSAL),
        lambda s: sd.compact(sd.keep_tokens(sd.smooth(s, 3), cover=0.6), CAUSAL),
        lambda s: sd.attend((o := sd.segment_sort(s, 8)).origin() <= q_idx, k=sd.take(sd.k, o), v=sd.take(sd.v, o)),
    ):
        old, new = (sd.compile(make(s), backend=backend, allow=allow) for s in (probe, votes))
        given = scores_of(old, probe, **t)
        torch.testing.assert_close(new(**t, votes=given), old(**t))
        with pytest.raises(sd.TableError, match="'votes' holds scores below 0"):
            new(**t, votes=-given)
        compared = any(node.function == "keep_tokens" for node in new.program.order)
        assert sd.analyse(new.program, 32).causal.status == ("REFUTED" if compared else "UNKNOWN")


# ---- at random -----------------------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=12)
def test_random_lists_beside_other_masks(data: st.DataObject) -> None:
    case = data.draw(kit.shapes(max_len=24, max_heads=4).filter(lambda c: c.q_offset + c.q_len <= c.kv_len))
    unit = data.draw(st.sampled_from((1, 2, 4)))
    heads = data.draw(st.sampled_from(("heads", "kv_heads", "one")))
    choice = sd.given(sd.input("blocks", f"batch {heads} queries width"), unit)
    other = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4)), 2)
    shapes = [CAUSAL & choice, CAUSAL & ~choice, CAUSAL & (choice | other), choice & other, (q_idx - kv_idx < 3) | choice]
    mask = data.draw(st.sampled_from(shapes))
    count, blocks = {"heads": case.heads, "kv_heads": case.kv_heads, "one": 1}[heads], -(-case.kv_len // unit)
    bits = torch.rand(
        case.batch, count, case.q_len, blocks, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    program = sd.Program(sd.attend(mask))
    assert read_program(program.text) == program
    q, k, v = data.draw(kit.inputs(case, dtype=torch.float64))
    kit.assert_matches_reference(
        sd.compile(program, backend="tiled"), q, k, v, q_offset=case.q_offset, blocks=as_lists(bits > 0.6, 1)
    )


def test_what_is_given_of_choices_is_cut_with_the_call() -> None:
    """Fewer keys: bits of an incomplete block still count, and lists name no block that is not there yet."""
    case = kit.AttentionCase(q_len=6, kv_len=6, head_dim=4, head_dim_v=4)
    for axes, choice in (
        ("batch heads queries keys/4", torch.tensor([[1, 0]] * 4 + [[0, 1], [1, 1]], dtype=torch.bool)),
        ("batch heads queries 2", torch.tensor([[0, -1], [1, 0], [0, 1], [1, 0], [-1, 1], [1, 0]])),
    ):
        program = sd.attend(CAUSAL & sd.given(sd.input("picked", axes), unit=4))
        done = kit.assert_prefill_equals_decode(
            sd.compile(program, backend="tiled"), case, chunks=(2,), picked=choice.expand(1, case.heads, 6, 2)
        )
        assert "growing cache" in done
