"""Tuning: noise does not choose, a candidate that fails ends nothing, what is remembered is used and never trusted."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import random
import threading
import time

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from sparsedsl.errors import SettingsError, SparseDSLError
from sparsedsl.gpu import autotune, tuning_records
from sparsedsl.gpu.autotune import Chosen, Session, Unusable, choose, session, tune
from sparsedsl.gpu.configs import Work, default_config, space
from sparsedsl.gpu.costs import banded_tiles
from sparsedsl.gpu.kernel_config import Config, Shape
from sparsedsl.gpu.targets import target_named
from sparsedsl.gpu.tuning_records import Record, clear, density_class, export, import_, recall, records, remember, tuning_key
from sparsedsl.tuning.store import Store

SM_90 = target_named("sm_90")
SHAPE = Shape("bfloat16", 64, 64)
WORK = Work(row_width=1024.0)
KEY = tuning_key("a pattern", "forward", SHAPE, density_class(0.1, 1024), SM_90)
DEFAULT = default_config("forward", SHAPE, SM_90)
FAST = Config(64, 64, 4, 2)
RECORD = Record(FAST, 1e-3, 2e-3, "2026-01-02T03:04:05+00:00", 20, 3)


@pytest.fixture(autouse=True)
def new_process(monkeypatch, tmp_path):
    """Nothing chosen yet, an empty cache."""
    monkeypatch.setattr(autotune, "_chosen", {})
    monkeypatch.setattr(tuning_records, "_noted", set())
    monkeypatch.setenv("SPARSEDSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSEDSL_TUNE", raising=False)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "tuning"


@pytest.fixture
def notes(caplog):
    caplog.set_level(logging.WARNING, logger="sparsedsl")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "sparsedsl"]


def next_process(monkeypatch):
    monkeypatch.setattr(autotune, "_chosen", {})


def forward(key=KEY, measure=None, **words):
    return choose("forward", SHAPE, SM_90, key, measure, **({"work": WORK} | words))


def stopwatch(seconds, otherwise=5e-3):
    """A stand-in for the device: seconds by config, exact; counts what it is asked."""
    asked = []

    def measure(config):
        asked.append(config)
        return seconds.get(config, otherwise)

    measure.asked = asked
    return measure


# ---- tune ---------------------------------------------------------------------------------------------------

CANDIDATES = space("forward", SHAPE, SM_90)


@given(st.integers(0, 2**32), st.integers(2, 24), st.data())
@settings(max_examples=60)
def test_noise_does_not_choose(seed, count, data):
    """One candidate is the fastest; samples are noisy by a third upwards, as those of a shared device are."""
    noise, candidates = random.Random(seed), CANDIDATES[:count]
    fast = data.draw(st.sampled_from(candidates))
    tuned = tune(candidates, lambda config: (1.0 if config == fast else 1.3) * (1 + noise.random() / 3))
    assert tuned.config == fast
    assert [trial.config for trial in tuned.trials] == list(candidates)


def test_a_burst_of_other_work_spoils_one_sample_of_all():
    """Everything takes ten times as long in one round, and one candidate has a lucky sample: the median does not see either."""
    calls = {config: 0 for config in CANDIDATES[:3]}
    fast = CANDIDATES[2]

    def measure(config):
        calls[config] += 1
        if calls[config] == 3:
            return 10.0
        if config == CANDIDATES[1] and calls[config] == 2:
            return 0.05
        return 0.8 if config == fast else 0.9

    assert tune(CANDIDATES[:3], measure).config == fast
    assert len(set(calls.values())) == 1, "samples are taken in rounds"


def test_the_default_wins_what_is_no_difference():
    took = {CANDIDATES[0]: 1.0, CANDIDATES[5]: 0.995}
    assert tune(CANDIDATES[:8], lambda config: took.get(config, 1.2)).config == CANDIDATES[0]
    took[CANDIDATES[5]] = 0.98
    assert tune(CANDIDATES[:8], lambda config: took.get(config, 1.2)).config == CANDIDATES[5]


def test_a_candidate_that_fails_is_recorded_with_its_reason():
    ways = {
        CANDIDATES[0]: Unusable("spills 24 registers"), CANDIDATES[1]: RuntimeError("out of resource: shared memory"),
        CANDIDATES[2]: MemoryError(), CANDIDATES[3]: float("nan"), CANDIDATES[4]: -1.0, CANDIDATES[5]: 0.0,
    }  # fmt: skip

    def measure(config):
        result = ways.get(config, 1.0)
        if isinstance(result, Exception):
            raise result
        return result

    tuned = tune(CANDIDATES[:8], measure)
    assert tuned.config in CANDIDATES[6:8]
    assert [trial.reason for trial in tuned.trials[:6]] == [
        "spills 24 registers", "RuntimeError: out of resource: shared memory", "MemoryError:", "measured nan seconds",
        "measured -1.0 seconds", "measured 0.0 seconds",
    ]  # fmt: skip
    assert all(trial.seconds is None for trial in tuned.trials[:6])


def test_one_that_fails_later_is_out():
    """A driver that runs out of memory at the tenth launch: the config is not chosen for its nine good samples."""
    seen = []

    def measure(config):
        seen.append(config)
        if config == CANDIDATES[1]:
            return 0.1 if seen.count(config) < 3 else Unusable("gone")
        return 1.0 if config == CANDIDATES[2] else 2.0

    assert tune(CANDIDATES[:3], measure).config == CANDIDATES[2]


def test_nothing_usable_is_no_config_and_no_record(folder):
    tuned = tune(CANDIDATES[:5], lambda config: Unusable("no"), KEY)
    assert tuned.config is None and records() == [] and not folder.exists()
    assert tune((), lambda config: 1.0).config is None


def test_an_interrupt_is_not_swallowed():
    def measure(config):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(CANDIDATES[:3], measure)


def test_the_budget_ends_it_and_says_what_was_not_tried():
    def slow(config):
        time.sleep(0.02)
        return 1.0

    tuned = tune(CANDIDATES[:20], slow, budget_s=0.1)
    assert tuned.took_s < 0.5
    left = [trial for trial in tuned.trials if trial.reason == "not tried: the time was up"]
    assert 10 < len(left) < 20 and tuned.config == CANDIDATES[0]
    assert tune(CANDIDATES[:20], slow, budget_s=0.0).config == CANDIDATES[0], "one is always tried"


def test_half_a_round_decides_nothing():
    """The time is up when only the slow ones were measured again: the fastest of the round before wins."""
    took = {config: 1.0 + index for index, config in enumerate(reversed(CANDIDATES[:12]))}
    seen = []

    def measure(config):
        seen.append(config)
        if len(seen) == 13:
            time.sleep(0.3)
        return took[config]

    assert tune(CANDIDATES[:12], measure, budget_s=0.2).config == CANDIDATES[11]
    assert len(seen) == 13


def test_progress_ends_at_the_total():
    seen = []
    tune(CANDIDATES[:10], lambda config: 1.0, progress=lambda done, total, text: seen.append((done, total, text)))
    assert [done for done, _, _ in seen] == list(range(1, len(seen) + 1))
    assert all(done <= total for done, total, _ in seen) and seen[0][2] == str(CANDIDATES[0])
    assert seen[-1][1] - seen[-1][0] <= 8


# ---- choose -------------------------------------------------------------------------------------------------


def test_off_is_the_default_and_opens_nothing(monkeypatch, folder):
    remember(KEY, RECORD)
    monkeypatch.setenv("SPARSEDSL_TUNE", "off")
    monkeypatch.setattr(tuning_records, "Store", None)  # whoever asks for one fails
    measure = stopwatch({})
    assert forward(measure=measure) == Chosen(DEFAULT, "default")
    assert measure.asked == []


def test_cached_takes_what_is_remembered():
    remember(KEY, RECORD)
    measure = stopwatch({})
    assert forward(measure=measure) == Chosen(FAST, "measured 2026-01-02", 1e-3)
    assert measure.asked == []


def test_cached_asks_the_cost_model_where_nothing_is_remembered(folder):
    measure = stopwatch({})
    found = forward(measure=measure)
    assert found.source == "cost model" and found.config in space("forward", SHAPE, SM_90, WORK) and found.seconds is None
    assert measure.asked == [] and not folder.exists(), "an expectation is not remembered"
    assert forward(work=None).source == "cost model", "the second call is a lookup"


def test_without_counts_the_cost_model_has_nothing_to_say():
    assert forward(work=None) == Chosen(DEFAULT, "default")


def test_the_cost_model_counts_the_tiles_of_the_call():
    wide, narrow = (dataclasses.replace(KEY, density=name) for name in ("wide", "narrow"))
    chosen = [
        forward(key, work=Work(), tiles_at=lambda block, width=width: banded_tiles(16384, 16384, width, block, copies=16)).config
        for key, width in ((wide, 16384), (narrow, 32))
    ]
    assert chosen[0].block_m * chosen[0].block_n > chosen[1].block_m * chosen[1].block_n


def test_full_measures_once_and_remembers(monkeypatch):
    monkeypatch.setenv("SPARSEDSL_TUNE", "full")
    measure = stopwatch({FAST: 1e-3})
    found = forward(measure=measure)
    assert found.config == FAST and found.seconds == 1e-3 and found.source.startswith("measured 20")
    asked = len(measure.asked)
    assert forward(measure=measure) is found
    next_process(monkeypatch)
    assert forward(measure=measure) == found and len(measure.asked) == asked
    monkeypatch.setenv("SPARSEDSL_TUNE", "cached")
    assert forward() == found
    ((key, record),) = records()
    assert key == json.loads(json.dumps(KEY.to_json())) and record.default_seconds == 5e-3
    assert 0 < record.tried <= autotune.MOST_CANDIDATES and record.unusable == 0
    assert set(measure.asked) <= set(space("forward", SHAPE, SM_90, WORK)) and measure.asked[0] == DEFAULT


def test_full_where_nothing_can_be_run_now_waits_for_the_next_call(monkeypatch):
    monkeypatch.setenv("SPARSEDSL_TUNE", "full")
    assert forward().source == "cost model"
    assert forward(measure=stopwatch({FAST: 1e-3})).config == FAST


def test_full_where_every_candidate_fails_takes_the_default_with_one_note(monkeypatch, notes, folder):
    monkeypatch.setenv("SPARSEDSL_TUNE", "full")
    calls = []

    def measure(config):
        calls.append(config)
        raise RuntimeError("no device")

    for _ in range(3):
        assert forward(measure=measure) == Chosen(DEFAULT, "default")
    assert len(calls) <= autotune.MOST_CANDIDATES
    assert notes() == ["no config of forward could be measured (RuntimeError: no device): the default is used"]
    assert records() == []


def test_a_wrong_switch_is_refused(monkeypatch):
    monkeypatch.setenv("SPARSEDSL_TUNE", "always")
    with pytest.raises(SettingsError, match="SPARSEDSL_TUNE"):
        forward()


def test_a_later_call_is_a_lookup(monkeypatch):
    forward()
    monkeypatch.setattr(autotune, "_find", None)
    start = time.perf_counter()
    for _ in range(2000):
        forward()
    assert (time.perf_counter() - start) / 2000 < 100e-6


@pytest.mark.parametrize("kernel", ["decode", "merge", "delta", "grad_q", "grad_kv", "grad_difference_0"])
def test_every_kernel_can_be_tuned(monkeypatch, kernel):
    monkeypatch.setenv("SPARSEDSL_TUNE", "full")
    key, candidates = dataclasses.replace(KEY, kernel=kernel), space(kernel, SHAPE, SM_90)
    found = choose(kernel, SHAPE, SM_90, key, stopwatch({candidates[-1]: 1e-3, candidates[0]: 1.0}, otherwise=2.0))
    assert found.config in candidates and found.source.startswith("measured")


def test_threads_that_ask_at_once_measure_once(monkeypatch):
    monkeypatch.setenv("SPARSEDSL_TUNE", "full")
    running, most = [], []

    def measure(config):
        running.append(1)
        most.append(len(running))
        time.sleep(0.001)
        running.pop()
        return 1.0

    got = []
    crowd = [threading.Thread(target=lambda: got.append(forward(measure=measure))) for _ in range(6)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert len(got) == 6 and len(set(got)) == 1 and max(most) == 1
    assert len(most) < 2 * autotune._measurements(autotune.MOST_CANDIDATES)


def test_a_child_forked_while_another_thread_measures_is_not_stuck():
    held, done = threading.Event(), threading.Event()

    def hold():
        with autotune._lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    child = multiprocessing.get_context("fork").Process(target=forward)
    child.start()
    child.join(30)
    done.set()
    thread.join()
    stuck = child.is_alive()
    child.kill()
    assert not stuck and child.exitcode == 0


# ---- keys ---------------------------------------------------------------------------------------------------


def test_whatever_a_result_depends_on_is_in_its_key():
    changes = [
        {"dtype": "float16"},
        {"head_dim": 80},
        {"head_dim_v": 80},
        {"group": 4},
        {"precision": "tf32"},
        {"aligned": False},
    ]
    shapes = [dataclasses.replace(SHAPE, **change) for change in changes]
    others = [
        tuning_key("another", "forward", SHAPE, KEY.density, SM_90),
        tuning_key("a pattern", "grad_q", SHAPE, KEY.density, SM_90),
        tuning_key("a pattern", "forward", SHAPE, density_class(0.9, 1024), SM_90),
        tuning_key("a pattern", "forward", SHAPE, KEY.density, target_named("sm_80")),
        tuning_key("a pattern", "forward", SHAPE, KEY.density, dataclasses.replace(SM_90, device="H200")),
        tuning_key("a pattern", "forward", SHAPE, KEY.density, dataclasses.replace(SM_90, sms=66)),
        *(tuning_key("a pattern", "forward", shape, KEY.density, SM_90) for shape in shapes),
        dataclasses.replace(KEY, torch="9"),
        dataclasses.replace(KEY, triton="9"),
    ]  # fmt: skip
    remember(KEY, RECORD)
    assert len({KEY, *others}) == 1 + len(others)
    assert all(recall(key, lambda config: None) is None for key in others)
    assert recall(KEY, lambda config: None) == RECORD


def test_density_classes_are_few_and_ordered():
    classes = {density_class(share / 1000, width) for share in range(1001) for width in (1, 50, 1000, 10**6)}
    assert len(classes) == 6 * 4
    assert density_class(0.10, 1024) == density_class(0.09, 1100)


# ---- what is remembered is not trusted ----------------------------------------------------------------------

BAD = {
    "no mapping": 64,
    "other fields": {"config": FAST.to_json()},
    "config of text": RECORD.to_json() | {"config": "64x64"},
    "impossible tile": RECORD.to_json() | {"config": FAST.to_json() | {"block_m": 4096}},
    "negative seconds": RECORD.to_json() | {"seconds": -1.0},
    "seconds of text": RECORD.to_json() | {"seconds": "fast"},
    "no date": RECORD.to_json() | {"measured": "yesterday"},
    "count of text": RECORD.to_json() | {"tried": "many"},
    "too much shared memory": RECORD.to_json() | {"config": Config(256, 256, 8, 8).to_json()},
    "descriptors that the source does not have": RECORD.to_json() | {"config": FAST.to_json() | {"descriptors": True}},
}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_a_record_that_cannot_be_launched_is_ignored_with_one_note(folder, notes, value):
    Store(folder).put(KEY.to_json(), value)
    for _ in range(2):
        autotune._chosen.clear()
        assert forward().source == "cost model"
    (note,) = notes()
    assert "does not hold a config that can be launched (" in note and str(Store(folder).path(KEY.to_json())) in note


def test_a_record_of_a_larger_gpu_is_not_launched_on_a_smaller_one(folder, notes):
    """As if two GPUs had one name: sm_90 has room for three stages of 128 x 128, 99 KiB have not."""
    wide = Shape("bfloat16", 128, 128)
    small = dataclasses.replace(SM_90, shared_per_block=99 * 1024)
    key = tuning_key("a pattern", "forward", wide, "any", small)
    remember(key, dataclasses.replace(RECORD, config=Config(128, 128, 8, 3)))
    assert choose("forward", wide, SM_90, key, work=WORK).config == Config(128, 128, 8, 3)
    autotune._chosen.clear()
    found = choose("forward", wide, small, key, work=WORK)
    assert found.source == "cost model" and found.config != Config(128, 128, 8, 3)
    assert "of shared memory" in notes()[0]


# ---- a session ----------------------------------------------------------------------------------------------


def test_a_session_measures_whatever_the_switch_says():
    seen = []
    measure = stopwatch({FAST: 1e-3})
    with session(Session(chosen=lambda kernel, chosen, tuned: seen.append((kernel, chosen, tuned)))):
        found = forward(measure=measure)
    assert found.config == FAST and seen[0][:2] == ("forward", found) and seen[0][2].config == FAST
    assert forward() == found, "and it is remembered"


def test_a_session_uses_what_is_remembered_unless_told():
    remember(KEY, RECORD)
    measure = stopwatch({Config(128, 64, 4, 3): 1e-4})
    with session(Session()):
        assert forward(measure=measure).source == "measured 2026-01-02" and measure.asked == []
    with session(Session(again=True)):
        assert forward(measure=measure).config == Config(128, 64, 4, 3)
    assert recall(KEY, lambda config: None).config == Config(128, 64, 4, 3)


def test_a_session_measures_the_kernels_it_names_and_no_others():
    measure = stopwatch({FAST: 1e-3})
    with session(Session(kernels=frozenset({"grad_kv"}), again=True)):
        expected = forward(measure=measure)
        assert measure.asked == []
        assert expected.seconds is None
        assert forward(measure=measure) is expected
    assert recall(KEY, lambda config: None) is None
    with session(Session(kernels=frozenset({"forward"}))):
        assert forward(measure=measure).config == FAST
    assert recall(KEY, lambda config: None).config == FAST
    with session(Session(kernels=frozenset({"grad_kv"}), again=True)):
        assert forward(measure=stopwatch({})).config == FAST, "what is remembered serves the others"


def test_a_session_reaches_other_threads():
    """The backward pass chooses on threads of autograd's own."""
    got = []
    with session(Session()):
        thread = threading.Thread(target=lambda: got.append(forward(measure=stopwatch({FAST: 1e-3}))))
        thread.start()
        thread.join()
    assert got[0].config == FAST


# ---- files of results ---------------------------------------------------------------------------------------


def keys(count):
    return [dataclasses.replace(KEY, pattern=str(index)) for index in range(count)]


def test_results_travel(tmp_path, monkeypatch):
    for key in keys(3):
        remember(key, RECORD)
    Store(tmp_path / "cache" / "tuning").put({"kind": "machine"}, {"not": "of a kernel"})
    assert export(tmp_path / "results.json") == 3
    monkeypatch.setenv("SPARSEDSL_CACHE", str(tmp_path / "elsewhere"))
    assert str(import_(tmp_path / "results.json")) == "3 taken, 0 older than ours, 0 refused"
    assert [recall(key, lambda config: None) for key in keys(3)] == [RECORD] * 3
    assert str(import_(tmp_path / "results.json")) == "0 taken, 3 older than ours, 0 refused"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "elsewhere", "results.json"]


def test_ours_stays_if_it_is_newer_unless_told(tmp_path):
    remember(KEY, RECORD)
    export(tmp_path / "results.json")
    newer = dataclasses.replace(RECORD, config=Config(32, 32, 4, 1), measured="2026-05-01T00:00:00+00:00")
    remember(KEY, newer)
    assert import_(tmp_path / "results.json").older == 1 and recall(KEY, lambda config: None) == newer
    assert import_(tmp_path / "results.json", replace=True).taken == 1 and recall(KEY, lambda config: None) == RECORD
    export(tmp_path / "results.json")
    remember(KEY, dataclasses.replace(newer, measured="2025-05-01T00:00:00+00:00"))
    assert import_(tmp_path / "results.json").taken == 1 and recall(KEY, lambda config: None) == RECORD


ENTRY = {"key": json.loads(json.dumps(KEY.to_json())), "value": RECORD.to_json()}


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (7, "no record with a key and a value"),
        ({"key": ENTRY["key"]}, "no record with a key and a value"),
        (ENTRY | {"key": {"kind": "machine"}}, "kind 'machine' and method None"),
        (ENTRY | {"key": ENTRY["key"] | {"method": 99}}, "and method 99"),
        (ENTRY | {"key": ENTRY["key"] | {"more": 1}}, "a key with other fields"),
        (ENTRY | {"key": ENTRY["key"] | {"shape": "wide"}}, "a key with other fields"),
        (ENTRY | {"value": RECORD.to_json() | {"config": {}}}, "wanted the fields"),
        (ENTRY | {"value": RECORD.to_json() | {"seconds": 0}}, "seconds: got 0"),
    ],
)
def test_each_record_of_a_file_is_checked_for_itself(tmp_path, entry, reason):
    (tmp_path / "results.json").write_text(json.dumps({"what": "", "format": 1, "records": [entry, ENTRY]}))
    done = import_(tmp_path / "results.json")
    assert (done.taken, done.older, len(done.refused)) == (1, 0, 1)
    assert done.refused[0].startswith("record 0: ") and reason in done.refused[0]
    assert recall(KEY, lambda config: None) == RECORD


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is no JSON; wanted a file written by `python -m sparsedsl tune --export FILE`"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "holds no tuning results"),
        ('{"format": 1}', "holds no tuning results"),
        ('{"format": "1", "records": []}', "holds no tuning results"),
        ('{"format": 2, "records": []}', "was written by a newer sparsedsl (format 2, ours is 1): upgrade"),
    ],
    ids=["empty", "cut", "deep", "list", "no records", "text", "newer"],
)
def test_a_file_that_holds_no_results(tmp_path, content, problem):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SparseDSLError) as caught:
        import_(tmp_path / "results.json")
    assert problem in str(caught.value) and str(tmp_path / "results.json") in str(caught.value)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    remember(KEY, RECORD)
    export(tmp_path / "results.json")
    before = (tmp_path / "results.json").read_bytes()
    remember(keys(1)[0], RECORD)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            export(tmp_path / "results.json")
    assert (tmp_path / "results.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "results.json"]


def test_clearing_leaves_the_calibration(folder):
    remember(KEY, RECORD)
    Store(folder).put({"kind": "machine"}, 1)
    Store(folder).path(KEY.to_json()).with_name("kernel-config-damaged.json").write_text("{")
    assert clear() == 2 and records() == [] and clear() == 0
    assert Store(folder).items() == [({"kind": "machine"}, 1)]
