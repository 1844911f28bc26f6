"""The store on disk: what is put comes back, whole or not at all, whatever happens to the disk and to other processes."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from source_tree import ROOT
from sparsedsl.tuning import store as store_module
from sparsedsl.tuning.store import FORMAT, Store

KEY = {"kind": "tile", "rows": 512, "window": [1, None]}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache" / "tuning"


@pytest.fixture
def notes(caplog):
    """The warnings of "sparsedsl" so far."""
    caplog.set_level(logging.WARNING, logger="sparsedsl")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "sparsedsl"]


def forget_this_process(folder: Path) -> None:
    """What a new process knows of the folder: nothing."""
    store_module._kept.pop(folder, None)
    store_module._cleaned.discard(folder)
    store_module._noted.clear()


def disk_error(number: int):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


# ---- what is put comes back ---------------------------------------------------------------------------------


def test_what_is_put_comes_back_and_the_folder_is_made_by_the_first_put(folder):
    assert Store(folder).get(KEY) is None
    assert Store(folder).items() == []
    assert not folder.parent.exists()
    assert Store(folder).put(KEY, {"block": 64}) is True
    assert Store(folder).get(dict(reversed(KEY.items()))) == {"block": 64}
    assert Store(folder).items() == [(KEY, {"block": 64})]
    assert Store(folder).put(KEY, {"block": 128}) is True
    assert [value for _, value in Store(folder).items()] == [{"block": 128}]
    assert [path.name for path in folder.iterdir()] == [Store(folder).path(KEY).name]


def test_a_record_says_what_it_is(folder):
    Store(folder).put(KEY, 64)
    record = json.loads(Store(folder).path(KEY).read_text())
    assert (record["key"], record["value"], record["format"]) == (KEY, 64, FORMAT)
    assert record["written"].endswith("+00:00")


@pytest.mark.parametrize(
    ("key", "start"),
    [
        ({"kind": "../../Tile sizes"}, "tile-sizes-"),
        ({"kind": "ä" * 300}, "record-"),
        ({}, "record-"),
        ({"kind": "x" * 300}, "x" * 32),
    ],
    ids=["path", "letters", "none", "long"],
)
def test_the_name_of_the_file_is_harmless(folder, key, start):
    assert Store(folder).path(key).parent == folder
    assert Store(folder).path(key).name.startswith(start)
    assert len(Store(folder).path(key).name) < 80
    assert Store(folder).put(key, 1) and Store(folder).get(key) == 1


@given(st.dictionaries(st.text(), JSON, max_size=4), JSON, JSON)
@settings(max_examples=60)
def test_any_json_comes_back(tmp_path_factory, key, value, other):
    store = Store(tmp_path_factory.getbasetemp() / "any")
    for wanted in (value, other):
        assert store.put(key, wanted) is True
        got = store.get(key)
        assert got == wanted and repr(got) == repr(json.loads(json.dumps(wanted, sort_keys=True)))
    assert (key, other) in store.items()


@given(st.dictionaries(st.text(max_size=2), JSON, max_size=2), st.dictionaries(st.text(max_size=2), JSON, max_size=2))
@settings(max_examples=60)
def test_two_keys_are_one_only_if_they_are_the_same_json(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (Store(Path("/cache")).path(one) == Store(Path("/cache")).path(other)) is same


@pytest.mark.parametrize("value", [{1, 2}, {1: "a", "1": "b"}, object()], ids=["set", "keys", "object"])
def test_what_is_no_json_is_refused_and_nothing_is_written(folder, value):
    with pytest.raises(TypeError):
        Store(folder).put(KEY, value)
    with pytest.raises(TypeError):
        Store(folder).get({"value": value})
    assert not folder.exists()


def test_a_value_belongs_to_the_one_who_got_it(folder, monkeypatch):
    for keep in (False, True):
        if keep:
            monkeypatch.setattr(os, "replace", disk_error(errno.ENOSPC))
        value = {"blocks": [64]}
        Store(folder).put(KEY, value)
        value["blocks"].append(1)
        Store(folder).get(KEY)["blocks"].append(2)
        assert Store(folder).get(KEY) == {"blocks": [64]}


# ---- files that are damaged, or not ours --------------------------------------------------------------------


def record_of(folder: Path) -> dict:
    return json.loads(Store(folder).path(KEY).read_text())


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "last byte": lambda content: content[:-1],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "random": lambda content: random.Random(0).randbytes(400),
    "one digit": lambda content: content.replace(b"812.5", b"812.6"),
    "other json": lambda content: b"[1, 2, 3]",
    "other object": lambda content: b'{"block": 64}',
    "deep": lambda content: b"[" * 200_000,
    "long number": lambda content: b"1" * 20_000,
    "null": lambda content: b"null",
    "format is text": lambda content: content.replace(b'"format": 1', b'"format": "1"'),
    "format is true": lambda content: content.replace(b'"format": 1', b'"format": true'),
    "older format": lambda content: content.replace(b'"format": 1', b'"format": 0'),
    "key is a list": lambda content: json.dumps(json.loads(content) | {"key": [1]}).encode(),
    "no value": lambda content: json.dumps({k: v for k, v in json.loads(content).items() if k != "value"}).encode(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_ignored_with_one_note_and_replaced(folder, notes, damage):
    other = {"kind": "another"}
    Store(folder).put(KEY, {"took_us": 812.5})
    Store(folder).put(other, 7)
    path = Store(folder).path(KEY)
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert path.read_bytes() != before
    for _ in range(3):
        assert Store(folder).get(KEY) is None
        assert Store(folder).items() == [(other, 7)]
    (note,) = notes()
    assert note.startswith(f"{path} is damaged or not ours (") and "replaced when its value is next remembered" in note
    assert Store(folder).put(KEY, {"took_us": 5}) is True
    assert Store(folder).get(KEY) == {"took_us": 5}
    assert len(notes()) == 1


@given(st.data())
@settings(max_examples=100)
def test_a_flipped_byte_never_changes_a_value(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "flipped"
    Store(folder).put(KEY, {"took_us": 812.5, "name": "a b"})
    path = Store(folder).path(KEY)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    assert Store(folder).get(KEY) in (None, {"took_us": 812.5, "name": "a b"})


def test_the_record_of_another_key_is_ignored(folder, notes):
    other = {"kind": "tile", "rows": 1}
    Store(folder).put(other, 1)
    os.replace(Store(folder).path(other), Store(folder).path(KEY))
    assert Store(folder).get(KEY) is None and Store(folder).get(other) is None
    assert Store(folder).items() == []
    assert [note.split("(")[1].split(")")[0] for note in notes()] == ["the record of another key"]


def test_a_newer_format_is_never_replaced(folder, notes):
    Store(folder).put(KEY, 64)
    path = Store(folder).path(KEY)
    newer = json.dumps({"format": FORMAT + 1, "everything": "else"}).encode()
    path.write_bytes(newer)
    assert Store(folder).get(KEY) is None
    assert Store(folder).put(KEY, 128) is False
    assert path.read_bytes() == newer
    assert [entry.name for entry in folder.iterdir()] == [path.name]
    assert Store(folder).get(KEY) == 128
    assert Store(folder).items() == [(KEY, 128)]
    assert notes() == [f"{path} was written by a newer sparsedsl: left alone; a value of ours is kept for this process only"]
    forget_this_process(folder)
    assert Store(folder).get(KEY) is None


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_file_that_cannot_be_read_counts_as_absent(folder, notes, monkeypatch, error):
    Store(folder).put(KEY, 64)
    monkeypatch.setattr(Path, "read_bytes", disk_error(error))
    assert Store(folder).get(KEY) is None and Store(folder).get(KEY) is None
    assert notes() == [f"{Store(folder).path(KEY)} cannot be read ([Errno {error}] {os.strerror(error)}): ignored"]


def test_a_folder_that_cannot_be_listed_counts_as_empty(folder, notes, monkeypatch):
    Store(folder).put(KEY, 64)
    monkeypatch.setattr(os, "listdir", disk_error(errno.EACCES))
    assert Store(folder).items() == []
    assert len(notes()) == 1 and "treated as empty" in notes()[0]


def test_other_files_in_the_folder_are_left_alone(folder, notes):
    folder.mkdir(parents=True)
    (folder / "README.txt").write_text("mine")
    (folder / "folder.json").mkdir()
    Store(folder).put(KEY, 64)
    assert Store(folder).items() == [(KEY, 64)]
    assert (folder / "README.txt").read_text() == "mine" and (folder / "folder.json").is_dir()
    assert len(notes()) == 1 and notes()[0].startswith(f"{folder / 'folder.json'} cannot be read")


# ---- disks that cannot be written ---------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["open", "fsync", "replace", "mkdir"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.ENOENT])
def test_what_cannot_be_written_is_kept_in_memory_with_one_note(folder, notes, monkeypatch, call, error):
    Store(folder).put(KEY, "old")
    before = Store(folder).path(KEY).read_bytes()
    if call == "mkdir":
        for path in (Store(folder).path(KEY), folder, folder.parent):
            path.unlink() if path.is_file() else path.rmdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, disk_error(error))
        assert Store(folder).put(KEY, "new") is False
        assert Store(folder).put({"kind": "more"}, 2) is False
        assert Store(folder).get(KEY) == "new" and Store(folder).get({"kind": "more"}) == 2
        assert sorted(map(str, Store(folder).items())) == sorted(map(str, [(KEY, "new"), ({"kind": "more"}, 2)]))
    (note,) = notes()
    assert note.startswith(f"{folder} cannot be written ([Errno {error}]") and "set SPARSEDSL_CACHE" in note
    if call != "mkdir":
        assert Store(folder).path(KEY).read_bytes() == before
        assert [path.name for path in folder.iterdir()] == [Store(folder).path(KEY).name], "a temporary file was left"
    assert Store(folder).put(KEY, "newer") is True
    assert Store(folder).get(KEY) == "newer", "what was kept in memory is out of date"
    forget_this_process(folder)
    assert Store(folder).get(KEY) == "newer"


@pytest.mark.parametrize("place", ["file", "below a file", "/dev/null/sparsedsl"])
def test_a_folder_that_cannot_be(tmp_path, notes, place):
    (tmp_path / "file").write_text("mine")
    folder = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "tuning"}.get(place, Path(place))
    assert Store(folder).get(KEY) is None and Store(folder).items() == []
    assert notes() == []
    assert Store(folder).put(KEY, 64) is False
    assert Store(folder).get(KEY) == 64 and Store(folder).items() == [(KEY, 64)]
    assert len(notes()) == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_the_records_place_is_left_alone(folder, notes):
    Store(folder).path(KEY).mkdir(parents=True)
    (Store(folder).path(KEY) / "precious").touch()
    assert Store(folder).put(KEY, 64) is False
    assert Store(folder).get(KEY) == 64
    assert (Store(folder).path(KEY) / "precious").exists()
    assert [path for path in folder.iterdir() if path.is_file()] == []


def test_a_real_limit_on_the_size_of_files(folder):
    """The kernel refuses in the middle of the file: the old record stays, and nothing else does."""
    code = (
        "import sys; from pathlib import Path; from sparsedsl.tuning.store import Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "print(store.put({'kind': 'big'}, 'x' * 100_000), store.get({'kind': 'big'}) == 'x' * 100_000)"
    )
    Store(folder).put({"kind": "big"}, "old")
    done = run_python(code, folder, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
    assert done.stdout.split() == ["False", "True"], done.stderr
    assert "cannot be written" in done.stderr
    assert Store(folder).get({"kind": "big"}) == "old"
    assert len(list(folder.iterdir())) == 1


# ---- other processes ----------------------------------------------------------------------------------------


def start_python(code: str, *arguments: object, **more) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def run_python(code: str, *arguments: object, **more) -> subprocess.CompletedProcess:
    process = start_python(code, *arguments, **more)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


CROWD = """
import sys
from pathlib import Path
from sparsedsl.tuning.store import Store
store, me = Store(Path(sys.argv[1])), int(sys.argv[2])
for turn in range(25):
    assert store.put({"kind": "shared"}, {"by": me, "turn": turn, "text": str(me) * 20_000})
    assert store.put({"kind": "own", "by": me, "turn": turn}, [me, turn])
    got = store.get({"kind": "shared"})
    assert got is not None and got["text"] == str(got["by"]) * 20_000, got
    assert store.get({"kind": "own", "by": me, "turn": turn}) == [me, turn]
print("done", "torch" in sys.modules)
"""


def test_eight_processes_share_a_folder(folder):
    crowd = [start_python(CROWD, folder, me) for me in range(8)]
    done = [process.communicate(timeout=60) for process in crowd]
    assert done == [("done False\n", "")] * 8
    values = Store(folder).items()
    assert len(values) == 1 + 8 * 25 == len(list(folder.iterdir()))
    assert sorted(value for key, value in values if key["kind"] == "own") == [[me, turn] for me in range(8) for turn in range(25)]


def test_threads_share_a_folder(folder):
    failed = []

    def work(me: int) -> None:
        for turn in range(20):
            if not Store(folder).put({"kind": "shared"}, [me] * 500) or len(set(Store(folder).get({"kind": "shared"}))) != 1:
                failed.append((me, turn))

    threads = [threading.Thread(target=work, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and len(list(folder.iterdir())) == 1


HELD = """
import os, sys, time
from pathlib import Path
from sparsedsl.tuning import store
def hold(*args):
    print("holding", flush=True)
    time.sleep(60)
setattr(os, sys.argv[2], hold)
store.Store(Path(sys.argv[1])).put({"kind": "big"}, "x" * 500_000)
"""


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_process_killed_in_the_middle_leaves_the_old_record(folder, step):
    Store(folder).put({"kind": "big"}, "old")
    child = start_python(HELD, folder, step)
    try:
        assert child.stdout is not None and child.stdout.readline() == "holding\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)
    assert Store(folder).get({"kind": "big"}) == "old"
    assert Store(folder).items() == [({"kind": "big"}, "old")]
    (left,) = [path for path in folder.iterdir() if path != Store(folder).path({"kind": "big"})]

    forget_this_process(folder)
    assert Store(folder).put(KEY, 1) is True
    assert left.exists(), "it may be somebody's work"
    os.utime(left, (time.time() - 3700,) * 2)
    Store(folder).put(KEY, 2)
    assert left.exists(), "once a process is enough"
    forget_this_process(folder)
    Store(folder).put(KEY, 3)
    assert not left.exists()
    assert len(Store(folder).items()) == 2 == len(list(folder.iterdir()))


def test_a_process_killed_at_any_time_leaves_a_whole_record(folder):
    code = CROWD.replace("range(25)", "range(10**9)")
    for delay in (0.0, 0.011, 0.023):
        child = start_python(code, folder, 7)
        while not Store(folder).path({"kind": "own", "by": 7, "turn": 0}).exists():
            time.sleep(0.005)
        time.sleep(delay)
        child.kill()
        assert child.communicate(timeout=60)[0] == ""
        assert Store(folder).get({"kind": "shared"})["text"] == "7" * 20_000
        assert all(value in ([7, key.get("turn")], Store(folder).get({"kind": "shared"})) for key, value in Store(folder).items())
        for path in folder.glob("own-*"):
            path.unlink()


def test_the_folder_may_be_deleted_while_it_is_written(folder, monkeypatch):
    made = os.open

    def delete_first(path, *args, **kwargs):
        if str(path).startswith(str(folder)) and folder.exists() and not deleted:
            folder.rmdir()
            deleted.append(path)
        return made(path, *args, **kwargs)

    deleted: list = []
    monkeypatch.setattr(os, "open", delete_first)
    assert Store(folder).put(KEY, 64) is True
    assert deleted and Store(folder).get(KEY) == 64


def test_an_interrupted_write_leaves_nothing(folder, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Store(folder).put(KEY, 64)
    assert list(folder.iterdir()) == []


def test_files_follow_the_umask(folder):
    before = os.umask(0o027)
    try:
        Store(folder).put(KEY, 64)
    finally:
        os.umask(before)
    assert Store(folder).path(KEY).stat().st_mode & 0o777 == 0o640
