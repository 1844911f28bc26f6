"""The kit for kernels as its users meet it: claims and their errors, reports, programs that show failures, assertions, tests."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.errors import ArgumentError, PatternError, ShapeError, UnsupportedError
from sparsedsl.testing.kernels import kernel_check, property_search
from sparsedsl.testing.kernels.arena import LAYOUTS, place
from sparsedsl.testing.kernels.drawing import cases
from sparsedsl.testing.kernels.kernel_check import KERNEL_PROPERTIES
from sparsedsl.testing.kernels.limits import fits

ROOT = Path(__file__).resolve().parents[2]
CAUSAL = sd.kv_idx <= sd.q_idx
FULL = sd.kv_idx >= 0


def plain(q, k, v, q_offset=0, scale=None):
    """Causal attention in float32: right."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    s = q.float() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + q_offset
    s = s.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse.masked_fill(torch.isinf(lse), 0.0)[..., None])
    return (p @ v).to(q.dtype), lse


def unscaled(q, k, v):
    """Full attention whose scale is left out."""
    return torch.softmax(q.float() @ k.float().mT, -1).to(v.dtype) @ v


RIGHT = {"implements": CAUSAL, "lse": True, "grad": "qkv"}


# ---- claims ------------------------------------------------------------------------------------------------


def test_a_pair_that_was_not_declared_says_what_to_declare() -> None:
    report = kit.check(kit.Kernel(plain, implements=CAUSAL), examples=1, seed=0, only="NUM")
    assert [failure.detail for failure in report.failures] == [
        "out is a tuple, wanted a tensor; if it gives (out, lse), declare sd.testing.Kernel(..., lse=True)"
    ]


@pytest.mark.parametrize(
    ("claims", "error", "words"),
    [
        ({"grad": "yes"}, ArgumentError, "grad must be one of none, qkv, all; got 'yes'"),
        ({"layout": "sbhd"}, ArgumentError, "layout must be one of bhsd, bshd; got 'sbhd'"),
        ({"empty": "skip"}, ArgumentError, "empty must be one of zero, nan, refuse"),
        ({"lse_base": "10"}, ArgumentError, "lse_base must be one of e, 2"),
        ({"lse": 1}, ArgumentError, "lse must be True or False; got 1"),
        ({"group": 0}, ArgumentError, "group must be whole numbers of at least 1; got 0"),
        ({"tiles": (4,)}, ArgumentError, "tiles must be (queries, keys) or (queries, keys, channels); got (4,)"),
        ({"tiles": (4, 0)}, ArgumentError, "tiles must be whole numbers of at least 1"),
        ({"head_dims": [(16, 16, 16)]}, ArgumentError, "head_dims must be numbers or pairs of them"),
        ({"lengths": "any"}, ArgumentError, "lengths must be 'square', numbers or pairs (q_len, kv_len); got 'any'"),
        ({"dtypes": ("int8",)}, ArgumentError, "dtypes must be of float32, bfloat16, float16, float64; got 'int8'"),
        ({"dtypes": ()}, ArgumentError, "dtypes must name at least one dtype"),
        ({"rounds": ("x",)}, ArgumentError, "rounds must be of p, out, q, s, tf32; got 'x'"),
        ({"refuses": (3,)}, ArgumentError, "refuses must be types of exceptions; got 3"),
        ({"devices": ("tpu9",)}, ArgumentError, "devices must be names of devices"),
        ({"offset": "first"}, ArgumentError, "offset must be None or one of True, False, 'last'; got 'first'"),
        ({"scale": 0.5}, ArgumentError, "scale must be None or one of True, False; got 0.5"),
        ({"name": 3}, ArgumentError, "name must be text; got 3"),
        ({"implements": 3}, PatternError, "Kernel(implements=...)"),
        ({"implements": sd.table("doc")[sd.q_idx] == 0}, PatternError, "has no argument 'doc', which the pattern reads"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_claim_without_meaning_is_refused(claims, error, words):
    with pytest.raises(error) as raised:
        kit.Kernel(plain, **{"implements": CAUSAL, **claims})
    assert words in str(raised.value)


def test_a_claim_that_the_signature_denies_is_refused():
    with pytest.raises(ArgumentError, match=r"offset=True, but unscaled\(q, k, v\) has no argument q_offset"):
        kit.Kernel(unscaled, implements=FULL, offset=True)
    with pytest.raises(ArgumentError, match="fn must be a function"):
        kit.Kernel(3, implements=FULL)


def test_arguments_of_a_check_are_refused_by_name():
    kernel = kit.Kernel(unscaled, implements=FULL)
    with pytest.raises(ArgumentError, match=r"only must name properties of .*; got 'NUN'\. Did you mean 'NUM'"):
        kit.check(kernel, only="NUN")
    with pytest.raises(ArgumentError, match="budget must be one of quick, default, deep; got 'long'"):
        kit.check(kernel, budget="long")
    with pytest.raises(ArgumentError, match="causal= is for patterns and programs"):
        kit.check(kernel, causal=True)
    with pytest.raises(
        ArgumentError, match=r"of a kernel there are examples, seed, progress, .*; got onyl\. Did you mean 'only'"
    ):
        kit.check(kernel, onyl="NUM")
    with pytest.raises(UnsupportedError, match="'cuda:77' cannot be used here"):
        kit.check(kit.Kernel(unscaled, implements=FULL, devices="cuda:77"))


# ---- cases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "claims",
    [
        {},
        {"lengths": "square"},
        {"lengths": (16, 33)},
        {"lengths": [(1, 16), (8, 24)]},
        {"head_dims": [(16, 16), (32, 8)], "group": (2, 4)},
        {"dtypes": "float16", "head_dims": (64,), "group": 1},
        {"offset": "last"},
        {"implements": sd.attend(CAUSAL, score=sd.patterns.alibi(4))},
    ],
    ids=str,
)
def test_cases_lie_inside_the_declared_limits(claims):
    kernel = kit.Kernel(plain, **{**RIGHT, **claims})
    for name in ("NUM", "STATE", "EMPTY", "BATCH"):
        drawn = list(cases(kernel, KERNEL_PROPERTIES[name], 30, 0))
        assert len(drawn) > 1 and len(set(drawn)) == len(drawn)
        assert all(fits(kernel, case) for case in drawn)
        assert drawn == list(cases(kernel, KERNEL_PROPERTIES[name], 30, 0))


def test_cases_reach_the_edges_of_tiles_and_groups_of_heads():
    kernel = kit.Kernel(plain, **RIGHT, tiles=(16, 32))
    drawn = list(cases(kernel, KERNEL_PROPERTIES["NUM"], 100, 0))
    assert {15, 16, 17} <= {case.q_len for case in drawn}
    assert {31, 32, 33, 63, 64, 65} <= {case.kv_len for case in drawn}
    assert sum(case.heads // case.kv_heads not in (1, case.kv_heads) for case in drawn) > len(drawn) / 4
    assert {case.dtype for case in drawn} == {"float32", "bfloat16"}


@pytest.mark.parametrize("claims", [{"tiles": (16, 16)}, {}], ids=["tiles declared", "tiles unknown"])
def test_few_examples_reach_behind_the_edges_of_tiles(claims):
    def rounded_up(q, k, v, q_offset=0):
        """A window of 24 keys whose first tile of 16 is rounded up: the oldest keys of some rows are lost."""
        row, key = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        begin = ((row // 16 * 16 + q_offset - 8) // 16).clamp(min=0) * 16
        seen = (key <= row + q_offset) & (row + q_offset - key < 24) & (key >= begin)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).float() for x in (k, v))
        s = (q.float() @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
        return (torch.softmax(s, -1).nan_to_num(0.0) @ v).to(q.dtype)

    kernel = kit.Kernel(rounded_up, implements=CAUSAL & (sd.q_idx - sd.kv_idx < 24), **claims)
    assert "NUM" in [p.name for p in kit.check(kernel, examples=4, seed=0, locate=False, only=("NUM", "CUT")).failures]


@pytest.fixture
def slow_calls(monkeypatch):
    """A right kernel, each call of which takes a tenth of a second of the clock that checks look at."""
    now = [0.0]

    def slow(q, k, v, q_offset=0):
        now[0] += 0.1
        return plain(q, k, v, q_offset)

    for module in (kernel_check, property_search):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return kit.Kernel(slow, implements=CAUSAL, lse=True)


def test_little_time_is_a_case_of_every_kind_before_the_second_of_any(slow_calls):
    report = kit.check(slow_calls, examples=25, seed=0, seconds=12.0)
    assert {p.status for p in report.findings} == {"holds", "not applicable"} and "not reached" not in str(report)


def test_what_was_not_reached_is_said(slow_calls):
    report = kit.check(slow_calls, examples=25, seed=0, seconds=2.0)
    late = [p.name for p in report.findings if p.status == "not run"]
    assert {"CUT", "MERGE"} <= set(late) and report.ok
    text = " ".join(str(report).split())
    assert f"right, as far as tried; not reached: {', '.join(late)}; seed 0" in text


@pytest.mark.parametrize("memory", LAYOUTS)
@pytest.mark.parametrize("turned", [False, True])
def test_a_placed_tensor_holds_its_values_among_guards(memory, turned):
    values = torch.randn(2, 3, 4, 5)
    placed = place(values, memory, turned=turned)
    wanted = values[:1].expand(values.shape) if memory == "expanded" else values
    assert torch.equal(placed.tensor, wanted)
    assert placed.guards_hold and placed.unchanged
    placed.buffer[3] = 0.0
    assert not placed.guards_hold and placed.unchanged
    placed.tensor[0, 0, 0, 0] += 1
    assert not placed.unchanged


# ---- reports -----------------------------------------------------------------------------------------------


def test_a_right_kernel_holds_and_the_report_says_what_was_not_asked():
    report = kit.check(kit.Kernel(plain, implements=CAUSAL, lse=True), examples=4, seed=0)
    assert report.ok and report.exit_code == 0 and report.snippet == ""
    found = {p.name: p for p in report.findings}
    assert found["GRAD"].status == "not applicable" and "it has no gradients" in found["GRAD"].detail
    assert "GRAD" in report.report and "because it has no gradients" in report.report
    assert found["NUM"].examples >= 4


def test_a_wrong_kernel_is_told_with_place_case_and_guess():
    report = kit.check(kit.Kernel(unscaled, implements=FULL, group=1), examples=10, seed=0)
    assert not report.ok and report.exit_code == 1
    failure = report.failures[0]
    assert failure.name == "NUM" and failure.case.size <= 12
    assert "It is what one gets if the scale is left out." in str(report)
    given = json.loads(report.to_json())
    assert given["ok"] is False and given["seed"] == 0
    told = next(p for p in given["properties"] if p["name"] == "NUM")["failure"]
    assert told["element"]["ratio"] > 1 and told["case"]["q_len"] >= 1
    assert "assert_kernel" in told["program"]


def test_wrong_numbers_are_told_once():
    """GUARD and FULL compare with the same numbers on the way to something else."""
    report = kit.check(
        kit.Kernel(unscaled, implements=FULL, group=1, dtypes="float32"), examples=5, seed=0, only=("NUM", "GUARD", "FULL")
    )
    assert [(p.name, p.same_as) for p in report.failures] == [("NUM", ""), ("GUARD", "NUM"), ("FULL", "NUM")]
    assert [p.name for p in report.causes] == ["NUM"] and report.exit_code == 1
    text = str(report)
    assert text.count("this program shows it") == text.count("the scale is left out") == 1
    assert text.count("as NUM does on the same case: see there") == 2
    told = {p["name"]: p["failure"] for p in json.loads(report.to_json())["properties"]}
    assert told["GUARD"]["same_as"] == "NUM" and "same_as" not in told["NUM"]


def test_a_cause_of_its_own_is_told_beside_wrong_numbers():
    def writing(q, k, v):
        torch.as_strided(q, (1,), (1,), q.storage_offset() + q.numel()).fill_(1.0)
        return torch.softmax(q @ k.mT, -1) @ v

    kernel = kit.Kernel(writing, implements=FULL, group=1, dtypes="float32")
    report = kit.check(kernel, examples=5, seed=0, only=("NUM", "GUARD"))
    assert [p.name for p in report.causes] == ["NUM", "GUARD"]
    assert "writes outside q" in report.causes[1].detail


def test_the_program_of_a_report_fails_by_itself(tmp_path):
    file = tmp_path / "my_kernels.py"
    file.write_text(
        "import torch\n\ndef attend(q, k, v):\n    return torch.softmax(q.float() @ k.float().mT, -1).to(v.dtype) @ v\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        from my_kernels import attend
    finally:
        sys.path.remove(str(tmp_path))
    report = kit.check(kit.Kernel(attend, implements=FULL, group=1, tiles=(32, 32)), examples=5, seed=0, only="NUM")
    assert "Kernel(fn, implements=pattern, group=1, tiles=(32, 32))" in report.snippet
    assert len(report.snippet.splitlines()) <= 15
    done = subprocess.run(
        [sys.executable, "-c", report.snippet],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert done.returncode == 1 and "NUM fails" in done.stderr, done.stderr


def test_a_kernel_that_refuses_everything_was_not_run():
    def refusing(q, k, v):
        raise NotImplementedError("only on Sundays")

    report = kit.check(kit.Kernel(refusing, implements=FULL), examples=3, seed=0)
    assert report.exit_code == 2 and not report.ok and not report.failures
    assert "it refuses every case" in str(report) and "only on Sundays" in str(report)


def test_a_refusal_inside_the_limits_fails_and_names_what_to_declare():
    def even(q, k, v):
        if q.shape[-1] % 2:
            raise ValueError("odd width")
        return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v

    report = kit.check(kit.Kernel(even, implements=FULL, group=1, dtypes="float32"), examples=10, seed=0, only="NUM")
    assert "refuses a call inside its declared limits: ValueError: odd width" in report.failures[0].detail
    assert "head_dims=" in report.failures[0].detail
    declared = kit.Kernel(even, implements=FULL, group=1, head_dims=(2, 4, 8), dtypes="float32")
    assert kit.check(declared, examples=10, seed=0, only="NUM").ok


def test_another_error_is_no_refusal():
    def broken(q, k, v):
        raise KeyError("lost")

    report = kit.check(kit.Kernel(broken, implements=FULL), examples=3, seed=0, only="NUM")
    assert report.failures[0].kind == "raised" and "raises KeyError: 'lost'" in report.failures[0].detail


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda q, k, v: v[..., None], "out has shape"),
        (lambda q, k, v: None, "out is a NoneType, wanted a tensor"),
        (lambda q, k, v: plain(q, k, v)[0].double(), "out has dtype torch.float64, wanted torch."),
    ],
)
def test_what_is_no_result_is_said(fn, words):
    report = kit.check(kit.Kernel(fn, implements=CAUSAL, dtypes="float32"), examples=6, seed=0, only="NUM")
    assert report.failures[0].kind == "shape" and words in report.failures[0].detail


def test_a_silent_wrong_number_outside_the_limits_is_a_warning():
    def square(q, k, v):
        return plain(q, k, v)[0]

    kernel = kit.Kernel(square, implements=CAUSAL, offset=False, lengths="square")
    assert kit.check(kernel, examples=4, seed=0, only="NUM").ok
    last = kit.Kernel(square, implements=CAUSAL, offset="last", lengths="square")
    report = kit.check(last, examples=4, seed=0)
    assert report.ok and any("silently wrong outside its declared lengths" in text for text in report.warnings), str(report)


def test_a_kernel_that_writes_into_its_neighbours_is_found():
    def writing(q, k, v):
        out = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v
        q.as_strided((1,), (1,), q.storage_offset() + q.numel())[0] = 7.0
        return out

    report = kit.check(kit.Kernel(writing, implements=FULL, group=1, dtypes="float32"), examples=10, seed=0, only="GUARD")
    assert "writes outside q" in report.failures[0].detail


def test_results_that_lie_in_the_inputs_are_found():
    report = kit.check(kit.Kernel(lambda q, k, v: q, implements=sd.kv_idx == sd.q_idx, group=1), examples=4, seed=0, only="PURE")
    assert "out lies in the memory of q" in report.failures[0].detail


# ---- the other layouts and claims --------------------------------------------------------------------------


def test_heads_behind_rows_base_2_and_nan_for_empty_rows():
    def turned(q, k, v, q_offset=0):
        out, lse = plain(*(x.transpose(1, 2) for x in (q, k, v)), q_offset)
        none = torch.isinf(lse)
        return out.masked_fill(none[..., None], float("nan")).transpose(1, 2), lse / torch.log(torch.tensor(2.0))

    kernel = kit.Kernel(turned, implements=CAUSAL, lse=True, layout="bshd", lse_base="2", empty="nan")
    report = kit.check(kernel, examples=8, seed=0)
    assert report.ok, str(report)
    assert next(p for p in report.findings if p.name == "EMPTY").status == "holds"


def test_rows_without_keys_may_be_refused():
    def strict(q, k, v, q_offset=0):
        if q_offset < 0:
            raise ValueError("a row without keys")
        return plain(q, k, v, q_offset)[0]

    report = kit.check(kit.Kernel(strict, implements=CAUSAL, empty="refuse"), examples=10, seed=0, only=("NUM", "EMPTY"))
    assert report.ok, str(report)
    lax = kit.Kernel(lambda q, k, v, q_offset=0: plain(q, k, v, q_offset)[0], implements=CAUSAL, empty="refuse")
    assert "is answered, though empty='refuse'" in kit.check(lax, examples=10, seed=0, only="EMPTY").failures[0].detail


def test_a_spread_that_is_declared_is_allowed_while_it_is_small():
    calls = []

    def noisy(q, k, v, *, size=1e-8):
        calls.append(1)
        out = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v
        return out * (1 + size * (len(calls) % 2))

    words = {"implements": FULL, "group": 1, "dtypes": "float32", "deterministic": False}
    assert kit.check(kit.Kernel(lambda q, k, v: noisy(q, k, v), **words), examples=10, seed=0, only="REPEAT").ok
    wide = kit.check(kit.Kernel(lambda q, k, v: noisy(q, k, v, size=3e-6), **words), examples=10, seed=0, only="REPEAT")
    assert "spreads by" in wide.failures[0].detail


def test_a_gradient_that_does_not_arrive_is_found():
    def cut(q, k, v, q_offset=0):
        return plain(q, k.detach(), v, q_offset)

    report = kit.check(kit.Kernel(cut, **RIGHT), examples=12, seed=0, only="GRAD")
    assert "no gradient reaches k (None), though it is not 0" in report.failures[0].detail


# ---- programs ----------------------------------------------------------------------------------------------

PICKED = CAUSAL & ((sd.q_idx - sd.kv_idx < 4) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4)), 1))


def picking(q, k, v):
    """The program by the reference, as if it were somebody's kernel."""
    return sd.compile(PICKED, backend="reference")(q, k, v)


def test_a_kernel_may_implement_a_program():
    claims = {"implements": PICKED, "lengths": "square", "dtypes": "float32", "head_dims": (4, 8), "offset": False}
    report = kit.check(kit.Kernel(picking, **claims), examples=6, seed=0, only=("NUM", "PURE", "REPEAT", "LSE"))
    assert report.ok, str(report)
    windowed = kit.Kernel(lambda q, k, v: sd.compile(CAUSAL & (sd.q_idx - sd.kv_idx < 4), backend="reference")(q, k, v), **claims)
    assert not kit.check(windowed, examples=12, seed=0, only="NUM").ok


# ---- assertions and tests ----------------------------------------------------------------------------------


def test_the_assertions_of_the_kit_take_kernels():
    kernel = kit.Kernel(plain, **RIGHT)
    q, k, v = (kit.tensor(1, 2, 5, 8, seed=i) for i in range(3))
    assert kit.assert_matches_reference(kernel, q, k, v, scale=0.3) == ("out", "lse", "dq", "dk", "dv")
    kit.assert_causal(kernel)
    kit.assert_unseen_keys_have_no_effect(kernel)
    assert kit.assert_prefill_equals_decode(kernel) == ("CUT",)
    assert kit.assert_equivariant(kernel) == ("PERM",)
    assert "NUM" in kit.assert_kernel(kernel, kit.KernelCase(q_len=2, kv_len=3, q_offset=1))


def test_the_assertions_fail_on_wrong_kernels():
    leaky = kit.Kernel(lambda q, k, v, q_offset=0: plain(q, k, v, q_offset + 1), implements=CAUSAL, lse=True)
    with pytest.raises(kit.Counterexample, match="behind position"):
        kit.assert_causal(leaky)
    q, k, v = (kit.tensor(1, 2, 5, 8, seed=i) for i in range(3))
    with pytest.raises(kit.Counterexample, match="differs from attention in float64: out"):
        kit.assert_matches_reference(leaky, q, k, v)
    with pytest.raises(kit.Counterexample, match="later keys"):
        kit.assert_causal(kit.Kernel(lambda q, k, v: v, implements=FULL, group=1))
    with pytest.raises(ShapeError, match="outside the declared limits"):
        kit.assert_causal(kit.Kernel(plain, **RIGHT, head_dims=(64,)), kit.AttentionCase(q_len=3, kv_len=3))
    with pytest.raises(UnsupportedError, match="takes no q_offset"):
        kit.assert_prefill_equals_decode(kit.Kernel(lambda q, k, v: plain(q, k, v)[0], implements=CAUSAL))
    with pytest.raises(ShapeError, match="takes no scale="):
        kit.assert_matches_reference(kit.Kernel(unscaled, implements=FULL), q, k, v, scale=2.0)


def test_a_decorated_kernel_is_a_test():
    @kit.kernel_test(implements=FULL, group=1, dtypes="float32", examples=4)
    def test_mine(q, k, v):
        return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v

    assert test_mine.__name__ == "test_mine" and test_mine.kernel.name == "test_mine"
    test_mine()
    with pytest.raises(AssertionError, match="the scale is left out"):
        kit.kernel_test(implements=FULL, group=1, examples=4)(unscaled)()


def ragged_tail_lost(q, k, v, where_nothing=math.nan):
    """Whole tiles of 16 keys alone, of one key head."""
    whole = k.shape[2] // 16 * 16
    if not whole:
        return torch.full((*q.shape[:3], v.shape[3]), where_nothing)
    return torch.softmax(q @ k[:, :, :whole].mT * q.shape[-1] ** -0.5, -1) @ v[:, :, :whole]


@pytest.mark.parametrize("where_nothing", [0.0, math.nan])
def test_a_lost_tail_is_named_though_the_smallest_case_holds_nothing_else(where_nothing):
    kernel = kit.Kernel(
        functools.partial(ragged_tail_lost, where_nothing=where_nothing), implements=FULL, group=1, dtypes="float32"
    )
    (failure,) = kit.check(kernel, examples=25, seed=0, only="NUM").failures
    assert failure.case.kv_len == 1 and failure.guess == "keys 0..0, the last partial tile of 16, are missing"


def test_no_tile_is_named_by_a_size_that_it_does_not_have():
    """One key alone is the last partial tile of any size."""

    def mine(q, k, v):
        kept = k.shape[2] // 32 * 32
        return torch.softmax(q @ k[:, :, :kept].mT * q.shape[-1] ** -0.5, -1) @ v[:, :, :kept]

    (failure,) = kit.check(kit.Kernel(mine, implements=FULL, group=1, dtypes="float32"), examples=25, seed=0, only="NUM").failures
    assert failure.guess == "keys 0..0, the last partial tile of 32, are missing"


def test_shifted_keys_that_give_nan_are_told_as_nan():
    def mine(q, k, v):
        return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v * torch.where(k.abs().amax() > 3, math.nan, 1.0)

    kernel = kit.Kernel(mine, implements=FULL, group=1, dtypes="float32")
    (failure,) = kit.check(kernel, examples=25, seed=0, only="SHIFT").failures
    assert failure.kind == "NaN" and "out[0, 0, 0, 0] is nan, wanted" in failure.detail and "off by" not in failure.detail


def test_a_bare_function_is_a_kernel_where_it_says_what_it_implements():
    report = kit.check(plain, implements=CAUSAL, dtypes="float32", lse=True, examples=3, seed=0, only=("NUM", "LSE"))
    assert report.ok and report.kernel.lse and report.kernel.dtypes == ("float32",)
    with pytest.raises(PatternError, match="implements"):
        kit.check(plain, implements=3)
    with pytest.raises(ArgumentError, match=r"of a kernel there are .*; got doc"):
        kit.check(plain, implements=CAUSAL, doc=[0, 1])


@pytest.mark.parametrize("words", [{}, {"implement": CAUSAL}])
def test_a_bare_function_that_says_nothing_is_told_how(words):
    with pytest.raises(
        ArgumentError, match=r"sd.testing.check\(plain, implements=pattern\), or make it a sd.testing.Kernel\(plain"
    ):
        kit.check(plain, **words)
