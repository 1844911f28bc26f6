"""What every test can use: the ``golden``, ``options`` and ``tiny_gemma`` fixtures, the ``gpu`` marker, and the random budget of the
property tests.

- ``pytest --update-golden`` rewrites golden files instead of comparing with them.
- ``SPARSEDSL_TEST_EXAMPLES=100000`` spreads about that many random cases over the property tests that are run, in proportion to
  the number each of them asks for; the summary says how many were run and how many tests failed.
- Tests marked ``campaign`` (combinations beyond those that every run tries) run with such a budget, or with ``-m campaign``.
- The cases are the same in every run, on every machine; ``--hypothesis-seed=N`` draws others, and the same ones for the same number. ``make
  fuzz`` draws a number.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Before anything imports torch: two test processes with one thread each are faster than two that fight for two cores,
# nothing may reach for a model hub or a screen, and the user's cache is not ours to fill.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("SPARSEDSL_TUNE", "off")  # what is chosen does not depend on how busy the machine was when it was measured
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pytest
from hypothesis.errors import UnsatisfiedAssumption

TESTS = Path(__file__).resolve().parent
BUDGET = "SPARSEDSL_TEST_EXAMPLES"
CASES = "sparsedsl_random_cases"
# Names the cache of a run to the processes below it.
RUN_CACHE = "SPARSEDSL_TEST_RUN_CACHE"

# The same cases every time, so that a change fails for its own faults only; new ones where a seed is given. Nothing else decides.
hypothesis.settings.register_profile(
    "same", deadline=None, database=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("seeded", hypothesis.settings.get_profile("same"), derandomize=False)
hypothesis.settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--update-golden``."""
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")


def pytest_configure(config: pytest.Config) -> None:
    """New cases for a seed, a cache for the run. A budget that is no number ends it before it begins."""
    _budget()
    if RUN_CACHE not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="sparsedsl-cache-")
        os.environ[RUN_CACHE] = folder.name
        config.add_cleanup(folder.cleanup)
        config.add_cleanup(lambda: os.environ.pop(RUN_CACHE, None))
    if _seed(config) is not None:
        hypothesis.settings.load_profile("seeded")


def _seed(config: pytest.Config) -> str | None:
    """The seed of random cases that was asked for."""
    return config.getoption("--hypothesis-seed", None)


def pytest_report_header(config: pytest.Config) -> str:
    """Which random cases are drawn."""
    if _seed(config) is None:
        return "random cases: the same in every run (make fuzz draws others)"
    return f"random cases: those of --hypothesis-seed={_seed(config)}"


@pytest.fixture(scope="session", autouse=True)
def cache_folder() -> Iterator[Path]:
    """A cache of the test run's own, empty when it begins: one for its processes and for the runs that its tests start, so that none
    compiles again what another has compiled."""
    before = os.environ.get("SPARSEDSL_CACHE")
    os.environ["SPARSEDSL_CACHE"] = os.environ[RUN_CACHE]
    yield Path(os.environ[RUN_CACHE])
    if before is None:
        del os.environ["SPARSEDSL_CACHE"]
    else:
        os.environ["SPARSEDSL_CACHE"] = before


@pytest.fixture(scope="session", autouse=True)
def compilers_are_waited_for() -> Iterator[None]:
    """Which backend a test runs on does not depend on how busy the machine is."""
    from sparsedsl.backends.cpp.limits import LIMITS

    with LIMITS.using(wait_s=600.0):
        yield


# ---- golden files ------------------------------------------------------------------------------------------


class Golden:
    """Text that was once read by a person and judged right: ``assert golden == text``.

    The file is ``tests/golden/<test file>/<test name>.txt``; ``golden["name"]`` is another one of the same test.
    """

    def __init__(self, stem: Path, update: bool) -> None:
        self.stem, self.update = stem, update

    def __getitem__(self, name: str) -> Golden:
        return Golden(self.stem.with_name(f"{self.stem.name}.{_file_name(name)}"), self.update)

    def __eq__(self, text: object) -> bool:
        __tracebackhide__ = True
        if not isinstance(text, str):
            pytest.fail(f"golden compares text, got {type(text).__name__}: {text!r}")
        path = self.stem.with_name(self.stem.name + ".txt")
        text = text.rstrip("\n") + "\n"
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return True
        shown = path.relative_to(TESTS.parent) if path.is_relative_to(TESTS.parent) else path
        if not path.exists():
            pytest.fail(f"{shown} does not exist; pytest --update-golden writes it:\n{text}")
        wanted = path.read_text(encoding="utf-8")
        if wanted != text:
            lines = difflib.unified_diff(wanted.splitlines(), text.splitlines(), str(shown), "now", lineterm="")
            pytest.fail("\n".join([*lines, "", "if the new text is right: pytest --update-golden, and read the diff"]))
        return True

    __hash__ = None  # type: ignore[assignment]


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", name).strip("_")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """The golden file of this test; see :class:`Golden`."""
    test_file = request.path.relative_to(TESTS) if request.path.is_relative_to(TESTS) else Path(request.path.name)
    root = TESTS if request.path.is_relative_to(TESTS) else request.path.parent
    folder = root / "golden" / test_file.with_suffix("")
    return Golden(folder / _file_name(request.node.name), request.config.getoption("--update-golden"))


# ---- gpu marker --------------------------------------------------------------------------------------------


@functools.cache
def _why_no_gpu() -> str | None:
    """None if there is a GPU to test on, else the reason why not."""
    import torch

    if torch.version.cuda is None:
        return f"needs a CUDA GPU: torch {torch.__version__} is a CPU build"
    if not torch.cuda.is_available():
        return "needs a CUDA GPU: torch finds none on this machine"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip ``gpu`` tests where there is none; the same torch random numbers for every test, whatever ran before it."""
    if item.get_closest_marker("gpu") and (reason := _why_no_gpu()):
        pytest.skip(reason)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


# ---- random budget -----------------------------------------------------------------------------------------


@functools.cache
def _budget() -> int | None:
    """How many random cases the run may take in all; None: as many as each test asks for."""
    given = os.environ.get(BUDGET, "")
    if given and not (given.isdecimal() and int(given) > 0):
        raise pytest.UsageError(
            f"{BUDGET}={given!r} is not valid; valid values: a number of random cases above 0, as in {BUDGET}=100000"
        )
    return int(given) if given else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave campaigns to runs with a budget, begin with what is slow, count the cases of every property test, and give each its share."""
    budget = _budget()
    if budget is None and "campaign" not in config.option.markexpr:
        left = [item for item in items if item.get_closest_marker("campaign")]
        items[:] = [item for item in items if not item.get_closest_marker("campaign")]
        config.hook.pytest_deselected(items=left)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # or one process is left alone with it at the end
    tests = [item for item in items if isinstance(item, pytest.Function) and hypothesis.is_hypothesis_test(item.obj)]
    # The function keeps its settings and its inner test as attributes; its parametrised items share them.
    functions = [getattr(item.obj, "__func__", item.obj) for item in tests]
    asked = sum(function._hypothesis_internal_use_settings.max_examples for function in functions)
    for function in {id(function): function for function in functions}.values():
        function.hypothesis.inner_test = _counted(function.hypothesis.inner_test)
        if budget is not None:
            own = function._hypothesis_internal_use_settings
            share = max(1, math.ceil(own.max_examples * budget / asked))
            function._hypothesis_internal_use_settings = hypothesis.settings(own, max_examples=share)


_cases = 0


def _counted(inner_test: Any) -> Any:
    """The body of a property test, which counts its runs (a case that an ``assume`` turned down is none)."""

    @functools.wraps(inner_test)
    def body(*args: Any, **kwargs: Any) -> Any:
        global _cases
        __tracebackhide__ = True
        _cases += 1
        try:
            return inner_test(*args, **kwargs)
        except UnsatisfiedAssumption:
            _cases -= 1
            raise

    return body


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Take the count of each property test along in its report, also out of a worker process."""
    global _cases
    _cases = 0
    try:
        return (yield)
    finally:
        if _cases:
            item.user_properties.append((CASES, _cases))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many random cases were run, and what they found."""
    run = [
        (dict(report.user_properties).get(CASES, 0), report.failed)
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
    ]
    cases, tests, failed = sum(n for n, _ in run), sum(n > 0 for n, _ in run), sum(bad for n, bad in run if n)
    if tests:
        more = f"budget {BUDGET}={_budget()}" if _budget() else f"{BUDGET}=100000 runs more"
        seed = _seed(terminalreporter.config)
        more += "" if seed is None else f"; --hypothesis-seed={seed} draws them again"
        terminalreporter.write_line(f"random cases: {cases:,} run in {tests} property tests, {failed} of which failed ({more})")


@pytest.fixture
def options() -> Iterator[Callable[..., None]]:
    """``options(LIMITS, scan_chunk=1)``: other values of an :class:`~sparsedsl.adjustable.Adjustable` until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda adjustable, **changes: stack.enter_context(adjustable.using(**changes))


@pytest.fixture
def tiny_gemma() -> Callable[[], tuple[Any, Any]]:
    """Makes a Gemma 3 with random weights and its own layout of layers, and a tokenizer that reads bytes."""

    def make() -> tuple[Any, Any]:
        import torch
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig

        torch.manual_seed(0)
        config = Gemma3TextConfig(
            vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, sliding_window=64, max_position_embeddings=4096, bos_token_id=2, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip

        def tokenizer(text: str, return_tensors: str) -> Any:
            return SimpleNamespace(input_ids=torch.tensor([list(text[:9000].encode("ascii", "replace"))]))

        return Gemma3ForCausalLM(config).eval(), tokenizer

    return make
