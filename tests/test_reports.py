"""Every report is plain data too: what public functions find has ``to_dict()``, which JSON takes, under documented keys."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
import sys
import types
import typing
from typing import Any

import pytest
import torch

import sparsedsl as sd
from source_tree import ROOT
from sparsedsl.plain_values import MOST_ENTRIES, Reported, keys_of, plain

# What a declaration gives back is no report of it.
LANGUAGE = ("sparsedsl.lang", "sparsedsl.program", "sparsedsl.testing")


def parts(annotation: Any) -> set[type]:
    """The classes in an annotation."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return {annotation}
    return {found for argument in typing.get_args(annotation) for found in parts(argument)}


def given_back(function: Any) -> set[type]:
    """The dataclasses that a function says it returns."""
    function = inspect.unwrap(function)
    annotation = function.__annotations__.get("return", "None")
    try:
        annotation = eval(annotation, {**vars(typing), **vars(sys.modules[function.__module__])})
    except NameError:  # of what is imported for type checkers alone
        return set()
    found = {kind for kind in parts(annotation) if dataclasses.is_dataclass(kind)}
    return {kind for kind in found if not kind.__module__.startswith(LANGUAGE)}


def public_reports() -> set[type]:
    """The frozen dataclasses that public functions and methods of public classes return, and the reports in their fields."""
    import sparsedsl.models as models

    found: set[type] = set()
    for module in (sd, models):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing):
                methods = [m for key, m in vars(thing).items() if not key.startswith("_") and inspect.isfunction(m)]
                found |= {kind for method in methods for kind in given_back(method)}
            elif inspect.isroutine(thing):
                found |= given_back(thing)
    return {kind for kind in found if vars(kind)["__dataclass_params__"].frozen}


# Handed back to be used: nothing that was found.
NO_REPORTS = {"Held", "KeptSummaries", "Lesson", "ProgramState", "Teacher"}


def test_public_functions_give_back_reports_that_are_plain_data():
    found = public_reports()
    assert {"Analysis", "ProgramAnalysis", "Explanation", "Build", "CacheBound", "Verdict", "SearchReport", "CacheReport"} <= {
        kind.__name__ for kind in found
    }
    assert sorted(kind.__name__ for kind in found if not issubclass(kind, Reported) and kind.__name__ not in NO_REPORTS) == []


def every_kind() -> list[type]:
    """All reports of the library, those inside of others too."""
    from sparsedsl.backends.cpp import libraries  # noqa: F401
    from sparsedsl.gpu import autotune, builds, expected, tuning_records  # noqa: F401
    from sparsedsl.models.layer_search import search_report  # noqa: F401
    from sparsedsl.parallel import planning, simulating  # noqa: F401
    from sparsedsl.tiling import schedule  # noqa: F401

    waiting, found = [Reported], []
    while waiting:
        kinds = [kind for kind in waiting.pop().__subclasses__() if kind.__module__.startswith("sparsedsl.")]
        waiting += kinds
        found += kinds
    return sorted(found, key=lambda kind: kind.__name__)


def test_names_of_keys_exist():
    for kind in every_kind():
        names = {field.name for field in dataclasses.fields(kind)}
        for name in keys_of(kind):
            assert name in names or isinstance(inspect.getattr_static(kind, name), (property, functools.cached_property))
        assert {*kind._leaves_out} <= names, "what is left out is a field"


DOC = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]).repeat_interleave(64)


@pytest.fixture(scope="module")
def reports() -> dict[str, Any]:
    """One of each kind, as a user gets it."""
    from sparsedsl.analysis.domain import Domain
    from sparsedsl.backends.tiled.attention import HeadSizes
    from sparsedsl.gpu.autotune import Chosen, Trial, Tuned
    from sparsedsl.gpu.kernel_config import Config
    from sparsedsl.gpu.tuning_records import Imported
    from sparsedsl.models.layer_caches import CacheReport, LayerCache

    later, programmed = sd.kv_idx <= sd.q_idx + 1, sd.patterns.moba(chunk=16, top_k=2)
    documents = sd.patterns.documents() & sd.patterns.causal()
    return {
        "analysis": sd.analyse(later, 256),
        "program": sd.analyse(programmed, 256),
        "explanation": sd.compile(documents).explain(512, doc=DOC),
        "explained program": sd.compile(programmed).explain(256),
        "explained refusal": sd.compile(programmed, backend="flex").explain(256, grad=True),
        "verdict": sd.implies(later, sd.kv_idx <= sd.q_idx),
        "verdict with a table": sd.implies(sd.patterns.documents(), sd.kv_idx <= sd.q_idx),
        "cache": sd.cache_bound(sd.patterns.sliding_window(sd.table("w", values_in=(1, 9))[sd.h]) & sd.patterns.causal()),
        "lists": sd.analyse(later, 256).lists,
        "tuned": Tuned(Config(128, 64, 4, 3), (Trial(Config(64, 64, 4, 2), None, 0, "does not fit"),), 1.5),
        "chosen": Chosen(Config(128, 64, 4, 3), "cost model"),
        "imported": Imported(1, 0, ("record 1: no record",)),
        "caches": CacheReport(64, 1, (LayerCache((0, 2), "every key", 64, 128, 8192),), 16384, 16384),
        "token plan": sd.parallel.plan(later, 512, 2),
        "simulation": sd.parallel.simulate(later, 1024, [2, 64], chunk=16, granule=16),
        "schedule": sd.compile(documents, backend="tiled")
        .static.runner("tiled")
        .schedule_of(  # type: ignore[attr-defined]
            Domain(512, 512, tables={"doc": DOC}), HeadSizes(1, 64, 64)
        ),
    }


def test_json_takes_reports_as_they_are_and_gives_them_back(reports):
    for report in reports.values():
        found = report.to_dict()
        assert found["report"] == type(report).__name__
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert [*found] == ["report", *keys_of(type(report))]


def test_masks_are_their_text_and_verdicts_come_with_a_witness(reports):
    found = reports["analysis"].to_dict()
    assert sd.parse(found["pattern"].removeprefix("attend(").removesuffix(")")).same_as(sd.kv_idx <= sd.q_idx + 1)
    causal = found["causal"]
    assert causal["status"] == "REFUTED" and causal["witness"]["kv_idx"] == causal["witness"]["q_idx"] + 1
    assert reports["cache"].to_dict()["recent"] == "w[h]"
    table = reports["verdict with a table"].to_dict()["witness"]["tables"]["doc"]
    assert table["dtype"].startswith("int") and table["shape"] == [len(table["values"])]
    steps = reports["explained program"].to_dict()["steps"]
    assert {"dot", "top_k", "attend"} <= {*steps}
    assert [step["node"] for step in reports["program"].to_dict()["steps"]] == ["summary", "dot", "top_k", "attend"]


def test_plain_values_of_all_that_reports_hold():
    assert plain(float("-inf")) == "-inf" and plain(float("nan")) == "nan"
    assert plain({1: (True, None)}) == {"1": [True, None]}
    assert plain(torch.zeros(MOST_ENTRIES + 1)) == {"dtype": "float32", "shape": [MOST_ENTRIES + 1], "values": None}
    with pytest.raises(TypeError, match="run is a function, which has no plain form"):
        plain(lambda: 0, "run")


def documented() -> dict[str, list[str]]:
    """Report -> the keys that docs/reports.md lists for it, in order."""
    text = (ROOT / "docs" / "reports.md").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        keys = [key for row in re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)]
        found[re.findall(r"\w+", section)[0]] = keys
    return found


def test_keys_are_documented():
    known = documented()
    for kind in every_kind():
        assert known.get(kind.__name__) == list(keys_of(kind)), f"docs/reports.md, {kind.__name__}"
