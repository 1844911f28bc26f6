"""``sd.testing.check``: its report for right, wrong and inapplicable patterns."""

from __future__ import annotations

import io
import json
import pickle
import sys
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.program.program_text import read_given
from sparsedsl.testing import battery
from sparsedsl.testing.progress import Progress

CAUSAL = sd.kv_idx <= sd.q_idx
NAMES = ["text", "tile lists", "numbers", "causality", "calls", "order", "unseen"]


def statuses(report: kit.Report) -> dict[str, str]:
    return {p.name: p.status for p in report.properties}


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_a_right_pattern_holds(backend: str) -> None:
    report = kit.check(CAUSAL & (sd.q_idx - sd.kv_idx < 5), examples=4, seed=1, backend=backend)
    assert report.ok
    assert statuses(report) == dict.fromkeys(NAMES, "holds")
    assert [p.examples for p in report.properties] == [1, 4, 4, 4, 4, 4, 4]
    assert report.snippet == ""
    assert "tile lists  holds      4 examples" in str(report)


@pytest.mark.parametrize(
    "pattern",
    [
        CAUSAL & ((sd.q_idx - sd.kv_idx) % 3 == 0),
        CAUSAL & ((sd.q_idx * sd.kv_idx) % 3 == 0),
        sd.attend(CAUSAL & (sd.q_idx - sd.kv_idx < 5), score=sd.tanh(sd.score / 2) * 2, sink=0.5),
        sd.attend(CAUSAL, score=sd.score - 0.1 * (sd.q_idx - sd.kv_idx) * (1 + sd.h)),
    ],
    ids=["lanes", "scattered", "cap and sink", "bias"],
)
def test_tiled_holds(pattern: Any) -> None:
    report = kit.check(pattern, examples=5, seed=1, backend="tiled")
    assert report.ok, report


def test_a_pattern_that_must_be_causal_and_is_not() -> None:
    report = kit.check(sd.kv_idx <= sd.q_idx + 1, examples=10, causal=True, seed=1)
    assert not report.ok
    assert statuses(report) == {**dict.fromkeys(NAMES, "holds"), "causality": "FAILS"}
    with pytest.raises(kit.Counterexample, match="changes when q, k and v after it change"):
        exec(report.snippet, {})
    assert "AttentionCase(kv_len=2)" in report.snippet, "the smallest case that shows it"
    assert report.snippet.splitlines()[-1].strip() in str(report)


LEAKY = sd.kv_idx <= sd.q_idx + 1


@pytest.mark.parametrize(
    "pattern",
    [
        sd.attend(LEAKY, causal=True),
        sd.attend(LEAKY & (sd.table("t")[sd.kv_idx] > 0), causal=True).bind(t=torch.ones(99, dtype=torch.long)),
        sd.compile(sd.attend(LEAKY, causal=True)),
        sd.attend(LEAKY & (sd.top_k(sd.dot(sd.q, sd.k), 2) | (sd.q_idx == sd.kv_idx)), causal=True),
    ],
    ids=["pattern", "bound", "compiled", "program"],
)
def test_what_declares_itself_causal_is_held_to_it(pattern: Any) -> None:
    report = kit.check(pattern, examples=1, seed=1)
    (found,) = (p for p in report.properties if p.name == "causality")
    assert found.status == "FAILS" and report.exit_code == 1
    assert "later position" in found.detail or "after it" in found.detail
    assert kit.check(pattern, examples=1, seed=1, causal=False).ok


def test_the_claim_is_in_the_text_and_not_in_the_meaning() -> None:
    claimed, plain = sd.attend(CAUSAL, scale=0.5, causal=True), sd.attend(CAUSAL, scale=0.5)
    assert claimed.text == "attend(q_idx >= kv_idx, scale=0.5, causal=True)"
    assert read_given(claimed.text).causal and not read_given(plain.text).causal
    assert claimed == plain and claimed.key == plain.key and hash(claimed) == hash(plain)
    assert pickle.loads(pickle.dumps(claimed)).causal
    assert kit.check(claimed, examples=1, seed=1).ok
    with pytest.raises(sd.PatternError, match="causal must be True or False"):
        sd.attend(CAUSAL, causal=1)


def test_a_report_names_its_seed_and_is_json() -> None:
    report = kit.check(CAUSAL, examples=1)
    assert f"right, as far as tried; seed {report.seed}" in str(report)
    found = json.loads(report.to_json())
    assert found["ok"] and found["exit_code"] == 0 and [p["name"] for p in found["properties"]] == NAMES


def test_words_that_are_misspelt() -> None:
    with pytest.raises(
        sd.TableError, match=r"check\(\): unexpected argument exmaples: the pattern reads no table. Did you mean 'examples'"
    ):
        kit.check(CAUSAL, exmaples=1)


def test_progress_where_nobody_watches() -> None:
    out, times = io.StringIO(), iter([0.0, 1.0, 6.0, 7.0, 30.0])
    with Progress(9, "numbers", stream=out, clock=lambda: next(times)) as progress:
        progress.update()
        progress.update()
        progress.say("failed; looking for a smaller case")
        progress.say("failed; looking for a smaller case")
    assert out.getvalue().splitlines() == [
        "numbers: 2 of 9 cases, 6 s", "numbers: 2 of 9 cases, 30 s; failed; looking for a smaller case",
    ]  # fmt: skip
    with Progress(9, "numbers", shown=False, stream=out, clock=lambda: next(times)) as silent:
        silent.update()


def test_a_pattern_that_is_not_meant_to_be_causal() -> None:
    report = kit.check(abs(sd.q_idx - sd.kv_idx) < 3, examples=3, seed=1)
    assert report.ok
    (causality,) = (p for p in report.properties if p.name == "causality")
    assert causality.status == "not applicable"
    assert "sees" not in causality.detail
    assert "a query see a later position: b=0" in causality.detail


def test_properties_that_do_not_apply() -> None:
    report = kit.check(CAUSAL & (sd.kv_idx < sd.q_len - sd.h - sd.b), examples=3, seed=1)
    found = {p.name: (p.status, p.detail) for p in report.properties}
    assert found["calls"] == ("not applicable", "the pattern reads q_len, the end of each call")
    assert found["order"] == ("not applicable", "the pattern reads both b and h")


def test_errors_of_a_pattern_are_failures_with_a_snippet() -> None:
    bias = sd.table("bias", dtype=float)
    report = kit.check(sd.attend(True, score=sd.score + bias[sd.q_idx - sd.kv_idx]), examples=5, seed=1)
    found = {p.name: p for p in report.properties}
    assert found["numbers"].status == "FAILS"
    assert found["numbers"].detail.startswith("TableError: table 'bias' is too short")
    with pytest.raises(sd.TableError, match="table 'bias' is too short"):
        exec(found["numbers"].snippet, {})


def test_given_tables_limit_the_shapes() -> None:
    width = sd.table("width", values_in=(1, 9))
    doc = sd.table("doc", monotone=True)
    mask = CAUSAL & (sd.q_idx - sd.kv_idx < width[sd.h]) & (doc[sd.q_idx] == doc[sd.kv_idx])
    seen: list[kit.AttentionCase] = []
    real = battery.PROPERTIES

    def note(subject: Any, data: Any) -> None:
        seen.append(subject.draw(data)[0])

    try:
        battery.PROPERTIES = {"shapes": ("", note)}
        report = kit.check(mask.bind(doc=torch.arange(12) // 4), examples=40, width=torch.tensor([3, 5]), seed=1)
    finally:
        battery.PROPERTIES = real
    assert report.ok
    assert max(c.heads for c in seen) == 2
    assert max(c.kv_len for c in seen) <= 12
    assert max(c.q_offset + c.q_len for c in seen) <= 12


def test_lengths_reach_past_the_constants_of_the_pattern() -> None:
    subject = battery._Subject(sd.attend(CAUSAL & (sd.q_idx - sd.kv_idx < 200)), "reference", {}, None)
    from hypothesis import find, settings

    case = find(subject.cases(), lambda c: c.kv_len > 300, settings=settings(database=None))
    assert case.batch == 1


def test_wrong_arguments() -> None:
    with pytest.raises(sd.SparseDSLError, match="examples must be a whole number of at least 1; got 0"):
        kit.check(CAUSAL, examples=0)
    with pytest.raises(sd.TableError, match=r"check\(\): unexpected argument doc: the pattern reads no table"):
        kit.check(CAUSAL, doc=torch.arange(3))
    with pytest.raises(sd.PatternError, match="backend must be one of"):
        kit.check(CAUSAL, backend="nope")
    with pytest.raises(sd.PatternError, match="pattern must be a Mask or a Pattern"):
        kit.check(3)


def test_a_seed_draws_the_same_cases() -> None:
    def run() -> list[str]:
        seen: list[str] = []
        real = battery.PROPERTIES
        try:
            battery.PROPERTIES = {"shapes": ("", lambda subject, data: seen.append(str(subject.draw(data))))}
            kit.check(CAUSAL, examples=10, seed=5)
        finally:
            battery.PROPERTIES = real
        return seen

    assert run() == run()


def test_progress_is_shown_if_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    kit.check(CAUSAL, examples=2, seed=1)
    assert capsys.readouterr().err == ""
    kit.check(CAUSAL, examples=2, seed=1, progress=True)
    assert "tile lists" in capsys.readouterr().err
