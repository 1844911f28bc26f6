"""What happens to a user's call when something happens to the tuning records: the table of docs/tuning.md, one test a line.

Whatever it is, ``choose`` gives a config that can be launched, what was whole before stays, and a note is logged at most once.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from source_tree import ROOT
from sparsedsl.gpu import autotune, tuning_records
from sparsedsl.gpu.autotune import choose
from sparsedsl.gpu.configs import Work, default_config, refusal, space
from sparsedsl.gpu.kernel_config import Config, Shape
from sparsedsl.gpu.targets import target_named
from sparsedsl.gpu.tuning_records import Record, recall, records, remember, tuning_key
from sparsedsl.tuning import store as store_module
from sparsedsl.tuning.store import FORMAT, Store

SM_90 = target_named("sm_90")
SHAPE = Shape("bfloat16", 64, 64)
WORK = Work(row_width=1024.0)
KEY = tuning_key("a pattern", "forward", SHAPE, "any", SM_90)
OTHER = tuning_key("another pattern", "forward", SHAPE, "any", SM_90)
KEPT = Record(Config(64, 128, 4, 2), 1e-3, 2e-3, "2026-01-02T03:04:05+00:00", 20, 3)
FAST = Config(64, 64, 4, 2)

# Line of the table -> what the call gets with a record in doubt, how many notes, and what the next process finds.
LINES = {
    "eight processes write at once": ("measured", 0, "the last"),
    "killed in the middle of writing": ("measured", 0, "the old one"),
    "cut off": ("cost model", 1, "a new one"),
    "changed": ("cost model", 1, "a new one"),
    "written by a newer release": ("cost model", 1, "theirs, untouched"),
    "of another device under our name": ("cost model", 1, "a new one"),
    "a config that this device cannot run": ("cost model", 1, "a new one"),
    "folder that cannot be written": ("measured", 1, "nothing, measured anew"),
    "disk full": ("measured", 1, "the old one"),
    "folder deleted meanwhile": ("measured", 0, "a new one"),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEDSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSEDSL_TUNE", raising=False)
    next_process()


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache" / "tuning"


@pytest.fixture
def notes(caplog):
    caplog.set_level(logging.WARNING, logger="sparsedsl")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "sparsedsl"]


def next_process():
    """What a new process knows: nothing."""
    autotune._chosen.clear()
    tuning_records._noted.clear()
    store_module._kept.clear()
    store_module._cleaned.clear()
    store_module._noted.clear()


def call(measure=None, key=KEY):
    """A user's call, as far as tuning goes: its config can be launched, whatever else."""
    chosen = choose("forward", SHAPE, SM_90, key, measure, work=WORK)
    assert refusal("forward", SHAPE, SM_90, WORK, chosen.config) is None
    assert chosen.config in space("forward", SHAPE, SM_90, WORK)
    return chosen


def measuring(config):
    return 1e-3 if config == FAST else 2e-3


def assert_line(name, folder, notes, monkeypatch, *, during=None):
    """The line of the table: three calls now, one that measures, and one in the next process."""
    source, count, after = LINES[name]
    with monkeypatch.context() as patch:
        if during is not None:
            during(patch)
            patch.setenv("SPARSEDSL_TUNE", "full")
        found = [call(measuring if during else None)]
        autotune._chosen.clear()
        found.append(call(measuring if during else None))
        assert found[0] == found[1] and found[0].source.startswith(source)
        assert len(notes()) == count, notes()
    if during is None:
        monkeypatch.setenv("SPARSEDSL_TUNE", "full")
        autotune._chosen.clear()
        assert call(measuring).source.startswith("measured")
        monkeypatch.setenv("SPARSEDSL_TUNE", "cached")
        assert len(notes()) == count, "one note, however many calls"
    next_process()
    stored = recall(KEY, lambda config: None)
    wanted = {"the old one": KEPT.config, "a new one": FAST, "nothing, measured anew": None, "theirs, untouched": None}[after]
    assert (stored and stored.config) == wanted
    call()


@pytest.fixture
def whole():
    """One record in doubt, and one that nothing happens to."""
    remember(KEY, KEPT)
    remember(OTHER, KEPT)
    return Store(tuning_records._store().folder).path(KEY.to_json())


@pytest.fixture
def other_stays():
    """What was whole is still there at the end of the test."""
    yield
    next_process()
    assert recall(OTHER, lambda config: None) == KEPT


# ---- the file ----------------------------------------------------------------------------------------------


def test_cut_off(whole, folder, notes, monkeypatch, other_stays):
    whole.write_bytes(whole.read_bytes()[:150])
    assert_line("cut off", folder, notes, monkeypatch)


@pytest.mark.parametrize("damage", ["a digit", "empty", "zeros", "no text", "other json"])
def test_changed(whole, folder, notes, monkeypatch, other_stays, damage):
    content = whole.read_bytes()
    whole.write_bytes(
        {
            "a digit": content.replace(b'"block_n": 128', b'"block_n": 256'),
            "empty": b"",
            "zeros": bytes(len(content)),
            "no text": bytes(range(128, 256)),
            "other json": b'{"config": {"block_m": 64}}',
        }[damage]
    )
    assert whole.read_bytes() != content
    assert_line("changed", folder, notes, monkeypatch)


def test_written_by_a_newer_release(whole, folder, notes, monkeypatch, other_stays):
    newer = json.dumps({"format": FORMAT + 1, "everything": "else"}).encode()
    whole.write_bytes(newer)
    assert_line("written by a newer release", folder, notes, monkeypatch)
    assert whole.read_bytes() == newer


def test_of_another_device_under_our_name(whole, folder, notes, monkeypatch, other_stays):
    """As if someone had renamed the file that another GPU wrote."""
    theirs = replace(KEY, device="B200, sm_100, 148 SMs")
    remember(theirs, KEPT)
    os.replace(Store(folder).path(theirs.to_json()), whole)
    assert_line("of another device under our name", folder, notes, monkeypatch)


@pytest.mark.parametrize(
    "config",
    [Config(256, 256, 8, 8), Config(128, 128, 4, 1, descriptors=True), Config(16, 256, 1, 1)],
    ids=["shared memory", "descriptors", "registers"],
)
def test_a_config_that_this_device_cannot_run(whole, folder, notes, monkeypatch, other_stays, config):
    """A whole record, under our key, of a driver that said otherwise then."""
    remember(KEY, replace(KEPT, config=config))
    assert_line("a config that this device cannot run", folder, notes, monkeypatch)


# ---- the disk ----------------------------------------------------------------------------------------------


def test_folder_that_cannot_be_written(folder, notes, monkeypatch):
    def read_only(patch):
        patch.setattr(os, "open", disk_error(errno.EROFS))
        patch.setattr(Path, "mkdir", disk_error(errno.EROFS))

    assert_line("folder that cannot be written", folder, notes, monkeypatch, during=read_only)
    assert not folder.exists()


def test_a_folder_that_really_cannot_be(monkeypatch, notes):
    """/dev/null is no folder for anyone, root included."""
    monkeypatch.setenv("SPARSEDSL_CACHE", "/proc/nowhere")
    monkeypatch.setenv("SPARSEDSL_TUNE", "full")
    assert call(measuring).config == FAST
    autotune._chosen.clear()
    assert call(None).config == FAST, "kept for this process"
    assert len(notes()) == 1 and "cannot be written" in notes()[0]


def test_disk_full(whole, folder, notes, monkeypatch, other_stays):
    def full(patch):
        patch.setattr(os, "fsync", disk_error(errno.ENOSPC))
        patch.setattr(autotune, "_session", autotune.Session(again=True))

    assert_line("disk full", folder, notes, monkeypatch, during=full)
    assert [path.name for path in folder.iterdir() if path.suffix != ".json"] == []


def disk_error(number: int):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


def test_folder_deleted_meanwhile(whole, folder, notes, monkeypatch):
    deleted = []

    def measure_and_delete(config):
        shutil.rmtree(folder.parent, ignore_errors=True)
        deleted.append(config)
        return measuring(config)

    monkeypatch.setenv("SPARSEDSL_TUNE", "full")
    monkeypatch.setattr(autotune, "_session", autotune.Session(again=True))
    source, count, _ = LINES["folder deleted meanwhile"]
    assert call(measure_and_delete).source.startswith(source) and deleted
    assert len(notes()) == count
    monkeypatch.setattr(autotune, "_session", None)
    next_process()
    assert call().config == FAST


# ---- other processes ---------------------------------------------------------------------------------------

WRITER = """
import os, sys
from dataclasses import replace
from sparsedsl.gpu import autotune
from sparsedsl.gpu.autotune import Session, choose, session
from sparsedsl.gpu.configs import Work, space
from sparsedsl.gpu.kernel_config import Shape
from sparsedsl.gpu.targets import target_named
from sparsedsl.gpu.tuning_records import tuning_key
me, turns = int(sys.argv[1]), int(sys.argv[2])
shape, target, work = Shape("bfloat16", 64, 64), target_named("sm_90"), Work(row_width=1024.0)
shared = tuning_key("a pattern", "forward", shape, "any", target)
candidates = space("forward", shape, target, work)
mine = autotune._by_expectation("forward", shape, target, work, None)[1 + me % 5]
for turn in range(turns):
    own = tuning_key(f"{me} {turn}", "forward", shape, "any", target)
    for key in (shared, own):
        with session(Session(again=True)):
            chosen = choose("forward", shape, target, key, lambda config: 1e-3 if config == mine else 2e-3, work=work)
        assert chosen.source.startswith("measured"), chosen
    autotune._chosen.clear()
    found = choose("forward", shape, target, shared, work=work)
    assert found.source.startswith("measured") and found.config in candidates, found
print("done")
"""


def favourite(me):
    """The config that writer ``me`` finds the fastest."""
    return autotune._by_expectation("forward", SHAPE, SM_90, WORK, None)[1 + me % 5]


def start(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def test_eight_processes_write_at_once(folder, notes):
    crowd = [start(WRITER, me, 4) for me in range(8)]
    assert [process.communicate(timeout=120) for process in crowd] == [("done\n", "")] * 8
    source, count, _ = LINES["eight processes write at once"]
    assert call().source.startswith(source) and len(notes()) == count
    found = records()
    assert len(found) == 1 + 8 * 4 == len(list(folder.iterdir())), "nothing is lost, nothing is left over"
    own = {key["pattern"]: record.config for key, record in found}
    assert all(own[f"{me} {turn}"] == favourite(me) for me in range(8) for turn in range(4))


HELD = """
import os, sys, time
def hold(*args):
    print("holding", flush=True)
    time.sleep(60)
setattr(os, "{step}", hold)
"""


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_killed_in_the_middle_of_writing(whole, folder, notes, other_stays, step):
    child = start(HELD.replace("{step}", step) + WRITER, 1, 1)
    try:
        assert child.stdout is not None and child.stdout.readline() == "holding\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)
    source, count, _ = LINES["killed in the middle of writing"]
    found = call()
    assert (found.config, found.source) == (KEPT.config, f"{source} 2026-01-02") and len(notes()) == count
    assert sorted(key["pattern"] for key, _ in records()) == ["a pattern", "another pattern"]


def test_killed_at_any_time(whole, folder, notes, other_stays):
    for delay in (0.0, 0.013):
        child = start(WRITER, 2, 10**9)
        while len(list(folder.glob("*.json"))) < 5:
            time.sleep(0.005)
        time.sleep(delay)
        child.kill()
        assert child.communicate(timeout=60)[0] == ""
        autotune._chosen.clear()
        assert call().source.startswith("measured") and notes() == []
        for key, record in records():
            assert record.config in (KEPT.config, favourite(2)), key


def test_a_real_limit_on_the_size_of_files(whole, folder, notes, other_stays):
    """The kernel of the system refuses in the middle of the file, as a full disk does: the call goes on, the old record stays."""
    code = WRITER.replace("import os, sys", "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))")
    assert code != WRITER and resource.RLIMIT_FSIZE
    out, err = start(code, 1, 2).communicate(timeout=60)
    assert out == "done\n" and err.count("cannot be written") == 1, err
    assert call().config == KEPT.config and notes() == []
    assert len(records()) == 2 == len(list(folder.iterdir()))


# ---- the table ---------------------------------------------------------------------------------------------


def test_the_docs_have_the_table():
    text = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    table = {row[0]: tuple(row[1:]) for row in rows}
    for name, (source, count, after) in LINES.items():
        assert table[name] == (source, "one" if count else "none", after), name


def test_off_needs_no_folder(monkeypatch):
    monkeypatch.setenv("SPARSEDSL_CACHE", "/proc/nowhere")
    monkeypatch.setenv("SPARSEDSL_TUNE", "off")
    assert call(measuring).config == default_config("forward", SHAPE, SM_90)
