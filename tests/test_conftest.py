"""The fixtures of conftest.py, each run in a pytest of its own on a small test file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
PROPERTY_TESTS = """
from hypothesis import assume, given, settings, strategies as st
import pytest

@given(st.integers())
@settings(max_examples=300)
def test_cheap(n):
    assume(n % 2 == 0)

class TestDear:
    @pytest.mark.parametrize("side", [1, 2])
    @given(n=st.integers())
    @settings(max_examples=50)
    def test_dear(self, side, n):
        pass
"""


def run_pytest(folder: Path, source: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on one test file beside a copy of our conftest.py."""
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / "test_it.py").write_text(source)
    (folder / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n    gpu: needs a GPU\n    campaign: more\n    slow: tens of seconds\n"
    )
    ours = ("PYTEST", "SPARSEDSL", "CI")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)} | variables
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-rs",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        *options,
    ]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def random_cases(output: str) -> tuple[int, int, int]:
    """The numbers of the summary line: cases, property tests, failures."""
    found = re.search(r"random cases: ([\d,]+) run in (\d+) property tests, (\d+) of which failed", output)
    assert found, output
    return tuple(int(number.replace(",", "")) for number in found.groups())  # type: ignore[return-value]


def test_property_tests_run_as_many_cases_as_they_ask_for(tmp_path):
    done = run_pytest(tmp_path, PROPERTY_TESTS)
    assert done.returncode == 0, done.stdout
    assert random_cases(done.stdout) == (400, 3, 0)


def test_the_budget_is_shared_in_proportion_and_counted_over_processes(tmp_path):
    done = run_pytest(tmp_path, PROPERTY_TESTS, "-n", "2", SPARSEDSL_TEST_EXAMPLES="2000")
    assert done.returncode == 0, done.stdout
    assert random_cases(done.stdout) == (2000, 3, 0)
    assert "SPARSEDSL_TEST_EXAMPLES=2000" in done.stdout


SEEN = """
from hypothesis import given, settings, strategies as st
seen = []

@given(st.integers(0, 10**9))
@settings(max_examples=20)
def test_it(n):
    seen.append(n)

def test_shown():
    print("seen", seen)
    assert not seen
"""


def cases_seen(folder: Path, *options: str, **variables: str) -> tuple[str, str]:
    """What a test was given, and the whole output."""
    output = run_pytest(folder, SEEN, *options, **variables).stdout
    found = re.search(r"seen \[.*\]", output)
    assert found, output
    return found.group(), output


def test_cases_are_the_same_everywhere_unless_a_seed_is_given(tmp_path):
    usual, told = cases_seen(tmp_path)
    assert "the same in every run (make fuzz draws others)" in told
    assert usual == cases_seen(tmp_path, CI="true")[0], "on a person's machine and in CI"
    seeded, told = cases_seen(tmp_path, "--hypothesis-seed=7")
    assert "--hypothesis-seed=7 draws them again" in told
    assert usual != seeded == cases_seen(tmp_path, "--hypothesis-seed=7")[0]


def test_make_fuzz_prints_a_seed_and_a_budget(tmp_path):
    """Nothing is run: what make would do is printed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SPARSEDSL", "MAKE", "SEED"))}

    def plan(*words: str, **variables: str) -> str:
        command = ["make", "-n", "fuzz", "RUN=python", "READY=", *words]
        return subprocess.run(
            command, cwd=CONFTEST.parent.parent, env=env | variables, capture_output=True, text=True, check=True
        ).stdout

    first, second = (re.findall(r"--hypothesis-seed=(\d+)|make fuzz SEED=(\d+)", plan()) for _ in range(2))
    assert len(first) == 2 and first[0][1] == first[1][0] != second[1][0]
    assert "--hypothesis-seed=42" in plan("SEED=42")


def test_a_failing_property_test_is_counted(tmp_path):
    source = "from hypothesis import given, strategies as st\n@given(st.integers())\ndef test_no(n):\n    assert n < 5\n"
    done = run_pytest(tmp_path, source)
    assert done.returncode == 1
    assert random_cases(done.stdout)[1:] == (1, 1)


@pytest.mark.parametrize("value", ["many", "0"])
def test_a_budget_that_is_no_number_ends_the_run(tmp_path, value):
    done = run_pytest(tmp_path, "def test_fine():\n    assert True\n", SPARSEDSL_TEST_EXAMPLES=value)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"SPARSEDSL_TEST_EXAMPLES='{value}' is not valid; valid values:" in done.stderr


def test_golden_is_written_compared_and_told_apart(tmp_path):
    source = "import pytest\n@pytest.mark.parametrize('n', [1, 2])\ndef test_text(golden, n):\n    assert golden == f'line {n}'\n"
    source += "def test_parts(golden):\n    assert golden['a b'] == 'A'\n    assert golden['c'] == 'C'\n"
    missing = run_pytest(tmp_path, source)
    assert missing.returncode == 1 and "pytest --update-golden writes it" in missing.stdout

    written = run_pytest(tmp_path, source, "--update-golden")
    assert written.returncode == 0, written.stdout
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("golden/**/*.txt"))
    assert names == [f"golden/test_it/{n}.txt" for n in ("test_parts.a_b", "test_parts.c", "test_text_1", "test_text_2")]
    assert run_pytest(tmp_path, source).returncode == 0

    changed = run_pytest(tmp_path, source.replace("line", "row"))
    assert changed.returncode == 1
    assert "-line 1" in changed.stdout and "+row 1" in changed.stdout


def test_golden_compares_text_only(golden):
    with pytest.raises(pytest.fail.Exception, match="golden compares text, got int: 3"):
        _ = golden == 3


def test_campaigns_are_for_runs_with_a_budget(tmp_path):
    source = "import pytest\n@pytest.mark.parametrize('n', [1, pytest.param(2, marks=pytest.mark.campaign)])\ndef test_it(n):\n    pass\n"
    assert "1 passed, 1 deselected" in run_pytest(tmp_path, source).stdout
    assert "2 passed" in run_pytest(tmp_path, source, SPARSEDSL_TEST_EXAMPLES="10").stdout
    assert "1 passed, 1 deselected" in run_pytest(tmp_path, source, "-m", "campaign").stdout


def test_gpu_tests_are_skipped_with_the_reason(tmp_path):
    torch = pytest.importorskip("torch")
    done = run_pytest(tmp_path, "import pytest\n@pytest.mark.gpu\ndef test_fast():\n    assert True\n")
    if torch.cuda.is_available():
        assert "1 passed" in done.stdout
    else:
        assert re.search(r"SKIPPED .*needs a CUDA GPU: torch", done.stdout), done.stdout


def test_the_cache_of_a_test_run_is_its_own(cache_folder):
    from sparsedsl.settings import settings

    assert settings().cache == cache_folder


def test_tests_import_no_tests_and_no_conftest():
    """What they share is a fixture, or a module of their folder that is no test."""
    wrong = re.compile(r"^\s*(?:from|import) (?:tests\.[\w.]*|)\b(?:test_\w+|conftest)\b", re.M)
    files = sorted(CONFTEST.parent.rglob("*.py"))
    assert len(files) > 100
    assert [path.name for path in files if wrong.search(path.read_text(encoding="utf-8"))] == []
    assert wrong.search("x = 1\nfrom tests.programs.test_hsa import problem") and wrong.search("import conftest")
    assert not wrong.search("from tests.programs.selected_cases import draw")


def test_what_is_slow_begins(tmp_path):
    plain = "def test_{}():\n    pass\n"
    source = "import pytest\n" + plain.format("first") + "@pytest.mark.slow\n" + plain.format("last") + plain.format("middle")
    done = run_pytest(tmp_path, source, "-v")
    assert re.findall(r"::test_(\w+) PASSED", done.stdout) == ["last", "first", "middle"], done.stdout
