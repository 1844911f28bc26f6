"""The parts of the search for layers, each against its slow, obvious form."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from sparsedsl.models.layer_search.candidates import Assignment, Candidate, assignment_of, candidates_from
from sparsedsl.models.layer_search.choosing import Chooser, options_of
from sparsedsl.models.layer_search.costs import layer_shapes
from sparsedsl.models.layer_search.judging import JUDGING, Judge, Measured, positions_of
from sparsedsl.models.layer_search.knapsack import frontier, in_units
from sparsedsl.models.layer_search.partial_forward import Body, Head
from sparsedsl.models.layer_search.searching import probe_rows
from sparsedsl.models.layers import attention_layers
from tests.models.families import FAMILIES, build, tokens

causal = kv_idx <= q_idx
NEAR, FAR = causal & (q_idx - kv_idx < 3), causal & (q_idx - kv_idx < 6)


# ---- knapsack -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_the_knapsack_finds_what_trying_everything_finds(seed: int) -> None:
    """Eight layers of one to four options; every budget."""
    chance = random.Random(seed)
    counts = [chance.randint(1, 4) for _ in range(8)]
    costs = [[chance.randint(0, 12) for _ in range(count)] for count in counts]
    losses = [[chance.choice([0.0, 0.5, chance.random()]) for _ in range(count)] for count in counts]
    every = [
        (sum(row[i] for row, i in zip(costs, picks, strict=True)), sum(row[i] for row, i in zip(losses, picks, strict=True)))
        for picks in itertools.product(*map(range, counts))
    ]
    best: dict[int, float] = {}
    for cost, loss in every:
        best[cost] = min(loss, best.get(cost, loss))
    wanted, least = [], float("inf")
    for cost in sorted(best):
        if best[cost] < least - 1e-12:
            wanted.append((cost, best[cost]))
            least = best[cost]
    front = frontier(costs, losses)
    kept = [0] + [i for i in range(1, len(front)) if front.losses[i] - front.losses[i - 1] > 1e-12]
    assert [(front.totals[i], pytest.approx(front.losses[i])) for i in kept][::-1] == wanted
    for place in range(len(front)):
        picks = front.options(place)
        assert sum(row[i] for row, i in zip(costs, picks, strict=True)) == front.totals[place]
        assert sum(row[i] for row, i in zip(losses, picks, strict=True)) == pytest.approx(front.losses[place])
    for limit in (0.0, 0.3, 1.0, 2.5, 9.0):
        affordable = [cost for cost, loss in every if loss <= limit]
        if affordable:
            assert front.totals[front.cheapest(limit)] == min(affordable)


def test_costs_in_units_are_exact_where_they_can_be_and_near_where_not() -> None:
    assert in_units([[4e12, 10e12], [2e12, 2e12]]) == [[0, 1], [0, 0]]
    costs = [[0.3, 1.7, 0.9], [2.2, 5.1], [0.0, 0.0]]
    whole = in_units(costs, units=1000)
    step = sum(max(row) - min(row) for row in costs) / 1000
    for row, units in zip(costs, whole, strict=True):
        assert all(abs(unit * step - (cost - min(row))) <= step / 2 + 1e-12 for cost, unit in zip(row, units, strict=True))
    with pytest.raises(sd.PatternError, match="at least 0"):
        in_units([[1.0, -1.0]])


# ---- choosing -------------------------------------------------------------------------------------------------------------------------


def test_choosing_ends_where_no_swap_is_cheaper_and_holds() -> None:
    won = [_won_by_swaps(seed) for seed in range(12)]
    assert any(won), "else this says nothing of swaps"


def _won_by_swaps(seed: int) -> bool:
    """Losses that do not add up: every pair of replaced layers loses more, or less, than the two alone."""
    chance = random.Random(seed)
    names = ["native", "a", "b", "c"]
    costs = {layer: {"native": 10.0, **{name: float(chance.randint(1, 9)) for name in names[1:]}} for layer in range(5)}
    losses = {layer: {"native": 0.0, **{name: chance.random() for name in names[1:]}} for layer in range(5)}
    pairs = {pair: chance.uniform(-0.3, 0.6) for pair in itertools.combinations(range(5), 2)}

    def lost(choice: dict[int, str]) -> float:
        alone = sum(losses[layer][name] for layer, name in choice.items())
        replaced = [layer for layer, name in choice.items() if name != "native"]
        return max(alone + sum(pairs[pair] for pair in itertools.combinations(replaced, 2)), 0.0)

    def run(assignment: Assignment) -> Measured:
        return Measured(1, lost({**dict.fromkeys(range(5), "native"), **dict(assignment)}), 0.0, 0.0, 0.0, 0.0, 0.0)

    limit = 1.0
    chooser, options = Chooser(sd.models.Kl(limit), costs, losses, run, most=500), options_of(costs)
    table = [[costs[layer][name] for name in some] for layer, some in enumerate(options)]
    front = frontier(in_units(table), [[losses[layer][name] for name in some] for layer, some in enumerate(options)])
    choice = chooser.chosen(front, options)
    assert lost(choice) <= limit and chooser.complete
    expected = {layer: [name for name in names if costs[layer][name] < costs[layer][choice[layer]]] for layer in choice}
    for layer, cheaper in expected.items():
        for name in cheaper:
            other = {**choice, layer: name}
            hopeless = assignment_of(other) not in chooser.tried
            assert hopeless or lost(other) > limit, other
    return chooser.cost(choice) < min(chooser.cost(one) for one in _along(front, options, chooser))


def _along(front: Any, options: Any, chooser: Chooser) -> list[dict[int, str]]:
    """The assignments of the frontier that were run and hold, and the model itself."""
    found = [dict.fromkeys(range(5), "native")]
    for place in range(len(front)):
        choice = {layer: names[option] for layer, (names, option) in enumerate(zip(options, front.options(place), strict=True))}
        measured = chooser.tried.get(assignment_of(choice))
        if measured is not None and chooser.holds(measured):
            found.append(choice)
    return found


# ---- judging --------------------------------------------------------------------------------------------------------------------------

# A plain one, a soft cap after the head, outputs with fields of their own (experts, cross attention), a decoder inside, no base of its own.
FAMILIES_JUDGED = ["llama", "gemma2", "gpt_oss", "gpt2", "opt", "llama4"]


def judge_of(model: Any, rows: torch.Tensor, positions: list[torch.Tensor]) -> Judge:
    return Judge(model, attention_layers(model), candidates_from({"near": NEAR, "far": FAR}), rows, positions, "reference")


@pytest.mark.parametrize("family", FAMILIES_JUDGED)
def test_sums_are_those_of_whole_logits(family: str) -> None:
    model, rows = build(family), tokens(2, 19)
    at = positions_of(rows, 5, 9, seed=3)
    judge = judge_of(model, rows, at)
    masks = {"near": NEAR, "far": FAR}
    with torch.no_grad():
        own = model(rows).logits.double()
    assignments = [(), ((0, "near"),), ((1, "far"),), ((0, "far"), (1, "near"))]
    with JUDGING.using(logits=own.shape[-1] * 4, together=2):
        for number in range(2):
            for assignment, sums in zip(assignments, judge.row(number, assignments), strict=True):
                with (
                    sd.models.apply(model, {layer: masks[name] for layer, name in assignment}, backend="reference"),
                    torch.no_grad(),
                ):
                    other = model(rows[number : number + 1]).logits.double()[0, at[number]]
                mine, following = own[number, at[number]], rows[number, at[number] + 1]
                p, q = mine.log_softmax(-1), other.log_softmax(-1)
                kl = (p.exp() * (p - q)).sum(-1)
                loss = torch.nn.functional.cross_entropy(other, following, reduction="none")
                change = loss - torch.nn.functional.cross_entropy(mine, following, reduction="none")
                wanted = [9, kl.sum(), kl.square().sum(), loss.sum(), change.sum(), change.square().sum()]
                for found, want in zip(sums.numbers(), wanted, strict=False):
                    assert found == pytest.approx(float(want), rel=1e-3, abs=2e-4)
                assert sums.right == int((other.argmax(-1) == following).sum())
                assert (sums.kl == 0) == (assignment == ())


@pytest.mark.parametrize("family", FAMILIES_JUDGED)
def test_a_forward_that_begins_later_gives_the_same(family: str) -> None:
    model, ids = build(family), tokens(1, 23)
    body = Body(model, attention_layers(model), ids)
    assert body.resumes
    ran: list[int] = []
    for number, block in enumerate(body.blocks):
        inner = next(
            module for name, module in block.named_modules() if name.endswith(("mlp", "fc1", "norm2", "feed_forward", "norm"))
        )
        inner.register_forward_hook(lambda *_, number=number: ran.append(number))
    with torch.no_grad():
        whole, recorded = body.recorded(ids, [0, 1])
        ran.clear()
        assert torch.equal(body.hidden_from(ids, 1, recorded), whole)
    assert 0 not in ran and 1 in ran
    assert "forward" not in vars(body.blocks[0])


def test_a_model_that_hands_on_more_than_hidden_states_runs_whole() -> None:
    """The second layer reads what the first has left behind while it ran."""
    model, ids = build("llama"), tokens(1, 23)
    first, second = model.model.layers
    own = second.forward
    first.mlp.register_forward_hook(lambda module, args, output: setattr(first, "left", output.mean()))

    def forward(hidden: torch.Tensor, *args: Any, **words: Any) -> Any:
        return own(hidden + vars(first).pop("left"), *args, **words)

    second.forward = forward
    body = Body(model, attention_layers(model), ids)
    vars(first).pop("left", None)
    assert not body.resumes
    with torch.no_grad():
        whole, recorded = body.recorded(ids, [1])
        assert torch.equal(body.hidden_from(ids, 1, recorded), whole) and recorded == {}


def test_the_head_is_the_models_own() -> None:
    model, ids = build("gemma2"), tokens(1, 11)
    with torch.no_grad():
        head = Head(model, Body(model, attention_layers(model), ids), ids)
        hidden = model.model(ids).last_hidden_state[0]
        torch.testing.assert_close(head(hidden[3:7]), model(ids).logits[0, 3:7])
    assert head.words == model.config.vocab_size


def test_means_and_their_errors() -> None:
    torch.manual_seed(0)
    model, rows = build("llama"), tokens(3, 40)
    at = positions_of(rows, 10, None, seed=0)
    assert all(torch.equal(row, torch.arange(10, 39)) for row in at)
    judge = judge_of(model, rows, at)
    found = Measured.of(next(iter(judge.row(number, [((1, "near"),)]))) for number in range(3))
    with torch.no_grad():
        p = model(rows).logits.double().log_softmax(-1)[:, 10:-1]
        with sd.models.apply(model, {1: NEAR}, backend="reference"):
            q = model(rows).logits.double().log_softmax(-1)[:, 10:-1]
    kl = (p.exp() * (p - q)).sum(-1).flatten()
    assert found.positions == 87
    assert found.kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.kl_error == pytest.approx(kl.std().item() / 87**0.5, rel=1e-3)


def test_positions_are_drawn_once_and_lie_behind_the_warm_up() -> None:
    rows = tokens(4, 30)
    some = positions_of(rows, 8, 6, seed=0)
    assert all(len(row) == 6 and row.unique().equal(row) and 8 <= row.min() and row.max() <= 28 for row in some)
    assert all(map(torch.equal, some, positions_of(rows, 8, 6, seed=0)))
    assert not torch.equal(some[0], some[1])


def test_the_probe_repeats_tokens_of_the_text() -> None:
    text = tokens(2, 30)
    rows, distance = probe_rows(text)
    assert rows.shape == (2, 29) and distance == 14
    assert torch.equal(rows[:, 1:15], rows[:, 15:]) and set(rows.flatten().tolist()) <= set(text.flatten().tolist())
    assert not torch.equal(rows[0], rows[1])


# ---- candidates and costs -------------------------------------------------------------------------------------------------------------

KEEP = sd.table("keep", dtype=bool)[kv_idx].bind(keep=torch.arange(40) % 5 == 0)
SLOPE = sd.table("slope", dtype=float)[sd.h].bind(slope=torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "value",
    [
        True,
        NEAR | (KEEP & causal),
        sd.attend(NEAR, sd.score - SLOPE * (q_idx - kv_idx), sink=0.5, scale=0.3, heads=4),
        sd.patterns.moba(chunk=4, top_k=2),
        sd.patterns.ring_linear([0.9, 0.5, 0.8, 0.99]),
        sd.attend(causal & (sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4)), 2) | KEEP)),
    ],
    ids=["all", "table in a mask", "pattern", "moba", "ring", "table in a program"],
)
def test_candidates_come_back_from_json(value: Any) -> None:
    (candidate,) = candidates_from({"one": value}).values()
    again = Candidate.from_json("one", candidate.as_json())
    assert (again.kind, again.text, again.fingerprint) == (candidate.kind, candidate.text, candidate.fingerprint)
    assert again.as_json() == candidate.as_json() and type(again.value) is type(candidate.value)
    for name, tensor in again.value.bound.items():
        assert torch.equal(tensor, candidate.value.bound[name]) and tensor.dtype == candidate.value.bound[name].dtype


def test_a_candidate_is_another_one_with_other_tables() -> None:
    table = sd.table("keep", dtype=bool)[kv_idx] & causal
    one, two = candidates_from(
        {"a": table.bind(keep=torch.ones(9, dtype=bool)), "b": table.bind(keep=torch.zeros(9, dtype=bool))}
    ).values()
    assert one.fingerprint != two.fingerprint


WIDTHS = {"deepseek_v3": (12, 8)}


@pytest.mark.parametrize("family", ["llama", "llama_mqa", "gpt_oss", "gpt2", "deepseek_v3"])
def test_shapes_are_those_that_attention_gets(family: str) -> None:
    model, ids = FAMILIES[family]().eval(), tokens(1, 4)
    config = model.config.get_text_config()
    layers = attention_layers(model)
    with torch.no_grad():
        before = model(ids).logits
        shapes = layer_shapes(model, layers, ids)
        assert torch.equal(model(ids).logits, before), "the model is as it was"
    assert set(shapes) == set(layers)
    for shape in shapes.values():
        assert shape.heads == config.num_attention_heads and shape.item == 4
        assert shape.kv_heads == getattr(config, "num_key_value_heads", None) or shape.kv_heads == shape.heads
        assert (shape.head_dim, shape.value_dim) == WIDTHS.get(family, (8, 8))
