"""What is kept of benchmark runs: files that a sentence names, a line a record."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# `aot_resources.json`, or `systems_*.json` where the star is the machine and nothing else, with or without the folder before it.
CITED = re.compile(r"`(?:benchmarks/)?(?:results/)?(\w[\w-]*?(?:_\*)?)\.json`")


def prose() -> list[Path]:
    """The files whose sentences may name results; the changelog may name what is there no more."""
    pages = (path for path in ROOT.glob("*.md") if path.name != "CHANGELOG.md")
    return [*pages, *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]


def cited(texts: Iterable[str]) -> set[str]:
    """The names of results in some texts, without the ending."""
    return {name for text in texts for name in CITED.findall(text)}


def names_of(path: Path) -> set[str]:
    """What a sentence may call a file: its own name, or a star in place of the machine (names of machines have no underscore)."""
    return {path.stem, path.stem.rpartition("_")[0] + "_*"}


def astray(paths: Iterable[Path], names: set[str]) -> tuple[list[str], list[str]]:
    """The files that no name means, and the names that mean no file."""
    paths = sorted(paths)
    known = set().union(*map(names_of, paths))
    return [path.name for path in paths if not names_of(path) & names], sorted(names - known)


def test_every_result_is_cited_and_every_cited_one_exists():
    uncited, missing = astray(RESULTS.iterdir(), cited(path.read_text(encoding="utf-8") for path in prose()))
    assert not uncited, f"no sentence of README, CONTRIBUTING or docs names {uncited}: cite or delete them"
    assert not missing, f"benchmarks/results has no {missing}"


def test_the_check_notices_what_it_should():
    names = cited(["see `lists_*.json` and `benchmarks/results/aot.json`, with `lists_more_*.json`"])
    assert names == {"lists_*", "aot", "lists_more_*"}
    found = [Path(name) for name in ("lists_amd-2cores.json", "lists_rerun_amd-2cores.json", "aot.json", "aot_rerun.json")]
    assert astray(found, names) == (["aot_rerun.json", "lists_rerun_amd-2cores.json"], ["lists_more_*"])


def test_results_have_a_line_a_record(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import measure

    for path in sorted(RESULTS.glob("*.json")):
        assert path.read_text() == measure.one_line_a_record(json.loads(path.read_text())), path.name
