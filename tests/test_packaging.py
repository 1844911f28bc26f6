"""pyproject.toml, constraints.txt and the changelog say what is on disk; a checkout works without being installed."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
import sysconfig
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import collect_changelog
import sparsedsl
from source_tree import PACKAGES, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def files(folder: str) -> list:
    """What git would track in a source folder."""
    return [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_the_package_list_is_the_folders_on_disk():
    on_disk = set()
    for folder, package in PACKAGES.items():
        for path in files(folder):
            on_disk.add(".".join([package, *path.parent.relative_to(ROOT / folder).parts]))
    assert sorted(SETUPTOOLS["packages"]) == sorted(on_disk)


def test_every_package_has_its_init():
    folders = {path.parent for folder in PACKAGES for path in files(folder)}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_top_level_folders_are_mapped_into_the_package():
    assert SETUPTOOLS["package-dir"] == {package: folder for folder, package in PACKAGES.items() if folder != package}


def test_files_that_are_not_python_are_declared():
    found = {
        f"{folder}/{path.relative_to(ROOT / folder)}" for folder in PACKAGES for path in files(folder) if path.suffix != ".py"
    }
    assert SETUPTOOLS["package-data"] == {
        "sparsedsl": ["py.typed"], "sparsedsl.codegen.cpp": ["*.cpp", "*.h"], "sparsedsl.view": ["page.*"],
    }  # fmt: skip
    assert {name for name in found if not re.fullmatch(r"codegen/cpp/\w+\.(cpp|h)", name)} == {
        "sparsedsl/py.typed", *(f"sparsedsl/view/page.{kind}" for kind in ("css", "html", "js")),
    }  # fmt: skip


def test_the_console_script_exists():
    assert PROJECT["project"]["scripts"] == {"sparsedsl": "sparsedsl.cli:main"}
    from sparsedsl.cli import main

    assert callable(main)


def requirements() -> dict[str, Requirement]:
    """Everything pyproject.toml asks for, extras of the project itself left out."""
    project = PROJECT["project"]
    asked = [
        Requirement(line) for lines in (project["dependencies"], *project["optional-dependencies"].values()) for line in lines
    ]
    return {canonicalize_name(one.name): one for one in asked if one.name != project["name"]}


def pins() -> dict[str, str]:
    """The versions of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines if line and not line.startswith("#")]
    assert all(found), "constraints.txt holds lines name==version and comments only"
    return {canonicalize_name(match[1]): match[2] for match in found if match}


@pytest.mark.parametrize("name", sorted(requirements()))
def test_every_requirement_has_a_pin_it_accepts(name):
    requirement, pinned = requirements()[name], pins()
    assert name in pinned, f"constraints.txt has no line for {name}"
    assert requirement.specifier.contains(pinned[name]), f"{requirement} does not accept the pinned {pinned[name]}"


def test_extras_name_each_other_rightly():
    extras = PROJECT["project"]["optional-dependencies"]
    own = [Requirement(line) for lines in extras.values() for line in lines if line.startswith("sparsedsl[")]
    assert own
    assert {extra for one in own for extra in one.extras} <= set(extras)


@pytest.mark.parametrize(
    "statement",
    ["import sparsedsl.patterns, sparsedsl.codegen", "import sparsedsl as sd; sd.patterns.causal"],
)
def test_a_checkout_works_without_being_installed(tmp_path, statement):
    # -S: no .pth file is read, so an editable install of this environment has no effect
    search = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
    command = [sys.executable, "-S", "-c", statement]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": search}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_changelog_fragments_are_one_line_each_and_of_a_known_kind():
    wrong = [
        path.name
        for path in (ROOT / "changelog.d").iterdir()
        if path.name != "README.md"
        and not (
            collect_changelog.FRAGMENT.fullmatch(path.name) and re.fullmatch(r"\S[^\n]*\S\n", path.read_text(encoding="utf-8"))
        )
    ]
    assert wrong == [], "name: <issue>[-<topic>].<added|changed|fixed|removed>.md; content: one line"


def test_fragments_move_into_the_section_of_the_version(tmp_path, capsys):
    assert doctest.testmod(collect_changelog).failed == 0
    (tmp_path / "sparsedsl").mkdir()
    (tmp_path / "sparsedsl" / "__init__.py").write_text('"""What it is."""\n\n__version__ = "1.1"\n')
    (tmp_path / "changelog.d").mkdir()
    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text("# Changelog\n\nHow.\n\n## 1.0 (2020-01-01)\n\n### Added\n\n- Old.\n")

    def collect(**fragments):
        for name, line in fragments.items():
            (tmp_path / "changelog.d" / f"{name.replace('_', '.')}.md").write_text(line + "\n")
        (tmp_path / "changelog.d" / "README.md").write_text("Stays.\n")
        collect_changelog.main(tmp_path)
        assert [path.name for path in (tmp_path / "changelog.d").iterdir()] == ["README.md"]
        return re.sub(r"\d{4}-\d\d-\d\d", "DATE", changelog.read_text())

    first = collect(**{"12_fixed": "Late.", "2_fixed": "Early.", "3_added": "New."})
    head, old = "# Changelog\n\nHow.\n\n## 1.1 (DATE)\n\n", "\n## 1.0 (DATE)\n\n### Added\n\n- Old.\n"
    assert first == f"{head}### Added\n\n- New.\n\n### Fixed\n\n- Early.\n- Late.\n{old}"
    again = collect(**{"13_changed": "Other.", "14_added": "More."})
    assert again == f"{head}### Added\n\n- New.\n- More.\n\n### Changed\n\n- Other.\n\n### Fixed\n\n- Early.\n- Late.\n{old}"
    assert collect() == again


def test_versions_agree():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    (found,) = re.findall(r"^version: (.+)$", citation, re.MULTILINE)
    assert found == sparsedsl.__version__
    assert f"\n## {found} (" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_target_of_the_makefile_is_listed_by_help():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    assert phony
    explained = re.findall(r"^([a-z]+):.*## \S", text, re.MULTILINE)
    assert sorted(phony[1].split()) == sorted(explained)


def test_ci_run_can_be_executed_and_calls_the_targets_people_use():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    called = re.findall(r"\bmake (\w+)", script.read_text(encoding="utf-8"))
    assert {"setup", "lint", "types", "wheel", "docs", "test"} <= set(called)
