"""C++ libraries on disk: built once, whole or not at all, and never loaded from where somebody else may write."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import sparsedsl as sd
from sparsedsl.backends.cpp import build
from sparsedsl.backends.cpp.backend import _refusal_of
from sparsedsl.testing import tensor

TEXT = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, and nothing loaded."""
    monkeypatch.setenv("SPARSEDSL_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_loaded", {})
    return tmp_path / "cpp"


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes a line for each library it makes; the file of the lines."""
    lines, script = tmp_path / "calls", tmp_path / "counted-c++"
    real = build.compiler()
    script.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) echo . >> {lines};; esac\nexec {real} "$@"\n')
    script.chmod(0o755)
    lines.write_text("")
    monkeypatch.setenv("CXX", str(script))
    return lines


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(build, "_loaded", {})


def test_a_library_is_built_once_and_kept(folder, counted, monkeypatch):
    assert build.library(TEXT).answer() == 42 and build.library(TEXT).answer() == 42
    forget(monkeypatch)
    assert build.library(TEXT).answer() == 42
    assert len(counted.read_text().split()) == 1
    build.library(TEXT, "-DX")  # other flags, another library
    build.library(TEXT + "\n")
    assert len(counted.read_text().split()) == 3
    (first, *_), texts = sorted(folder.glob("*.so")), sorted(folder.glob("*.cpp"))
    assert len(texts) == 3 and not list(folder.glob(".tmp-*"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and not stat.S_IMODE(first.stat().st_mode) & 0o022


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_others_may_write_is_not_loaded(what, folder, counted, monkeypatch, caplog):
    build.library(TEXT)
    (place,) = folder.glob("*.so")
    place.unlink()  # this process has loaded it: it stays whole
    place.write_bytes(b"not a library")
    (folder if what == "folder" else place).chmod(0o777)
    forget(monkeypatch)
    with caplog.at_level(logging.WARNING, "sparsedsl"):
        assert build.library(TEXT).answer() == 42
    assert "others may write" in caplog.text and len(counted.read_text().split()) == 2
    if what == "folder":
        assert place.read_bytes() == b"not a library", "a folder of others is left alone"


def test_a_library_of_another_user_is_not_loaded(folder, counted, monkeypatch):
    build.library(TEXT)
    (place,) = folder.glob("*.so")
    real = os.stat

    def foreign(path, **words):
        found = real(path, **words)
        return os.stat_result((*found[:4], 12345, *found[5:10])) if Path(path) == place else found

    forget(monkeypatch)
    monkeypatch.setattr(build.os, "stat", foreign)
    with monkeypatch.context():
        assert build._unsafe(place) == f"{place} belongs to another user (uid 12345)"


def test_a_folder_that_cannot_be_written_costs_the_libraries_only(tmp_path, counted, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_made", lambda folder: (_ for _ in ()).throw(PermissionError("no right to write")))
    with caplog.at_level(logging.WARNING, "sparsedsl"):
        assert build.library(TEXT).answer() == 42
    assert "built for this process only; set SPARSEDSL_CACHE" in caplog.text


def test_processes_that_start_together_build_once(folder, counted):
    code = textwrap.dedent(f"""
        from sparsedsl.backends.cpp import build
        assert build.library({TEXT!r}).answer() == 42
    """)
    root = str(Path(sd.__file__).parent.parent)
    running = [subprocess.Popen([sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": root}) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(counted.read_text().split()) == 1


def test_a_killed_build_leaves_no_library(folder, monkeypatch):
    monkeypatch.setattr(build.os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build.library(TEXT)
    assert not list(folder.glob("*.so"))


def test_without_a_compiler_auto_takes_tiled_and_says_why(folder, monkeypatch):
    _refusal_of.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    pattern = sd.attend(sd.patterns.sliding_window(123))
    plan = sd.compile(pattern).explain(4096, heads=4).plan
    assert plan.backend == "tiled" and "needs a compiler, and CXX='no-such-compiler' names none" in plan.reason
    q = tensor(1, 4, 300, 8, seed=0)
    assert torch.isfinite(sd.compile(pattern)(q, q, q)).all()
    with pytest.raises(sd.UnsupportedError, match=r"generated C\+\+ needs a compiler, .*Use backend='tiled'"):
        sd.compile(pattern, backend="cpp")(q, q, q)
    monkeypatch.delenv("CXX")
    assert sd.compile(pattern).explain(4096, heads=4).plan.backend == "cpp", "it is looked for again"


def test_a_compiler_that_fails_is_heard(folder, tmp_path, monkeypatch):
    script = tmp_path / "broken-c++"
    script.write_text('#!/bin/sh\necho "internal error: out of luck" >&2\nexit 3\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    pattern = sd.attend(sd.patterns.sliding_window(124))
    assert "out of luck" in sd.compile(pattern).explain(4096, heads=4).plan.reason
    q = tensor(1, 4, 300, 8, seed=0)
    with pytest.raises(sd.UnsupportedError, match=r"cannot compile the generated C\+\+:\ninternal error: out of luck"):
        sd.compile(pattern, backend="cpp")(q, q, q)


def test_no_length_is_compiled_into_a_library(folder, counted):
    attn = sd.compile(sd.patterns.sliding_window(125), backend="cpp")
    for length in (20, 70, 300):
        q = tensor(1, 2, length, 8, seed=0)
        attn(q, q, q)
        attn(q[:, :, -1:], q, q, q_offset=length - 1)
    assert len(counted.read_text().split()) <= 2  # the pattern, and what is the same for all
