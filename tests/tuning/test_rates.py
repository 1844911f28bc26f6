"""Measuring this machine: what SPARSEDSL_TUNE says is done, whatever goes wrong, and nothing of the caller's changes."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from source_tree import ROOT
from sparsedsl.errors import SettingsError
from sparsedsl.tuning import rates as measure_module
from sparsedsl.tuning.machine import BUILT_IN, ROWS, Machine
from sparsedsl.tuning.rates import MEASURING, has_linear, machine, machine_key, measure
from sparsedsl.tuning.store import Store

OURS = replace(BUILT_IN if has_linear() else BUILT_IN.without_linear(), name="ours", source="measured 2026-01-01")


@pytest.fixture(autouse=True)
def new_process(monkeypatch, tmp_path):
    """Nothing measured yet, an empty cache."""
    monkeypatch.setattr(measure_module, "_machines", {})
    monkeypatch.setenv("SPARSEDSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSEDSL_TUNE", raising=False)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "tuning"


@pytest.fixture
def measured(monkeypatch):
    """Stand in for the stopwatch: machines named "1", "2", .. in the order they are measured."""
    made: list[Machine] = []

    def stand_in() -> Machine:
        made.append(replace(OURS, name=str(len(made) + 1)))
        return made[-1]

    monkeypatch.setattr(measure_module, "measure", stand_in)
    return made


@pytest.fixture
def notes(caplog):
    caplog.set_level(logging.WARNING, logger="sparsedsl")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "sparsedsl"]


@pytest.fixture
def threads():
    """Change the number of threads; it is set back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def next_process(monkeypatch):
    monkeypatch.setattr(measure_module, "_machines", {})


# ---- the three modes ----------------------------------------------------------------------------------------


def test_cached_measures_once_and_remembers(measured, folder, monkeypatch, notes):
    first = machine()
    assert first.name == "1" and machine() is first
    assert Store(folder).items() == [(machine_key(), first.to_json())]
    next_process(monkeypatch)
    assert machine() == first and len(measured) == 1
    assert notes() == []


def test_full_measures_anew_once_a_process_and_remembers(measured, folder, monkeypatch):
    machine()
    next_process(monkeypatch)
    monkeypatch.setenv("SPARSEDSL_TUNE", "full")
    assert machine().name == "2" and machine().name == "2"
    next_process(monkeypatch)
    monkeypatch.setenv("SPARSEDSL_TUNE", "cached")
    assert machine().name == "2"


def test_off_measures_reads_and_writes_nothing(measured, folder, monkeypatch):
    monkeypatch.setenv("SPARSEDSL_TUNE", "off")
    monkeypatch.setattr(measure_module, "Store", None)  # whoever asks for one fails
    wanted = BUILT_IN if has_linear() else BUILT_IN.without_linear()
    assert machine() == wanted and machine() is machine()
    assert measured == [] and not folder.parent.exists()


def test_off_takes_no_notice_of_what_is_remembered(measured, folder, monkeypatch):
    Store(folder).put(machine_key(), OURS.to_json())
    assert machine().name == "ours"
    monkeypatch.setenv("SPARSEDSL_TUNE", "off")
    assert machine().source == "built in"


def test_off_says_the_same_in_every_process_and_opens_no_file_of_the_cache(tmp_path):
    code = (
        "import os, sys\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event in ('open', 'os.mkdir', 'os.listdir') else None)\n"
        "from sparsedsl.tuning.rates import machine\n"
        "print(machine().fingerprint(), any(os.environ['SPARSEDSL_CACHE'] in path for path in opened), len(opened) > 10)"
    )
    environment = {**os.environ, "SPARSEDSL_TUNE": "off", "SPARSEDSL_CACHE": str(tmp_path / "none"), "OMP_NUM_THREADS": "1"}
    wanted = BUILT_IN if has_linear() else BUILT_IN.without_linear()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [wanted.fingerprint(), "False", "True"], done.stderr
    assert not (tmp_path / "none").exists()


def test_the_switch_is_read_in_every_call(measured, monkeypatch):
    machine()
    monkeypatch.setenv("SPARSEDSL_TUNE", "sometimes")
    with pytest.raises(SettingsError, match="valid values: cached, off, full"):
        machine()


def test_each_number_of_threads_is_a_machine_of_its_own(measured, threads):
    names = []
    for count in (1, 2, 1, 2):
        threads(count)
        names.append(machine().name)
    assert names == ["1", "2", "1", "2"]


def test_later_calls_are_cheap(measured, monkeypatch):
    machine()
    monkeypatch.setattr(measure_module, "settings", None)
    monkeypatch.setattr(measure_module, "machine_key", None)
    start = time.perf_counter()
    for _ in range(2000):
        machine()
    assert (time.perf_counter() - start) / 2000 < 50e-6


def test_threads_that_ask_at_once_measure_once(measured, monkeypatch):
    slow = measure_module.measure
    monkeypatch.setattr(measure_module, "measure", lambda: (time.sleep(0.05), slow())[1])
    got: list[Machine] = []
    crowd = [threading.Thread(target=lambda: got.append(machine())) for _ in range(6)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert [one.name for one in got] == ["1"] * 6


def test_a_child_forked_while_somebody_measures_is_not_stuck(measured):
    with measure_module._lock:
        child = multiprocessing.get_context("fork").Process(target=machine)
        child.start()
    child.join(30)
    stuck = child.is_alive()
    child.kill()
    assert not stuck and child.exitcode == 0


# ---- what goes wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [{"rates": 1}, [1], "fast", OURS.to_json() | {"call_us": -3}], ids=["fields", "list", "text", "rate"]
)
def test_a_record_that_is_no_machine_is_measured_anew_with_a_note(measured, folder, notes, value):
    Store(folder).put(machine_key(), value)
    assert machine().name == "1"
    assert len(notes()) == 1 and "does not hold the speed of a machine" in notes()[0]
    assert Store(folder).get(machine_key()) == machine().to_json()


def test_a_damaged_file_is_measured_anew_with_a_note(measured, folder, notes):
    Store(folder).put(machine_key(), OURS.to_json())
    path = Store(folder).path(machine_key())
    path.write_bytes(path.read_bytes()[:100])
    assert machine().name == "1"
    assert len(notes()) == 1 and "is damaged" in notes()[0]
    assert Store(folder).get(machine_key()) == machine().to_json()


def test_a_full_disk_costs_a_note(measured, monkeypatch, notes):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert machine().name == "1" and machine().name == "1"
    assert len(notes()) == 1 and "No space left" in notes()[0]


def test_no_home_folder_costs_a_note(measured, monkeypatch, notes):
    monkeypatch.delenv("SPARSEDSL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert machine().name == "1"
    assert len(notes()) == 1 and "/dev/null" in notes()[0]


def test_a_measurement_that_fails_costs_a_note_and_is_not_remembered(monkeypatch, folder, notes):
    def broken():
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(measure_module, "_probes", broken)
    assert machine().source == "built in" and machine() is machine()
    assert notes() == ["measuring the machine failed (RuntimeError: could not create a primitive): built-in numbers are used"]
    assert not folder.exists()


# ---- the measurement ----------------------------------------------------------------------------------------


@pytest.fixture
def calm(options):
    """Measure even where other programs are at work, as they are while tests run."""
    options(MEASURING, calm=float("inf"), turns=False)


def test_a_busy_machine_is_not_remembered(folder, options, notes):
    options(MEASURING, calm=0.0)  # no machine is as calm as this
    assert machine().source == "built in"
    assert not list(folder.glob("*.json"))


def test_products_that_all_take_one_turn_of_the_scheduler_are_no_rates():
    turn, work = 8e-3, {("matmul", m): m * 1e-6 for m in ROWS}
    assert measure_module._waits(dict.fromkeys(work, turn))
    assert not measure_module._waits(work) and not measure_module._waits({name: 100 * s for name, s in work.items()})


def test_the_numbers_are_those_of_a_machine(calm):
    start = time.perf_counter()
    found = measure()
    assert time.perf_counter() - start < 5
    assert Machine.from_json(found.to_json()) == found
    assert found.source.startswith("measured 20") and f"{torch.get_num_threads()} threads" in found.name
    assert found.has_linear is has_linear()
    # What no machine can be: this finds a wrong block or a wrong count, not a slow day.
    rates = (*found.matmul_gflops, *found.batched_gflops, found.flash_gflops)
    assert all(0.05 < rate < 50_000 for rate in rates), found
    assert 1e-4 < found.pass_ns < 50 and found.pass_ns < 20 * found.softmax_ns and found.softmax_ns < 200
    assert 0.05 < found.call_us < 2000 and 0.05 < found.gather_gbs < 5000


@pytest.fixture
def spy(monkeypatch):
    """Count what each probe computes, from the shapes it is called with."""
    measured_rates = {}

    def rates(probes):
        for name, probe in probes.items():
            measured_rates[name] = probe
        return {name: 1.0 for name in probes}, False

    monkeypatch.setattr(measure_module, "_best_seconds", rates)
    return measured_rates


def test_each_rate_counts_what_its_probe_computes(spy):
    from torch.utils.flop_counter import FlopCounterMode

    found = measure()  # every probe "takes a second"
    for row, m in enumerate(ROWS):
        for name, rate in (("matmul", found.matmul_gflops[row]), ("batched", found.batched_gflops[row])):
            with FlopCounterMode(display=False) as counter:
                spy[name, m]()
            assert counter.get_total_flops() == pytest.approx(rate * 1e9), (name, m)
        if has_linear():
            assert found.linear_gflops[row] == found.matmul_gflops[row]
            torch.testing.assert_close(spy["linear", m](), spy["matmul", m]())
    assert found.flash_gflops * 1e9 == 2 * (2 * 2 * 1024 * 1024 * 64)
    assert spy["flash", 0]()[0].shape == (1, 2, 1024, 64)
    rows = spy["gather", 0]()
    assert found.gather_gbs * 1e9 == pytest.approx(2 * rows.numel() * 4) and rows.shape[1] == 64


def test_nothing_of_the_callers_changes(calm):
    random.seed(1)
    torch.manual_seed(1)
    before = (random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype())
    measure()
    has_linear.cache_clear()
    has_linear()
    assert before == (random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype())
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


SURROUNDINGS = {
    "fake": fake,
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_the_surroundings_of_the_call_do_not_matter(surroundings, options):
    here = has_linear()
    has_linear.cache_clear()
    options(MEASURING, seconds=0.0)
    with surroundings():
        assert has_linear() is here
        has_linear.cache_clear()
        assert Machine.from_json(measure().to_json()).has_linear is here


def test_transforms_around_the_call_do_not_matter(options):
    here = has_linear()
    options(MEASURING, seconds=0.0)

    def loss(x):
        has_linear.cache_clear()
        assert measure().has_linear is here
        return x.sum()

    torch.vmap(torch.func.grad(loss))(torch.ones(2, 3))


def test_the_default_dtype_does_not_matter(spy):
    torch.set_default_dtype(torch.float64)
    try:
        measure()
        assert {probe().dtype for (name, _), probe in spy.items() if name in ("matmul", "batched", "gather")} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


# ---- the operator of oneDNN ---------------------------------------------------------------------------------


def wrong_by_one(x, w):
    return torch.mm(x, w.T) + 1


def absent(x, w):
    return torch.ops.mkldnn._no_such_operator(x, w)


@pytest.mark.parametrize("linear", [wrong_by_one, absent])
def test_an_operator_that_is_absent_or_wrong_is_not_used(monkeypatch, linear):
    monkeypatch.setattr(measure_module, "linear", linear)
    has_linear.cache_clear()
    try:
        assert has_linear() is False
        assert measure().linear_gflops == (0.0,) * len(ROWS)
        assert machine_key()["linear"] is False
        monkeypatch.setenv("SPARSEDSL_TUNE", "off")
        assert machine() == BUILT_IN.without_linear()
    finally:
        has_linear.cache_clear()


def test_the_operator_is_there_in_the_torch_we_develop_with():
    if not torch.backends.mkldnn.is_available() or torch.__version__.split("+")[0] != "2.13.0":
        pytest.skip("another torch, or one without oneDNN")
    assert has_linear()


def test_the_key_is_json_and_names_what_matters():
    assert json.loads(json.dumps(machine_key())) == machine_key()
    assert machine_key()["torch"] == torch.__version__ and machine_key()["processor"]
