"""The search for layers: what it finds is within the bound and cannot be made cheaper by a swap; it resumes, refuses, and reloads."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsedsl as sd
from source_tree import ROOT
from sparsedsl import kv_idx, q_idx
from sparsedsl.models.layer_search.candidates import candidates_from
from tests.models.families import build, tokens

causal = kv_idx <= q_idx
WINDOWS = {"near": causal & (q_idx - kv_idx < 4), "middle": causal & (q_idx - kv_idx < 12), "far": causal & (q_idx - kv_idx < 30)}
ROWS = tokens(2, 48)


def llama(layers: int = 3) -> Any:
    """Weights large enough that windows show, small enough that some of them hold."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=89,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def searched(model: Any, candidates: Any = WINDOWS, rows: torch.Tensor = ROWS, **words: Any) -> Any:
    """A search that shows nothing."""
    words = {
        "bound": sd.models.Kl(0.05),
        "cost": "cache_bytes",
        "progress": False,
        "probe": False,
        "backend": "reference",
    } | words
    return sd.models.search(model, candidates, rows, **words)


def true_kl(model: Any, assignment: dict[int, Any], rows: torch.Tensor, first: int) -> float:
    """Mean KL over all positions from ``first`` on whose next token is there, from whole logits."""
    with torch.no_grad():
        own = model(rows).logits.double().log_softmax(-1)
        with sd.models.apply(model, assignment, backend="reference"):
            other = model(rows).logits.double().log_softmax(-1)
    return float((own.exp() * (own - other)).sum(-1)[:, first:-1].mean())


@pytest.fixture(scope="module")
def every_kl() -> dict[tuple[str, ...], float]:
    """All 64 assignments of the small model, by the name for each layer -> KL of a true run."""
    model, found = llama(), {}
    for names in itertools.product(["native", *WINDOWS], repeat=3):
        given = {layer: WINDOWS[name] for layer, name in enumerate(names) if name != "native"}
        found[names] = true_kl(model, given, ROWS, 12)
    return found


@pytest.mark.parametrize("nats", [0.008, 0.02, 0.06, 0.2])
def test_what_it_finds_holds_and_no_swap_of_one_layer_is_cheaper_and_holds(
    nats: float, every_kl: dict[tuple[str, ...], float]
) -> None:
    report = searched(llama(), bound=sd.models.Kl(nats))

    def cost(names: tuple[str, ...]) -> float:
        return sum(report.costs[layer][name] for layer, name in enumerate(names))

    chosen = tuple(report.assignment.values())
    assert report.kl == pytest.approx(every_kl[chosen], abs=1e-6)
    assert report.kl <= nats and report.holds and report.complete
    assert report.cost == cost(chosen) < report.native_cost
    for layer, name in itertools.product(range(3), ["native", *WINDOWS]):
        other = (*chosen[:layer], name, *chosen[layer + 1 :])
        assert cost(other) >= report.cost or every_kl[other] > nats, other
    best = min(cost(names) for names, kl in every_kl.items() if kl <= nats)
    assert report.cost <= 1.15 * best, "a local optimum that is far from the best of all 64"


def test_a_bound_on_perplexity_is_one_on_the_paired_loss() -> None:
    model = llama()
    report = searched(model, bound=sd.models.Perplexity(1.02))
    chosen = {layer: WINDOWS[name] for layer, name in report.assignment.items() if name != "native"}

    def loss() -> float:
        with torch.no_grad():
            logits = model(ROWS).logits[:, 12:-1].double()
        return torch.nn.functional.cross_entropy(logits.reshape(-1, 89), ROWS[:, 13:].reshape(-1)).item()

    own = loss()
    with sd.models.apply(model, chosen, backend="reference"):
        changed = loss()
    assert report.native.loss == pytest.approx(own, rel=1e-5) and report.measured.change == pytest.approx(changed - own, abs=1e-5)
    assert report.measured.ratio <= 1.02 and report.cost < report.native_cost
    assert report.kl <= report.bound.limit
    lucky = searched(model, bound=sd.models.Perplexity(1.02, with_kl=False))
    assert lucky.measured.ratio <= 1.02 and lucky.kl > lucky.bound.limit and lucky.cost < report.cost
    careful = searched(model, bound=sd.models.Perplexity(1.02, sigmas=2))
    assert careful.measured.change + 2 * careful.measured.change_error <= torch.tensor(1.02).log().item() + 1e-12
    assert careful.cost >= report.cost


def test_nothing_but_the_model_itself_within_a_bound_that_nothing_meets() -> None:
    report = searched(llama(), bound=sd.models.Kl(1e-9))
    assert set(report.assignment.values()) == {"native"} and report.cost == report.native_cost
    assert report.kl == 0 and report.holds
    with report.apply(model := llama()) as applied:
        assert applied.patterns == {} and applied.model is model


def test_candidates_that_cost_no_less_are_not_run() -> None:
    dear = {**WINDOWS, "everything": causal}
    report = searched(llama(), dear)
    assert all("everything" not in row and len(row) == 3 for row in report.singles.values())


def test_runs_of_whole_assignments_are_bounded_and_the_report_says_so() -> None:
    report = searched(llama(), bound=sd.models.Kl(0.02), evaluations=1)
    assert len(report.tried) == 1 and not report.complete and report.holds
    assert "before all swaps were run" in str(report)


# ---- costs ----------------------------------------------------------------------------------------------------------------------------


def test_costs_are_those_of_analyse_of_the_proofs_and_of_a_function() -> None:
    model, heads = llama(2), {"heads": 4, "head_dim": 8}
    flops = searched(model, cost="flops", length=512).costs
    assert flops[1] == {
        "native": sd.analyse(causal, 512, **heads).flops,
        **{name: sd.analyse(mask, 512, **heads).flops for name, mask in WINDOWS.items()},
    }
    ring = sd.patterns.ring_linear([0.5, 0.7, 0.9, 0.99])  # four states of 8 x 8
    kept = searched(model, {**WINDOWS, "ring": ring}, cost="cache_bytes", length=512).costs
    assert kept[0] == {"native": 512 * 2 * 16 * 4, "near": 3 * 128, "middle": 11 * 128, "far": 29 * 128, "ring": 4 * 8 * 8 * 4}
    asked = []

    def cost(layer: int, given: Any) -> float:
        asked.append((layer, given))
        return 10.0 if isinstance(given, sd.Pattern) else 1.0 + layer

    assert searched(model, cost=cost).costs[1] == {"native": 10.0, "near": 2.0, "middle": 2.0, "far": 2.0}
    assert asked[0] == (0, sd.attend(causal)) and [given.text for _, given in asked[1:4]] == [
        mask.text for mask in WINDOWS.values()
    ]


def test_prefill_times_are_of_the_layers_attention() -> None:
    model, calls = llama(2), []
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1) and None)
    report = searched(model, {"near": WINDOWS["near"]}, cost="prefill_time", length=40, layers=[1])
    assert set(report.costs) == {1} and all(0 < seconds < 5 for seconds in report.costs[1].values())
    assert report.cost_name == "prefill_time" and report.length == 40


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), True, "much"])
def test_a_cost_function_must_give_costs(wrong: Any) -> None:
    with pytest.raises(sd.PatternError, match=r"cost\(0, .*must be a number of at least 0"):
        searched(llama(1), cost=lambda layer, given: wrong)


# ---- files ----------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def forwards(model: Any, most: int | None = None) -> Iterator[list[int]]:
    """Counts forwards of the model's body; the one after ``most`` is interrupted, as by Ctrl-C."""
    count = [0]

    def begin(*_: Any) -> None:
        count[0] += 1
        if most is not None and count[0] > most:
            raise KeyboardInterrupt

    hook = model.base_model.register_forward_pre_hook(begin)
    try:
        yield count
    finally:
        hook.remove()


def test_a_search_that_was_broken_off_goes_on(tmp_path: Path) -> None:
    model, file = llama(), tmp_path / "kept" / "search.json"
    with forwards(model) as whole:
        wanted = searched(model)
    with pytest.raises(KeyboardInterrupt), forwards(model, most=whole[0] // 2):
        searched(model, resume=file)
    assert not [path for path in file.parent.iterdir() if path != file], "nothing half-written is left"
    assert 1 <= len(json.loads(file.read_text())["evaluations"])
    assert not hasattr(model.model.layers[0].self_attn, "_sparsedsl_binding"), "an interrupted search leaves no pattern behind"
    with forwards(model) as rest:
        found = searched(model, resume=file)
    assert found.assignment == wanted.assignment and found.kl == pytest.approx(wanted.kl, rel=1e-5)
    assert rest[0] < whole[0]
    with forwards(model) as nothing:
        again = searched(model, resume=file)
    assert again.tried == found.tried or [one.measured for one in again.tried] == [one.measured for one in found.tried]
    with forwards(model) as other:
        searched(model, bound=sd.models.Perplexity(1.5), resume=file)  # a bound is no part of what was judged
    assert nothing[0] <= other[0] < whole[0]


def test_a_file_of_another_search_is_refused_by_what_is_other(tmp_path: Path) -> None:
    model, file = llama(2), tmp_path / "search.json"
    searched(model, resume=file)

    def refused(*words: str, **changes: Any) -> None:
        arguments = {"model": model, "candidates": WINDOWS, "rows": ROWS} | changes
        with pytest.raises(sd.PatternError, match=r"search\.json") as caught:
            searched(**arguments, resume=file)
        assert all(word in str(caught.value) for word in words), caught.value

    refused("another text", rows=ROWS[:1])
    refused("another text", warm_up=20)
    refused("another candidate 'near'", candidates={**WINDOWS, "near": WINDOWS["middle"]})
    refused("another model", model=llama(3))
    changed = llama(2)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    refused("another weights", model=changed)
    kept = file.read_text()
    damaged = json.dumps({name: value for name, value in json.loads(kept).items() if name != "made_with"})
    for text in ("{", "[]", '{"format": "something else"}', damaged):
        file.write_text(text)
        refused("does not exist yet")
    file.write_text(kept)
    more = searched(model, {**WINDOWS, "farther": causal & (q_idx - kv_idx < 40)}, resume=file)
    assert "farther" in more.singles[0], "more candidates go on from the same file"


TABLE = sd.table("keep", dtype=bool)
KINDS = {
    "mask": causal & ((q_idx - kv_idx < 6) | TABLE[kv_idx].bind(keep=torch.arange(64) % 7 == 0)),
    "pattern": sd.attend(causal & (q_idx - kv_idx < 9), sd.score - 0.25 * (q_idx - kv_idx), sink=0.0, scale=0.5),
    "program": sd.patterns.moba(chunk=4, top_k=2),
    "program with a table": sd.attend(
        causal
        & (
            (q_idx - kv_idx < 6)
            | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4)), 2)
            | TABLE[kv_idx].bind(keep=torch.arange(64) % 7 == 0)
        )
    ),
}
RELOAD = """
import sys, torch, sparsedsl as sd
from transformers import LlamaForCausalLM
report = sd.models.SearchReport.load(sys.argv[1])
model = LlamaForCausalLM.from_pretrained(sys.argv[2]).eval()
with report.apply(model, backend="reference"), torch.no_grad():
    torch.save(model(torch.load(sys.argv[3])).logits, sys.argv[4])
print(report)
"""


def test_a_report_reloads_in_another_process_and_applies(tmp_path: Path) -> None:
    model = llama(4)
    texts = [candidate.value.text for candidate in candidates_from(KINDS).values()]

    def cost(layer: int, given: Any) -> float:
        """Each kind is the cheapest in one layer."""
        if given.text not in texts:
            return 9.0
        return 1.0 if texts.index(given.text) == layer else 5.0

    report = searched(model, KINDS, cost=cost, bound=sd.models.Kl(100.0), probe=True)
    assert list(report.assignment.values()) == list(KINDS)
    with torch.no_grad(), report.apply(model, backend="reference"):
        wanted = model(ROWS).logits
    paths = [tmp_path / name for name in ("report.json", "model", "ids.pt", "logits.pt")]
    report.save(paths[0])
    model.save_pretrained(paths[1])
    torch.save(ROWS, paths[2])
    shown = subprocess.run(
        [sys.executable, "-c", RELOAD, *map(str, paths)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    torch.testing.assert_close(torch.load(paths[3]), wanted, rtol=0, atol=0)
    assert shown.strip() == str(report).strip()
    again = sd.models.SearchReport.load(paths[0])
    assert again.singles == report.singles and again.tried == report.tried and again.frontier == report.frontier
    assert again.bound == report.bound and again.probe == report.probe and again.costs == report.costs
    with pytest.raises(sd.PatternError, match="4 attention layers; got a LlamaForCausalLM with 2"):
        report.apply(llama(2))
    damaged = {name: value for name, value in json.loads(paths[0].read_text()).items() if name != "costs"}
    (tmp_path / "damaged.json").write_text(json.dumps(damaged))
    with pytest.raises(sd.PatternError, match="damaged: KeyError: 'costs'"):
        sd.models.SearchReport.load(tmp_path / "damaged.json")
    with pytest.raises(sd.PatternError, match="no search report"):
        sd.models.SearchReport.load(paths[1] / "config.json")


# ---- what is shown --------------------------------------------------------------------------------------------------------------------


def test_it_draws_and_says_what_it_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = searched(llama(2), probe=True, progress=True)
    said = capsys.readouterr().err
    assert "search: single layers, 14 of 14" in said and "search: retrieval, 2 of 2" in said
    figure = report.plot_pareto(tmp_path / "a" / "pareto.png")
    assert (tmp_path / "a" / "pareto.png").stat().st_size > 5_000
    (axis,) = figure.axes
    chosen = next(line for line in axis.lines if line.get_label() == "chosen")
    assert chosen.get_xdata()[0] == pytest.approx(100 * report.cost / report.native_cost) and chosen.get_ydata()[0] == report.kl
    text = str(report)
    assert "2 of 2 attention layers searched, 3 candidates" in text and "retrieval" in text and "KL" in text
    assert text.count("*") >= 2


# ---- refusals -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"bound": 0.02}, sd.PatternError, "bound must be"),
        ({"candidates": {}}, sd.PatternError, "candidates must be a dict"),
        ({"candidates": [WINDOWS["near"]]}, sd.PatternError, "candidates must be a dict"),
        ({"candidates": {"native": causal}}, sd.PatternError, "names, texts other than 'native'"),
        ({"candidates": {"near": "causal"}}, sd.PatternError, "candidate 'near' must be"),
        ({"candidates": {"all": True}}, sd.UnsupportedError, "'all' sees later tokens"),
        ({"candidates": {"pbs": sd.patterns.pbs(4, 8)}}, sd.UnsupportedError, "'pbs' chooses by later queries"),
        ({"candidates": {"nha": sd.patterns.nha(4, 4)}}, sd.UnsupportedError, "reads the input"),
        ({"candidates": {"packed": sd.patterns.documents() & causal}}, sd.TableError, "doc"),
        ({"rows": ROWS[0]}, sd.ShapeError, "token ids (N, S)"),
        ({"rows": ROWS.float()}, sd.ShapeError, "token ids (N, S)"),
        ({"rows": ROWS + 89}, sd.ShapeError, "0 to 88"),
        ({"cost": "money"}, sd.PatternError, "'flops', 'cache_bytes', 'prefill_time'"),
        ({"layers": [7]}, sd.PatternError, "some of [0, 1, 2]"),
        ({"layers": []}, sd.PatternError, "some of [0, 1, 2]"),
        ({"warm_up": 47}, sd.PatternError, "warm_up must be a whole number, 0 to 46"),
        ({"positions": 0}, sd.PatternError, "positions must be"),
        ({"length": 1.5}, sd.PatternError, "length must be"),
        ({"evaluations": 0}, sd.PatternError, "evaluations must be"),
    ],
    ids=str,
)
def test_what_it_refuses(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        searched(llama(), **changes)
    assert words in str(caught.value)


def test_models_it_refuses() -> None:
    model = llama(1)
    with pytest.raises(sd.PatternError, match="training mode"):
        searched(model.train())
    with sd.models.apply(model.eval(), WINDOWS["near"]), pytest.raises(sd.PatternError, match="has patterns"):
        searched(model)
    with pytest.raises(sd.UnsupportedError, match="sees later tokens by itself"):
        searched(build("bert"))
    with pytest.raises(sd.UnsupportedError, match="causal language modelling"):
        searched(model.model)


@pytest.mark.parametrize(
    "make", [lambda: sd.models.Perplexity(1.0), lambda: sd.models.Kl(0), lambda: sd.models.Kl(0.1, sigmas=-1)]
)
def test_bounds_are_numbers_that_bound(make: Any) -> None:
    with pytest.raises(sd.PatternError, match="must be a number"):
        make()


# ---- hybrid layers as candidates -----------------------------------------------------------------------------------------------------

HYBRIDS = {
    "near": WINDOWS["near"],
    "nha": functools.partial(sd.models.NHA, slots=4, window=8),
    "hsa": functools.partial(sd.models.HSA, chunk=8, top_k=2),
    "moba": functools.partial(sd.models.MoBA, chunk=8, top_k=2),
    "dsa": functools.partial(sd.models.DSA, top_k=9, index_heads=2),
}


def converted_kl(model: Any, assignment: dict[int, Any], rows: torch.Tensor, first: int) -> float:
    """As :func:`true_kl`, of layers that are converted: without the search's own way to make and keep them."""
    with torch.no_grad():
        own = model(rows).logits.double().log_softmax(-1)
        torch.manual_seed(11)
        with sd.models.convert(model, assignment, backend="reference"):
            other = model(rows).logits.double().log_softmax(-1)
    return float((own.exp() * (own - other)).sum(-1)[:, first:-1].mean())


def test_hybrid_layers_are_judged_as_convert_makes_them_and_applied_as_such(tmp_path: Path) -> None:
    model = llama()
    report = searched(model, HYBRIDS, bound=sd.models.Kl(10.0), cost="flops", length=512)
    for name in ("nha", "hsa", "moba", "dsa"):
        wanted = converted_kl(model, {1: HYBRIDS[name]}, ROWS, 12)
        # Rows that the chosen chunks cover whole have no divergence but that of the model's float32.
        assert report.singles[1][name].kl == pytest.approx(wanted, rel=1e-4, abs=1e-7), name
    report.save(tmp_path / "found.json")
    again = sd.models.SearchReport.load(tmp_path / "found.json")
    assert {name: one.text for name, one in again.candidates.items()} == {
        name: one.text for name, one in report.candidates.items()
    }
    forced = dataclasses.replace(again, assignment={0: "nha", 1: "native", 2: "near"})
    with forced.apply(model) as handle:
        assert isinstance(handle, sd.models.Conversion)
        assert handle.new_parameters() and list(handle.layers) == [0] and list(handle.applied.patterns) == [2]
    assert not hasattr(model.model.layers[0].self_attn, "sd_layer")


def test_the_cache_of_a_hybrid_layer_costs_what_its_cache_holds() -> None:
    model = llama(1)
    report = searched(model, HYBRIDS, bound=sd.models.Kl(10.0), length=48)
    for name in ("nha", "hsa", "moba"):
        with sd.models.convert(model, {0: HYBRIDS[name]}) as handle, torch.no_grad():
            cache = handle.cache()
            model(ROWS[:1], past_key_values=cache)
        assert report.costs[0][name] == cache.layers[0].nbytes, name


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (functools.partial(sd.models.NHA, 16), "arguments by name"),
        (functools.partial(sd.models.NHA, slots=torch.ones(1)), "plain values"),
        (type("Mine", (sd.models.NHA,), {}), "register_layer"),
        (torch.nn.Linear, "class of layers"),
    ],
)
def test_layers_that_a_report_could_not_keep_are_refused(given: Any, says: str) -> None:
    with pytest.raises(sd.PatternError, match=says):
        searched(llama(1), {"mine": given})
