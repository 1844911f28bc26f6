"""The command line: what it takes for a SPEC, what it prints, and that mistakes give one message and exit code 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import sparsedsl as sd
from sparsedsl.backend_option import NAMES, backends_here
from sparsedsl.backends.registry import BACKENDS
from sparsedsl.cli import main

ROOT = Path(__file__).resolve().parents[1]

MINE = """
import functools
import torch
import sparsedsl as sd

doc = sd.table("doc", monotone=True)
packed = (sd.kv_idx <= sd.q_idx) & (doc[sd.q_idx] == doc[sd.kv_idx])
window = (sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 5)
by_head = (sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < sd.h + 1)
leaky = sd.kv_idx <= sd.q_idx + 1
pattern = sd.attend(window, score=sd.tanh(sd.score / 30) * 30)
declared = sd.attend(leaky, causal=True)
capped = sd.tanh(sd.score / 30) * 30
compiled = sd.compile(window)
bound = packed.bind(doc=torch.tensor([0, 0, 1, 1, 1, 2]))
number = 3

def factory():
    return window

def broken():
    raise KeyError("no such thing")

def refusing():
    return sd.attend(window and leaky)

def mask_mod(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (q_idx - kv_idx < 5)

def score_mod(score, b, h, q_idx, kv_idx):
    return score - (q_idx - kv_idx)

def untraceable(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx and q_idx - kv_idx < 5

def three(a, b, c):
    return a

class Holder:
    inner = window

picked = (sd.kv_idx <= sd.q_idx) & ((sd.q_idx - sd.kv_idx < 32) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 16)), 2))
node = sd.attend(picked)
program = sd.Program(node)
compiled_program = sd.compile(node)
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs one command in a folder that holds ``mine.py``; gives exit code, stdout, stderr."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.delenv("SPARSEDSL_DEBUG", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        found = capsys.readouterr()
        return code, found.out, found.err

    yield call
    sys.modules.pop("mine", None)


WINDOW_TEXT = "attend((kv_idx <= q_idx) & (q_idx - kv_idx <= 4))"


@pytest.mark.parametrize("name", ["window", "factory", "mask_mod", "compiled", "Holder.inner"])
@pytest.mark.parametrize("place", ["mine.py", "mine"])
def test_what_a_spec_may_name(run: Run, place: str, name: str) -> None:
    code, out, err = run("explain", f"{place}:{name}", "--q-len", "64")
    assert (code, err) == (0, "")
    assert WINDOW_TEXT in out
    assert "causal           PROVED" in out


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pattern", "score=30*tanh(score / 30)"),
        ("capped", "attend(True, score=30*tanh(score / 30))"),
        ("score_mod", "attend(True, score="),
    ],
)
def test_scores(run: Run, name: str, text: str) -> None:
    code, out, _ = run("explain", f"mine:{name}", "--q-len", "16")
    assert code == 0
    assert text in out


def test_a_pattern_of_the_library(run: Run) -> None:
    code, out, _ = run(
        "explain", "sparsedsl.patterns:causal", "--q-len", "256", "--kv-heads", "2", "--heads", "4", "--batch", "3"
    )
    assert code == 0
    assert "batch 3, heads 4" in out


@pytest.mark.parametrize("name", ["mine:picked", "mine:node", "mine:program", "mine:compiled_program", "sparsedsl.patterns:hsa"])
def test_a_program(run: Run, name: str) -> None:
    code, out, err = run("explain", name, "--q-len", "2048", "--heads", "2")
    assert (code, err) == (0, "")
    assert "cpp" in out.split("\n")[0] and "top_k" in out and "causal           PROVED" in out
    code, out, err = run("plot", name, "--q-len", "2048", "--out", "graph.svg")
    assert (code, out, err) == (0, "graph.svg\n", "")
    assert "<svg" in Path("graph.svg").read_text()


def test_a_program_is_checked(run: Run) -> None:
    code, out, err = run("check", "mine:node", "--examples", "1", "--backend", "tiled", "--seed", "0")
    assert code == 0 and only_progress(err), out + err
    assert "causal" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", "mine:node"), "mine:node is a program, which chooses. Instead: its kernels"),
        (("tune", "mine:node"), "tune takes patterns that are known before a call"),
        (("explain", "mine:node", "--q-len", "64", "--block-size", "32"), "--block-size: the tiles of a program follow from"),
        (("plot", "mine:node", "--q-len", "64", "--block-size", "32"), "the graph is drawn, which block_size says nothing of"),
        (("plot", "mine:node", "--q-len", "64", "--head", "1"), "the graph is drawn, which head says nothing of"),
    ],
)
def test_what_a_program_is_refused(run: Run, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err


def test_explain_says_the_same_as_the_library(run: Run) -> None:
    _, out, _ = run(
        "explain",
        "mine:window",
        "--q-len",
        "1",
        "--kv-len",
        "300",
        "--q-offset",
        "299",
        "--dtype",
        "bfloat16",
        "--head-dim",
        "32",
    )
    pattern = sd.attend((sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 5))
    wanted = str(sd.compile(pattern).explain(1, 300, q_offset=299, dtype="bfloat16", head_dim=32))
    assert [line for line in out.splitlines() if " ms" not in line] == [line for line in wanted.splitlines() if " ms" not in line]


def test_explain_with_a_block_size(run: Run) -> None:
    code, out, _ = run("explain", "mine:window", "--q-len", "64", "--block-size", "8x16")
    assert code == 0
    assert "with tiles of 8x16 tokens" in out
    assert "8 x 16 tokens" in out


def test_tables_from_files_and_from_the_command_line(run: Run, tmp_path: Path) -> None:
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    torch.save(ids, tmp_path / "doc.pt")
    np.save(tmp_path / "doc.npy", ids.numpy())
    outputs = [
        run("explain", "mine:packed", "--q-len", "8", "--table", f"doc={v}") for v in ("doc.pt", "doc.npy", str(ids.tolist()))
    ]
    assert [code for code, _, _ in outputs] == [0, 0, 0]
    assert all("23.4 % of all" in out for _, out, _ in outputs)
    code, _, _ = run("explain", "mine:bound", "--q-len", "6")
    assert code == 0, "tables that are bound need not be given"


def test_plot_writes_a_picture(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code, out, _ = run("plot", "mine:packed", "--q-len", "4", "--table", "doc=[0,0,1,1]", "--block-size", "2")
    assert (code, out) == (0, "packed.png\n")
    assert (tmp_path / "packed.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run("plot", "mine:window", "--q-len", "40", "--out", "window.svg")
    assert code == 0
    assert "<svg" in (tmp_path / "window.svg").read_text()


def test_plot_draws_several_heads(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for heads, drawn in (("1-2", (1, 2)), ("0,3", (0, 3))):
        code, _, err = run("plot", "mine:by_head", "--q-len", "8", "--head", heads, "--out", "heads.svg")
        assert (code, err) == (0, "")
        text = (tmp_path / "heads.svg").read_text()
        assert [number for number in range(4) if f"head {number}" in text] == list(drawn)


def test_plan_prints_writes_and_draws(run: Run, tmp_path: Path) -> None:
    words = ("--chunk", "64", "--granule", "16", "--heads", "4")
    code, out, err = run("plan", "mine:window", "--q-len", "2K", "--world", "16", *words)
    assert (code, err) == (0, "") and out.startswith("2,048 tokens, 1 layer, forward; 4 heads")
    told = [line.split()[:2] for line in out.splitlines()[3:]]
    assert told == [[world, way] for world in ("4", "16") for way in ("plan", "ring", "all-gather", "ulysses")]
    assert "16 ranks for 4 heads" in out
    words += ("--table", f"doc={[0] * 700 + [1] * 1348}", "--rate", "2", "--bandwidth", "0.5", "--json")
    code, out, _ = run("plan", "mine:packed", "--q-len", "2048", "--world", "2,8", *words)
    found = json.loads(out)
    assert (code, found["flops"], found["bandwidth"]) == (0, 2e12, 5e8)
    assert [one["world"] for one in found["steps"]] == [2] * 4 + [8] * 4
    pytest.importorskip("matplotlib")
    code, out, _ = run("plan", "mine:window", "--q-len", "1K", "--world", "2", "--granule", "16", "--out", "plan.svg")
    assert code == 0 and out.endswith("\nplan.svg\n") and "expected time of a step" in (tmp_path / "plan.svg").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("mine:node", "--world", "2"), "chooses as it is called, or sends states"),
        (("mine:window", "--world", "2", "--rate", "0"), "--rate must be a positive number; got 0"),
        (("mine:window", "--world", "64"), "fewer than 16 ranks"),
        (("mine:packed", "--world", "2"), "the pattern reads tables that need values: doc"),
        (("mine:window", "--world", "2", "--out", "plan.doc"), "cannot write plan.doc"),
    ],
)
def test_what_plan_refuses(run: Run, words: tuple[str, ...], message: str) -> None:
    code, out, err = run("plan", "--q-len", "1K", *words)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err


def test_folders_of_what_is_written_are_made(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for words in (
        ("plot", "mine:window", "--q-len", "64", "--out", "plots/new/x.png"),
        ("view", "mine:window", "--q-len", "64", "--html", "pages/new/x.html"),
        ("plan", "mine:window", "--q-len", "1K", "--world", "2", "--granule", "16", "--out", "plans/new/x.svg"),
        ("tune", "--export", "records/new/x.json"),
    ):
        assert run(*words)[0] == 0, words
        assert (tmp_path / words[-1]).stat().st_size


def test_no_command_lists_them_all(run: Run) -> None:
    code, out, err = run()
    assert (code, out) == (2, "")
    assert all(f"    {name} " in err for name in ("explain", "plot", "view", "check", "plan", "build", "tune"))


def only_progress(text: str) -> bool:
    """Whether nothing was said but how far a check is, as on a slow machine."""
    return all(re.match(r"[\w ]+: \d+ of \d+ (cases|properties), \d+ s", line) for line in text.splitlines())


def test_check_of_a_right_pattern(run: Run) -> None:
    code, out, err = run("check", "mine:window", "--examples", "3", "--seed", "1", "--causal")
    assert code == 0 and only_progress(err)
    for name in ("text", "tile lists", "numbers", "causality", "calls", "order", "unseen"):
        assert f"  {name}" in out
    assert "holds      3 examples" in out


def test_check_of_a_leak_prints_a_program_that_shows_it(run: Run) -> None:
    code, out, _ = run("check", "mine:leaky", "--examples", "5", "--seed", "1", "--causal")
    assert code == 1
    assert "causality   FAILS" in out
    program = out.partition("this program shows it:\n")[2]
    with pytest.raises(sd.testing.Counterexample, match="changes when q, k and v after it change"):
        exec("\n".join(line[4:] for line in program.splitlines()), {})


def test_check_holds_a_pattern_to_what_it_declares_and_prints_json(run: Run) -> None:
    words = ("--examples", "1", "--seed", "3", "--json")
    code, out, _ = run("check", "mine:declared", *words)
    found = json.loads(out)
    assert (code, found["exit_code"], found["ok"], found["seed"]) == (1, 1, False, 3)
    (failed,) = (p for p in found["properties"] if p["status"] == "FAILS")
    assert failed["name"] == "causality" and "kv_idx=1" in failed["detail"] and "assert_causal" in failed["snippet"]
    assert found["pattern"].endswith("causal=True)")
    assert run("check", "mine:declared", *words, "--no-causal")[0] == 0
    assert run("check", "mine:leaky", *words)[0] == 0, "it declares nothing"


def test_a_check_that_ends_by_a_fault_is_no_verdict(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*_: object, **__: object) -> None:
        raise KeyError("what nobody expected")

    monkeypatch.setattr(sd.testing, "check", faulty)
    code, _, err = run("check", "mine:window", "--examples", "1")
    assert code == 2 and "the check could not be run to its end: KeyError: 'what nobody expected'" in err and "Traceback" in err


def test_check_draws_tables_and_takes_given_ones(run: Run) -> None:
    assert run("check", "mine:packed", "--examples", "2", "--seed", "1")[0] == 0
    assert run("check", "mine:packed", "--examples", "2", "--seed", "1", "--table", "doc=[0,0,1,1,1,2]")[0] == 0


EXPLAIN = ("explain", "--q-len", "8")
CHECK = ("check", "--examples", "2")
PLOT = ("plot", "--q-len", "8")

# fmt: off
# ruff: noqa: E501 (a mistake and its message stand on one line)
MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "a file meant": ((*EXPLAIN, "mien.py:window"), "there is no file mien.py. Did you mean 'mine.py'?"),
    "a module meant": ((*EXPLAIN, "sparsedsl.pattern:causal"), "there is no module sparsedsl.pattern. Did you mean 'sparsedsl.patterns'?"),
    "a module here": ((*EXPLAIN, "mind:window"), "there is no module mind. Did you mean 'mine'?"),
    "a library pattern meant": ((*EXPLAIN, "sparsedsl.patterns:casual"), ". Did you mean 'causal'?"),
    "a file without a name": ((*EXPLAIN, "mine.py"), "Did you mean 'mine.py:NAME', for a name in that file?"),
    "no folder": ((*EXPLAIN, "there/mine.py:x"), "there is no file there/mine.py; there is no folder there either"),
    "no colon": ((*EXPLAIN, "mine"), "SPEC must be module:name or file.py:name; got 'mine'"),
    "no name": ((*EXPLAIN, "mine:"), "SPEC must be module:name or file.py:name; got 'mine:'"),
    "no file": ((*EXPLAIN, "yours.py:x"), "there is no file yours.py"),
    "no module": ((*EXPLAIN, "yours:x"), "there is no module yours\n"),
    "unknown name": ((*EXPLAIN, "mine:windw"), "mine has no 'windw'; it has Holder, bound, broken, by_head, capped"),
    "no pattern": ((*EXPLAIN, "mine:number"), "mine:number must be a Mask or a Pattern; got 3 (int)"),
    "three arguments": ((*EXPLAIN, "mine:three"), "mine:three takes 3 arguments; wanted a mask_mod(b, h, q_idx, kv_idx)"),
    "factory fails": ((*EXPLAIN, "mine:broken"), "mine:broken() raises KeyError: 'no such thing'"),
    "factory is refused": ((*EXPLAIN, "mine:refusing"), "has no truth value while it is being declared"),
    "untraceable": ((*CHECK, "mine:untraceable"), "cannot trace `and` on a traced value"),
    "missing table": ((*EXPLAIN, "mine:packed"), "  doc = table('doc', monotone=True)\nSave each as a tensor, torch.save(tensor, 'NAME.pt'), and pass --table doc=doc.pt"),
    "surplus table": ((*EXPLAIN, "mine:window", "--table", "doc=[1]"), "unexpected argument doc: the pattern reads no table"),
    "table without value": ((*EXPLAIN, "mine:packed", "--table", "doc"), "--table wants NAME=FILE, as in --table doc=doc.pt; got 'doc'"),
    "no table file": ((*EXPLAIN, "mine:packed", "--table", "doc=no.pt"), "--table doc: cannot read no.pt: No such file or directory"),
    "table of text": ((*EXPLAIN, "mine:packed", "--table", "doc=mine.py"), "--table doc: mine.py does not hold a tensor"),
    "short table": ((*EXPLAIN, "mine:packed", "--table", "doc=[0,0]"), "table 'doc' is too short"),
    "backend": ((*CHECK, "mine:window", "--backend", "nope"), "backend must be one of 'auto', 'reference', 'tiled', 'cpp', 'flex', 'triton'; got 'nope'"),
    "dtype": ((*EXPLAIN, "mine:window", "--dtype", "int8"), "dtype must be one of 'float64', 'float32', 'bfloat16', 'float16'; got 'int8'"),
    "offset": ((*EXPLAIN, "mine:window", "--q-offset", "-1"), "q_offset must be a whole number of at least 0; got -1"),
    "format": ((*PLOT, "mine:window", "--out", "x.nope"), "cannot write x.nope: Format 'nope' is not supported"),
    "folder": ((*PLOT, "mine:window", "--out", "mine.py/x.png"), "cannot write mine.py/x.png: File exists (mine.py)"),
    "page in no folder": (("view", "mine:window", "--html", "mine.py/x.html"), "cannot write mine.py/x.html: File exists (mine.py)"),
    "page that is a folder": (("view", "mine:window", "--html", "."), "cannot write .: Is a directory"),
    "records in no folder": (("tune", "--export", "mine.py/x.json"), "cannot write mine.py/x.json: File exists (mine.py)"),
}
# fmt: on


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_give_one_message_and_exit_code_2(run: Run, name: str) -> None:
    arguments, message = MISTAKES[name]
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("sparsedsl: ")
    assert message in err
    assert "Traceback" not in err


def test_a_file_that_does_not_import(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import sparsedsl as sd\nsd.patterns.sliding_window(0)\n")
    code, _, err = run("explain", "bad.py:x", "--q-len", "8")
    assert code == 2
    assert (
        err
        == "sparsedsl: while importing bad.py: sliding_window(): w must be at least 1 (the window counts the query itself); got 0\n"
    )
    (tmp_path / "worse.py").write_text("1 / 0\n")
    assert (
        run("explain", "worse.py:x", "--q-len", "8")[2]
        == "sparsedsl: importing worse.py raises ZeroDivisionError: division by zero\n"
    )


def test_debug_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEDSL_DEBUG", "1")
    with pytest.raises(sd.TableError):
        run("explain", "mine:packed", "--q-len", "8")


def test_a_bad_switch_is_a_message_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEDSL_DEBUG", "yes")
    code, _, err = run("explain", "mine:window", "--q-len", "8")
    assert code == 2
    assert err.startswith("sparsedsl: SPARSEDSL_DEBUG='yes' is not valid; valid values: 0, 1")


@pytest.mark.parametrize("arguments", [["explain", "mine:window", "--q-len", "0"], ["explain", "mine:window"], ["nope"],
                                       ["explain", "mine:window", "--q-len", "8", "--block-size", "8x8x8"]])  # fmt: skip
def test_arguments_are_checked(run: Run, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize("command", ["explain", "plot", "check"])
def test_help_has_examples_that_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from sparsedsl.cli import EXAMPLES, _parser

    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "module:name or file.py:name" in text
    lines = [line.strip() for line in EXAMPLES[command].splitlines() if line.startswith("  python -m sparsedsl ")]
    assert len(lines) >= 2
    for line in lines:
        assert line in text
        import shlex

        _parser().parse_args(shlex.split(line)[3:])


def test_it_runs_as_a_module_and_its_help_needs_no_torch(tmp_path: Path) -> None:
    code = """
import runpy, sys
sys.argv = ["sparsedsl", "--help"]
try:
    runpy.run_module("sparsedsl", run_name="__main__")
except SystemExit as stop:
    print("exit", stop.code, "torch" in sys.modules)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env, check=True)
    assert done.stdout.endswith("exit 0 False\n")
    assert done.stderr == ""


def test_build_for_the_cpu(run: Run) -> None:
    code, out, err = run("build", "mine:window", "--target", "cpu", "--source")
    assert (code, err) == (0, "") and "void ends(const Call *call" in out and "is ready after" in out
    code, out, err = run("build", "mine:window", "--target", "cpu", "--out", "here")
    assert code == 2 and "libraries lie in the cache folder" in err


# ---- kernels -----------------------------------------------------------------------------------------------

KERNELS = """
import torch
import sparsedsl as sd

full = sd.kv_idx >= 0
keep = sd.kv_idx < sd.table("end")[sd.b]

def right(q, k, v):
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v

def wrong(q, k, v):
    return torch.softmax(q @ k.mT, -1) @ v

kernel = sd.testing.Kernel(right, implements=full, group=1, dtypes="float32")
wrong_kernel = sd.testing.Kernel(wrong, implements=full, group=1, dtypes="float32")
number = 3
"""


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels.py").write_text(KERNELS)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("kernels")
def test_a_kernel_is_checked_and_reported_as_text_and_json(run: Run) -> None:
    words = ("--examples", "3", "--seed", "0", "--only", "NUM")
    code, out, err = run("check", "--kernel", "kernels.py:kernel", *words)
    assert code == 0 and only_progress(err) and "right, as far as tried; seed 0" in out
    code, out, _ = run("check", "--kernel", "kernels.py:wrong_kernel", *words, "--json")
    assert code == 1 and json.loads(out)["properties"][0]["failure"]["guess"] == "the scale is left out"
    code, out, _ = run("check", "--kernel", "kernels.py:wrong", "--implements", "kernels.py:full", *words)
    assert code == 1 and "NUM" in out


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "check wants a SPEC of a pattern, or --kernel"),
        (("kernels.py:full", "--lse"), "--lse is about a kernel of your own"),
        (("kernels.py:full", "--kernel", "kernels.py:right"), "say --implements kernels.py:full"),
        (("--kernel", "kernels.py:right"), "say by --implements file.py:pattern what it computes"),
        (("--kernel", "kernels.py:number"), "is a int; wanted a function on q, k and v"),
        (("--kernel", "kernels.py:kernel", "--lse"), "leave out --lse"),
        (("--kernel", "kernels.py:kernel", "--deep", "--quick"), "give one of them"),
        (("--kernel", "kernels.py:right", "--implements", "kernels.py:keep"), "has no argument 'end'"),
        (("--kernel", "kernels.py:nothing"), "has no 'nothing'"),
    ],
)
def test_mistakes_with_kernels_give_one_message(run: Run, arguments: tuple[str, ...], words: str) -> None:
    code, _, err = run("check", *arguments)
    assert code == 2 and words in err


# ---- for programs, and for shells ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["mine:window", "mine:node"])
def test_explain_prints_its_report_as_json(run: Run, spec: str) -> None:
    code, out, err = run("explain", spec, "--q-len", "2048", "--heads", "2", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["report"] == "Explanation" and found["plan"]["backend"] == "cpp"
    assert found["analysis"]["causal"]["status"] == "PROVED"
    assert (found["steps"] is None) == (spec == "mine:window")
    assert found["cache_need"]["bytes"] > 0


def test_json_has_the_tiles_that_were_asked_for(run: Run) -> None:
    code, out, _ = run("explain", "mine:window", "--q-len", "64", "--block-size", "16x32", "--json")
    assert code == 0 and json.loads(out)["block_size"]["block"] == [16, 32]


def test_build_prints_its_report_as_json(run: Run, tmp_path: Path) -> None:
    code, out, err = run("build", "mine:window", "--target", "cpu", "--json", "--source")
    assert (code, err) == (0, "") or "compiling C++" in err
    found = json.loads(out)
    assert found["report"] == "CppBuild" and "float32" in found["dtypes"] and "generated by sparsedsl" in found["source"]


def test_tune_prints_what_it_did_as_json(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEDSL_CACHE", str(tmp_path / "cache"))
    code, out, _ = run("tune", "--list", "--clear", "--json")
    assert code == 0 and json.loads(out) == {"report": "Tune", "deleted": 0, "records": []}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"sparsedsl {sd.__version__}\n"


@pytest.mark.parametrize("command", ["explain", "check"])
def test_backend_without_a_name_lists_what_runs_here(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--backend"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["auto", *BACKENDS] == list(NAMES)
    assert all("runs here" in line or "does not run here" in line for line in lines)
    assert torch.cuda.is_available() or ("does not run here" in lines[-1] and "need a GPU" in lines[-1])


def test_a_backend_that_lacks_something_says_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    (line,) = [line for line in backends_here().splitlines() if line.startswith("cpp")]
    assert "does not run here" in line and "CXX='no-such-compiler' names none" in line
    assert "on cuda" in str(BACKENDS["cpp"].lacking("cuda"))


def asked_by_a_shell(line: str, folder: Path) -> list[str]:
    """What argcomplete answers to a shell that completes ``line``."""
    answers = folder / "answers"
    shell = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_SHELL": "bash",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answers),
    }
    words = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARGCOMPLETE_COMP_WORDBREAKS": " \n"}
    code = "import sys; sys.argv[0] = 'sparsedsl'; from sparsedsl.cli import main; main()"
    environment = {**os.environ, **shell, **words, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return [answer.strip() for answer in answers.read_text().split("\n") if answer.strip()]


@pytest.mark.parametrize(
    ("line", "answers"),
    [
        ("sparsedsl ex", ["explain"]),
        ("sparsedsl explain mine.py:win", ["mine.py:window"]),
        ("sparsedsl explain sparsedsl.patterns:mob", ["sparsedsl.patterns:moba"]),
        ("sparsedsl explain min", ["mine.py:"]),
        ("sparsedsl explain mine.py:window --backend ti", ["tiled"]),
        ("sparsedsl build mine.py:window --rem", ["--remarks"]),
    ],
)
def test_shells_complete(line: str, answers: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    assert asked_by_a_shell(line, tmp_path) == answers


def test_completion_loads_nothing_unless_a_shell_asks() -> None:
    code = (
        "import sys; from sparsedsl.cli import main\n"
        "try: main(['--version'])\nexcept SystemExit: pass\n"
        "print([name for name in ('argcomplete', 'torch', 'matplotlib', 'transformers', 'triton') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
