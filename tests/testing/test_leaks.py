"""Leaks that small random cases do not reach: the prover is asked, its witness is run, and lengths go beyond what the pattern says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.cli import main
from sparsedsl.testing import battery, program_battery
from sparsedsl.testing.reach_checks import edges_of

CAUSAL = sd.kv_idx <= sd.q_idx
END = sd.table("end")
FAR = CAUSAL | ((sd.q_idx == 200) & (sd.kv_idx == 201))


def causality(pattern: Any, **words: Any) -> kit.Property:
    (found,) = (p for p in kit.check(pattern, examples=1, seed=0, **words).properties if p.name == "causality")
    return found


LEAKS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "far away": (FAR, {}, "q_idx=200, kv_idx=201"),
    "of a hidden constant": (CAUSAL | (sd.q_idx // 40 == 5) & (sd.kv_idx == sd.q_idx + 1), {}, "q_idx=200, kv_idx=201"),
    "of a head": (CAUSAL | (sd.h == 3) & (sd.kv_idx == 300), {}, "h=3, q_idx=0, kv_idx=300"),
    "with a score": (sd.attend(FAR, score=sd.score * 2), {}, "q_idx=200, kv_idx=201"),
    "of a table that is not given": (sd.kv_idx <= END[sd.q_idx], {}, "q_idx=0, kv_idx=1"),
    "of one value of a table": (
        sd.kv_idx <= END[sd.q_idx], {"end": torch.arange(300).index_fill(0, torch.tensor([200]), 201)}, "q_idx=200, kv_idx=201",
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("name", LEAKS)
def test_a_refuted_claim_fails_at_its_witness(name: str, backend: str) -> None:
    pattern, tables, place = LEAKS[name]
    found = causality(pattern, causal=True, backend=backend, **tables)
    assert found.status == "FAILS"
    assert place in found.detail
    with pytest.raises(kit.Counterexample, match=place):
        exec(found.snippet, {})


def test_a_witness_too_far_away_to_be_run() -> None:
    found = causality(CAUSAL | (sd.kv_idx == 10**7), causal=True)
    assert found.status == "FAILS" and "kv_idx=10000000" in found.detail
    with pytest.raises(AssertionError):
        exec(found.snippet, {})


def test_the_command_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "mine.py"
    spec.write_text("import sparsedsl as sd\nleak = (sd.kv_idx <= sd.q_idx) | ((sd.q_idx == 200) & (sd.kv_idx == 201))\n")
    assert main(["check", f"{spec}:leak", "--causal", "--examples", "1"]) == 1
    assert "AttentionCase(kv_len=202, q_offset=200)" in capsys.readouterr().out


def test_what_the_prover_says_is_printed() -> None:
    assert causality(CAUSAL, causal=True).detail.startswith("PROVED")
    held = causality(sd.kv_idx <= END[sd.q_idx], causal=True, end=torch.arange(300))
    assert held.status == "holds"
    assert "with the tables given no query among the first 300 positions sees a later one" in held.detail
    by_score = causality(sd.attend(True, score=sd.where(CAUSAL, sd.score, -math.inf)), causal=True)
    assert by_score.status == "holds" and by_score.detail.startswith("REFUTED")
    assert causality(sd.patterns.hsa(4, 2), causal=True).detail.startswith("PROVED")


def test_a_program_that_is_refuted() -> None:
    leaky = sd.joint(CAUSAL & (sd.q_idx - sd.kv_idx < 3), (sd.q_idx == 70) & (sd.kv_idx == 75))
    found = causality(leaky, causal=True)
    assert found.status == "FAILS"
    with pytest.raises(kit.Counterexample, match="up to position"):
        exec(found.snippet, {})
    assert causality(leaky).status == "not applicable"


# ---- where cases go ---------------------------------------------------------------------------------------------------------


def drawn(strategy: st.SearchStrategy[kit.AttentionCase], count: int) -> list[kit.AttentionCase]:
    cases: list[kit.AttentionCase] = []

    @settings(
        max_examples=count, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def see(case: kit.AttentionCase) -> None:
        cases.append(case)

    see()
    return cases


def test_shapes_are_rectangular_often() -> None:
    cases = drawn(kit.shapes(), 300)
    assert sum(c.q_len < c.kv_len for c in cases) >= 90
    assert sum(c.q_len > c.kv_len for c in cases) >= 30
    assert sum(c.q_offset > 0 for c in cases) >= 90
    assert sum(c.q_len < c.kv_len and c.q_offset == c.kv_len - c.q_len for c in cases) >= 20


def test_edges_are_found_wherever_they_are_written() -> None:
    assert set(edges_of([(sd.q_idx // 64 == sd.kv_idx // 64).expr], {})) == {64}
    assert {40, 5, 200} <= set(edges_of([(sd.q_idx // 40 == 5).expr], {}))
    assert {300, 17} <= set(edges_of([(sd.kv_idx <= END[sd.q_idx]).expr], {"end": torch.full((300,), 17)}))
    width = sd.table("width", values_in=(1, 900))
    assert 900 in edges_of([(sd.q_idx - sd.kv_idx < width[sd.h]).expr], {})


@pytest.mark.parametrize("edge", [200, 3000])
def test_cases_are_drawn_on_both_sides_of_a_constant(edge: int) -> None:
    subject = battery._Subject(sd.attend(CAUSAL & (sd.q_idx - sd.kv_idx < edge)), "reference", {}, None)
    cases = drawn(subject.cases(), 100)
    ends = [c.q_offset + c.q_len for c in cases]
    assert {edge - 1, edge, edge + 1} <= set(ends)
    assert sum(abs(end - edge) <= 2 for end in ends) >= 30
    assert all(c.q_len * c.kv_len <= 600 * 600 for c in cases)


def test_given_tables_limit_far_cases() -> None:
    mask = (CAUSAL & (sd.q_idx - sd.kv_idx < 200) & (END[sd.kv_idx] < 9)).bind(end=torch.arange(50) % 11)
    for case in drawn(battery._Subject(sd.attend(mask), "reference", {}, None).cases(), 60):
        assert case.kv_len <= 50


@pytest.mark.parametrize(
    ("program", "edge"),
    [
        (sd.patterns.hsa(64, 2), 64),
        (sd.patterns.nha(3, 90), 90),
        (sd.attend(CAUSAL & (sd.q_idx - sd.kv_idx < 77) & sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4)), 1)), 77),
    ],
)
@pytest.mark.parametrize("longest", [200, 40])
def test_programs_are_run_beyond_their_units(program: Any, edge: int, longest: int) -> None:
    subject = program_battery.ProgramSubject(sd.Program(program), "reference", None)
    lengths: list[int] = []

    def note(subject: Any, data: st.DataObject) -> None:
        lengths.append(subject.draw(data, longest)[0].kv_len)

    tuple(battery._run({"lengths": ("", note)}, {}, subject, 40, False, 0))
    assert {edge - 1, edge, edge + 1} & set(lengths)
    assert max(lengths) > edge


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_a_leak_of_a_backend_beyond_100_tokens_is_seen(backend: str) -> None:
    """The pattern is innocent, and what runs is not."""
    from sparsedsl.execute.compiled import Attention

    class Leaky(Attention):
        def __call__(self, q: Any, k: Any, v: Any, *, q_offset: int = 0, **words: Any) -> Any:
            made = super().__call__(q, k, v, q_offset=q_offset, **words)
            if k.shape[2] <= 100:
                return made
            moved = 1e-3 * v[:, :, -1:].mean()
            return (made[0] + moved, *made[1:]) if isinstance(made, tuple) else made + moved

    class Subject(battery._Subject):
        def attention(self) -> Any:
            return Leaky(self.bound, self.backend)

    subject = Subject(sd.attend(CAUSAL & (sd.q_idx - sd.kv_idx < 110)), backend, {}, True)
    (found,) = battery._run({"causality": battery.PROPERTIES["causality"]}, {}, subject, 25, False, 0)
    assert found.status == "FAILS", found
