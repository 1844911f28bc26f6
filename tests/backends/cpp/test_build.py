"""C++ libraries on disk: built once, whole or not at all, and never loaded from where somebody else may write."""

from __future__ import annotations

import logging
import os
import re
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sparsedsl as sd
from sparsedsl.backends.cpp import background, build
from sparsedsl.backends.cpp.attention import CppKernel
from sparsedsl.backends.cpp.backend import _refusal_of
from sparsedsl.backends.cpp.limits import LIMITS
from sparsedsl.execute import operators
from sparsedsl.execute.call_words import CallWords
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
    _compiler_that(script, f"echo . >> {lines}")
    lines.write_text("")
    monkeypatch.setenv("CXX", str(script))
    return lines


def _compiler_that(script: Path, first: str) -> None:
    """A compiler that does something before it makes a library, and makes it quickly: optimising takes nearly all of a build."""
    script.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) {first};; esac\nexec {build.compiler()} "$@" -O0\n')
    script.chmod(0o755)


@pytest.fixture
def held(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that makes no library before the file exists, and gives up after a minute."""
    script, gate = tmp_path / "held-c++", tmp_path / "gate"
    _compiler_that(script, f"n=0; while [ ! -e {gate} ]; do sleep 0.1; n=$((n+1)); [ $n -gt 600 ] && exit 1; done")
    monkeypatch.setenv("CXX", str(script))
    return gate


def until(happens: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.05)


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
    q = tensor(1, 4, 300, 8, seed=0)
    with pytest.raises(sd.UnsupportedError, match=r"cannot compile the generated C\+\+:\ninternal error: out of luck"):
        sd.compile(pattern, backend="cpp")(q, q, q)
    found, began = sd.compile(pattern).explain(4096, heads=4), time.perf_counter()
    # The fixed part fails beside the pattern's, and maybe after it; a plan made before that says that it is being compiled.
    while "out of luck" not in found.plan.reason and time.perf_counter() - began < 60:
        time.sleep(0.05)
        found = sd.compile(pattern).explain(4096, heads=4)
    assert "out of luck" in found.plan.reason and not found.unbuilt


def test_to_explain_compiles_nothing(folder, counted):
    """Neither a pattern nor a program, whoever is asked for; what the first call has to wait for is said instead."""
    blocks = CAUSAL & sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 8)), 5)
    for pattern in (sd.patterns.sliding_window(135), blocks, sd.linear([0.5, 0.25])):
        attn, named = sd.compile(pattern), sd.compile(pattern, backend="cpp")
        found, asked = (one.explain(4096, heads=2, kv_heads=2, head_dim=8) for one in (attn, named))
        assert "cpp" in found.plan.backend and "cpp" in asked.plan.backend
        assert re.search(
            r"is not compiled yet: the first call begins to, and waits [\d.e+]+ s at most and is else answered", str(found)
        )
        assert "is not compiled yet: the first call begins to, and waits until it is there" in str(asked)
    assert not counted.exists() or not counted.read_text(), "something was compiled"
    assert not list(folder.glob("*.so"))
    q = tensor(1, 2, 520, 8, seed=0)
    window = sd.patterns.sliding_window(135)
    sd.compile(window, backend="cpp")(q, q, q)
    assert not sd.compile(window).explain(4096, heads=2, head_dim=8).unbuilt


def test_no_length_is_compiled_into_a_library(folder, counted):
    attn = sd.compile(sd.patterns.sliding_window(125), backend="cpp")
    for length in (20, 70, 300):
        q = tensor(1, 2, length, 8, seed=0)
        attn(q, q, q)
        attn(q[:, :, -1:], q, q, q_offset=length - 1)
    assert len(counted.read_text().split()) <= 2  # the pattern, and what is the same for all


# ---- while a compiler works ------------------------------------------------------------------------------------------------------

CAUSAL = sd.kv_idx <= sd.q_idx


@pytest.mark.parametrize("grad", [False, True])
def test_the_first_call_with_auto_waits_no_longer_than_it_may(grad, held):
    q, k, v = (tensor(1, 2, 520, 8, seed=seed).requires_grad_(grad) for seed in range(3))
    pattern = sd.patterns.sliding_window(126 + grad)
    attn = sd.compile(pattern)
    with LIMITS.using(wait_s=0.0):
        attn.explain(8)  # imports
    with LIMITS.using(wait_s=0.3):
        start = time.monotonic()
        out = attn(q, k, v)
        assert 0.3 <= time.monotonic() - start < 20
        torch.testing.assert_close(out, sd.compile(pattern, backend="reference")(q, k, v))
        found = attn.explain(520, heads=2, head_dim=8, grad=grad)
        assert found.plan.backend == "tiled" and "cpp is being compiled: a call waits 0.3 s for it at most" in found.plan.reason
        assert "is being compiled" in found.others["cpp"]
        held.touch()
        until(lambda: attn.explain(520, heads=2, head_dim=8, grad=grad).plan.backend == "cpp")
    assert torch.equal(attn(q, k, v), sd.compile(pattern, backend="cpp")(q, k, v))


def test_all_work_of_a_program_waits_for_one_time(held):
    q = tensor(1, 2, 520, 8, seed=0)
    program = CAUSAL & ((sd.q_idx - sd.kv_idx < 97) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 8)), 5))
    attn = sd.compile(program)
    with LIMITS.using(wait_s=0.0):
        attn(q, q, q)  # imports, and what is remembered
    waits = []

    def wait(self, seconds):
        waits.append(seconds)
        time.sleep(min(seconds, 0.2))
        return False

    with pytest.MonkeyPatch.context() as patch, LIMITS.using(wait_s=0.5):
        patch.setattr(background.Build, "wait", wait)
        out = attn(q, q, q)
        of_call = list(waits)
        assert "being compiled" in attn.explain(520, heads=2, head_dim=8).plan.reason
    # On a busy machine the time may be over before the third piece is asked for.
    assert len(of_call) >= 2 and of_call[0] == 0.5 and max(of_call[1:]) <= 0.3
    torch.testing.assert_close(out, sd.compile(program, backend="tiled")(q, q, q))
    held.touch()
    until(lambda: attn.explain(520, heads=2, head_dim=8).plan.backend == "cpp")
    assert torch.equal(attn(q, q, q), sd.compile(program, backend="cpp")(q, q, q))


def test_the_backward_pass_of_a_call_runs_where_its_forward_pass_ran(held, monkeypatch):
    q = tensor(1, 2, 520, 8, seed=0).requires_grad_()
    attn = sd.compile(sd.patterns.sliding_window(129))
    with LIMITS.using(wait_s=0.1):
        out = attn(q, q, q)
    held.touch()
    until(lambda: attn.explain(520, heads=2, head_dim=8, grad=True).plan.backend == "cpp")
    monkeypatch.delattr(CppKernel, "backward")
    out.sum().backward()
    with pytest.raises(AttributeError, match="backward"):
        attn(q, q, q).sum().backward()


def opened_later(gate: Path) -> None:
    threading.Timer(1.0, gate.touch).start()


def test_what_must_not_depend_on_a_clock_waits_until_it_is_built(held, monkeypatch):
    q = tensor(1, 2, 520, 8, seed=0)
    with LIMITS.using(wait_s=0.0):
        named = sd.compile(sd.patterns.sliding_window(131), backend="cpp")
        opened_later(held)
        named(q, q, q)  # by name
        assert held.exists()
        held.unlink()
        attn = sd.compile(sd.patterns.sliding_window(132))
        opened_later(held)
        out = operators.attend_traced(attn._calls.handle, {}, q, q, q, CallWords({}, 0))  # in a graph
        assert torch.equal(out, sd.compile(sd.patterns.sliding_window(132), backend="cpp")(q, q, q))
        held.unlink()
        attn = sd.compile(sd.patterns.sliding_window(133))
        opened_later(held)
        leaf = q.clone().requires_grad_()
        out = torch.utils.checkpoint.checkpoint(attn, leaf, leaf, leaf, use_reentrant=False)  # made again by the backward pass
        assert torch.equal(out, sd.compile(sd.patterns.sliding_window(133), backend="cpp")(q, q, q))
        out.sum().backward()


def test_libraries_are_built_side_by_side(tmp_path, folder, monkeypatch):
    script, seen = tmp_path / "meeting-c++", tmp_path / "seen"
    seen.mkdir()
    _compiler_that(
        script,
        f"touch {seen}/$$; n=0; while [ $(ls {seen} | wc -l) -lt 2 ]; do sleep 0.1; n=$((n+1)); [ $n -gt 300 ] && exit 1; done",
    )
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(background, "_cores", threading.BoundedSemaphore(2))
    assert all(made is not None and made.wait(None) and made.result() for made in (build.start(TEXT), build.start(TEXT + "\n")))


def run_alone(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(sd.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=root, env={**os.environ, "PYTHONPATH": root, **environment}, timeout=120,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_forked_child_waits_for_the_build_of_its_parent(folder, counted, tmp_path):
    script, gate = tmp_path / "slow-c++", tmp_path / "gate"
    _compiler_that(script, f"while [ ! -e {gate} ]; do sleep 0.1; done")
    done = run_alone(
        f"""
        import os, pathlib, time
        from sparsedsl.backends.cpp import build
        started = build.start({TEXT!r})
        folder = pathlib.Path({str(folder)!r})
        while not list(folder.glob(".tmp-*")):
            time.sleep(0.02)
        child = os.fork()
        if not child:
            begun = build._builds[{TEXT!r}, (), {str(script)!r}]
            assert begun is started and not begun.wait(0.5)  # the lock of the parent is still held
            pathlib.Path({str(gate)!r}).touch()
            assert begun.wait(500) and build.library({TEXT!r}).answer() == 42
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert build.library({TEXT!r}).answer() == 42
        """,
        CXX=str(script),
    )
    assert done.returncode == 0, done.stderr
    assert len(counted.read_text().split()) == 1


def test_a_child_forked_while_a_compiler_is_started_keeps_nobody_waiting(folder):
    """It would hold the ends of the compiler's pipes, which the parent reads to their end, and wait for the parent's lock."""
    done = run_alone(
        f"""
        import os, subprocess, threading, time
        from sparsedsl.backends.cpp import build
        pipes_are_open, start = threading.Event(), subprocess.Popen._execute_child

        def slowly(self, command, *given):
            if "-shared" in command:
                pipes_are_open.set()
                time.sleep(0.5)
            start(self, command, *given)

        subprocess.Popen._execute_child = slowly
        begun = build.start({TEXT!r})
        pipes_are_open.wait()
        child = os.fork()
        if not child:
            os._exit(7 if begun.wait(30) and build.library({TEXT!r}).answer() == 42 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert build.library({TEXT!r}).answer() == 42
        """
    )
    assert done.returncode == 0, done.stderr


def test_a_child_forked_during_a_build_makes_calls(held):
    done = run_alone(
        f"""
        import os, pathlib, torch, sparsedsl as sd
        from sparsedsl.backends.cpp.limits import LIMITS
        torch.set_num_threads(1)
        attn, q = sd.compile(sd.patterns.sliding_window(134)), torch.randn(1, 2, 520, 8)
        with LIMITS.using(wait_s=0.1):
            first = attn(q, q, q)
        child = os.fork()
        if not child:
            with LIMITS.using(wait_s=0.1):
                torch.testing.assert_close(attn(q, q, q), first)
                assert attn.explain(520, heads=2, head_dim=8).plan.backend == "tiled"
            pathlib.Path({str(held)!r}).touch()
            torch.testing.assert_close(sd.compile(sd.patterns.sliding_window(134), backend="cpp")(q, q, q), first)
            assert attn.explain(520, heads=2, head_dim=8).plan.backend == "cpp"
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        """
    )
    assert done.returncode == 0, done.stderr


def test_a_process_that_ends_stops_its_compilers_and_leaves_no_files(folder, tmp_path, monkeypatch):
    script, pids = tmp_path / "endless-c++", tmp_path / "pids"
    _compiler_that(script, f"echo $$ >> {pids}; sleep 600")
    start = time.monotonic()
    done = run_alone(
        f"""
        import pathlib, time
        from sparsedsl.backends.cpp import background, build
        build.start({TEXT!r}), build.start({TEXT + " "!r})
        while not pathlib.Path({str(pids)!r}).exists():
            time.sleep(0.02)
        """,
        CXX=str(script),
    )
    assert done.returncode == 0 and not done.stderr
    assert time.monotonic() - start < 60
    assert not [path for path in folder.iterdir() if path.suffix != ".lock"]
    for pid in pids.read_text().split():
        until(lambda pid=pid: not Path(f"/proc/{pid}").exists())


def test_what_a_killed_process_left_is_removed(folder, monkeypatch):
    folder.mkdir(mode=0o700)
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    dead, own, new = (
        folder / f".tmp-{number}-{name}" for number, name in ((int(child.stdout), "a.so"), (os.getpid(), "b.so"), (1, "c"))
    )
    for path in (dead, own, new):
        path.write_text("")
        if path != new:
            os.utime(path, (0, 0))
    build._swept.cache_clear()
    build.library(TEXT)
    assert [path.exists() for path in (dead, own, new)] == [False, True, True]
