"""Where in the user's code a traced operation stands, and which Python construct asked for its truth value."""

from __future__ import annotations

import ast
import linecache
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

__all__ = ["Location", "control_flow", "here", "user_frames"]

_SKIPPED = tuple(str(Path(file).parent) + os.sep for file in (torch.__file__, __file__))
ENTRY = "_run_callable"  # the function of trace.py below which the user's code runs


@dataclass(frozen=True)
class Location:
    """A line of the user's code."""

    filename: str
    line: int

    def __str__(self) -> str:
        source = linecache.getline(self.filename, self.line).strip()
        return f"{self.filename}:{self.line}" + (f", `{source}`" if source else "")


def user_frames() -> Iterator[FrameType]:
    """The frames of the code being traced, innermost first, without torch's and ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == ENTRY and code.co_filename.startswith(_SKIPPED[1]):
            return
        made = code.co_filename == "<string>" and code.co_name == "__init__"  # of a dataclass
        if not made and not code.co_filename.startswith(_SKIPPED):
            yield frame
        frame = frame.f_back


def here() -> Location | None:
    """The line of the user's code that runs now; None when torch's own code is traced directly."""
    for frame in user_frames():
        return Location(frame.f_code.co_filename, frame.f_lineno)
    return None


def control_flow() -> str:
    """What asks for a truth value now: ``"if"``, ``"and"``, ``"chain"``, ``"min"``, ...; ``"bool"`` when it cannot be told."""
    for frame in user_frames():
        span = _span(frame)
        source = "".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals))
        if span is None or not source:
            return "bool"
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return "bool"
        around = [node for node in ast.walk(tree) if _holds(node, span)]
        kinds = [kind for node in reversed(around) if (kind := _kind(node, span))]
        return kinds[0] if kinds else "bool"
    return "bool"


def _span(frame: FrameType) -> Span | None:
    """(first line, first column, last line, last column) of the expression the frame is in."""
    for index, (line, last, column, end) in enumerate(frame.f_code.co_positions()):
        if index == frame.f_lasti // 2:
            return None if None in (line, last, column, end) else (line, column, last, end)  # type: ignore[return-value]
    return None


Span = tuple[int, int, int, int]


def _holds(node: ast.AST, span: Span) -> bool:
    if not isinstance(node, (ast.stmt, ast.expr)) or node.end_lineno is None or node.end_col_offset is None:
        return False
    return (node.lineno, node.col_offset) <= span[:2] and span[2:] <= (node.end_lineno, node.end_col_offset)


def _is_whole(node: ast.stmt | ast.expr, span: Span) -> bool:
    """Python gives some tests the position of their whole statement."""
    return span == (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset)


def _kind(node: ast.AST, span: Span) -> str | None:
    match node:
        case ast.BoolOp(op=ast.And()):
            return "and"
        case ast.BoolOp(op=ast.Or()):
            return "or"
        case ast.UnaryOp(op=ast.Not()):
            return "not"
        case ast.Compare(ops=ops) if len(ops) > 1:
            return "chain"
        case ast.Compare(ops=[ast.In() | ast.NotIn()]):
            return "in"
        case ast.Call(func=ast.Name(id="min" | "max" | "any" | "all" | "sorted" | "bool" as name)):
            return name
        case ast.Assert():
            return "assert"
        case ast.IfExp(test=test) | ast.If(test=test) | ast.While(test=test) if _holds(test, span) or _is_whole(node, span):
            return "while" if isinstance(node, ast.While) else "if"
    return None
