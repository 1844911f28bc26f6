"""The page: one HTML text with its styles and script inside. With data, a file that needs neither server nor network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from sparsedsl.errors import SparseDSLError
from sparsedsl.lang.pattern import Pattern
from sparsedsl.picture_style import THEMES
from sparsedsl.program.graph import Program
from sparsedsl.view.facts import FACTS, fact
from sparsedsl.view.random_call import graph_picture, random_call
from sparsedsl.view.scene import Scene
from sparsedsl.view.setting import Setting
from sparsedsl.view.subject import Subject

__all__ = ["page", "standalone"]


def page(kept: Mapping[str, Any] | None = None) -> str:
    """The text of the page; ``kept``: what it answers by itself, instead of asking a server."""
    parts = {name: files("sparsedsl.view").joinpath(f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    themes = {name: asdict(theme) for name, theme in THEMES.items()}
    # "<" cannot end the script early: what a user wrote stands in it
    data = json.dumps({"themes": themes, "kept": kept}).replace("<", "\\u003c")
    return parts["html"].replace("/*css*/", parts["css"]).replace("/*data*/", data).replace("/*js*/", parts["js"])


def standalone(subject: Subject, setting: Setting, tables: Mapping[str, Any]) -> str:
    """The page of one setting as one file: levels of cells to zoom into, conditions to hover over, and all facts.

    Raises what the pattern, its parameters or its tables raise: a file that shows nothing is not written.

    >>> text = standalone(Subject("sparsedsl.patterns:causal"), Setting(q_len=64), {})
    >>> text.startswith("<!doctype html>"), "http://" in text.replace("http://www.w3.org", "")
    (True, False)
    """
    values = subject.defaults | dict(setting.values)
    made = subject.make(values)
    known = {name: tensor for name, tensor in tables.items() if name in made.tables}
    shown = {name: getattr(setting, name) for name in Setting.__dataclass_fields__} | {"values": values}
    kept: dict[str, Any] = {
        "start": {
            "name": subject.spec,
            "parameters": subject.described(),
            "setting": shown,
            "program": isinstance(made, Program),
        },
        "facts": {name: fact(name, made, setting, known) for name in FACTS},
    }
    if isinstance(made, Pattern):
        scene = Scene(made, setting, known)
        kept |= {"levels": scene.levels(), "tiles": scene.tiles(), "conditions": scene.conditions()}
    else:
        kept["program"] = random_call(made, setting, known)
        kept["graph"] = {name: _graph(made, setting, name) for name in THEMES}
    return page(kept)


def _graph(program: Program, setting: Setting, theme: str) -> dict[str, Any]:
    try:
        return {"svg": graph_picture(program, setting, theme)}
    except SparseDSLError as error:
        return {"refused": str(error)}
