"""What the model files of the installed transformers do with the implementation's name and with attention masks, read from their source."""

from __future__ import annotations

import ast
import pathlib
import re
from collections.abc import Iterator

import transformers

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_NAME = re.compile(r"_attn_implementation\b|is_flash_attention_requested\(")
_ASKED = re.compile(rf"{INTERFACE}(\.get_interface\(|\[)\s*self\.config\._attn_implementation")
_MAKER = re.compile(r"create_\w*mask\w*\(")
_LOOKS = {"dim", "size", "get", "items", "keys", "values", "copy"}


def files() -> Iterator[tuple[str, str]]:
    """The name of each model's folder, and the source of a file of its modules."""
    for path in sorted((pathlib.Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        yield path.parent.name, path.read_text(encoding="utf-8")


def classes(source: str) -> Iterator[str]:
    """The classes of a file, each as its source."""
    for block in re.split(r"^(?=class |def |@)", source, flags=re.MULTILINE):
        if block.startswith("class "):
            yield block


def reads_the_name(block: str) -> bool:
    """Whether a class that calls the attention interface also asks for the implementation's name (flash apart: nothing bound runs it)."""
    names = [found for found in _NAME.findall(_ASKED.sub("", block)) if not found.startswith("is_flash")]
    return INTERFACE in block and bool(names)


def keywords(block: str) -> set[str]:
    """The names of the arguments that the attention function is given."""
    calls = (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)) if INTERFACE in block else ()
    called = [
        call for call in calls if (isinstance(call.func, ast.Name) and "interface" in call.func.id) or _is_lookup(call.func)
    ]
    return {keyword.arg for call in called for keyword in call.keywords if keyword.arg}


def _is_lookup(node: ast.AST) -> bool:
    return isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == INTERFACE


def changed_masks(block: str) -> list[str]:
    """Operations on a mask on its way: after transformers' functions have made it, or where the attention interface is called."""
    found = []
    if INTERFACE not in block and not _MAKER.search(block):
        return []
    for function in ast.parse(block).body[0].body:  # type: ignore[attr-defined]
        if not isinstance(function, ast.FunctionDef):
            continue
        made = dict(_made(function))
        if INTERFACE in block and function.name == "forward":
            arguments = [*function.args.args, *function.args.kwonlyargs]
            made |= {argument.arg: 0 for argument in arguments if "mask" in argument.arg}
        if made:
            found += [ast.unparse(node) for node in ast.walk(function) if _changes(node, made)]
    return found


def _made(function: ast.FunctionDef) -> Iterator[tuple[str, int]]:
    """Names that a mask is given to, and the lines where this happens."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and _MAKER.search(ast.unparse(node.value)):
            for target in node.targets:
                name = _name(target)
                if name and name != "self":
                    yield name, node.lineno


def _changes(node: ast.AST, made: dict[str, int]) -> bool:
    def is_mask(part: ast.AST | None) -> bool:
        if isinstance(part, (ast.List, ast.Tuple)):
            return any(is_mask(element) for element in part.elts)
        return getattr(part, "lineno", 0) > made.get(_name(part), 10**9)

    match node:
        case ast.Subscript(value=value, slice=ast.Tuple() | ast.Slice()):
            return is_mask(value)
        case ast.BinOp(left=left, right=right):
            return is_mask(left) or is_mask(right)
        case ast.AugAssign(target=operand) | ast.UnaryOp(op=ast.Invert() | ast.USub(), operand=operand):
            return is_mask(operand)
        case ast.Call(func=ast.Attribute(attr=name, value=value), args=given) if name not in _LOOKS:
            return is_mask(value) or (ast.unparse(value).split(".")[0] in ("torch", "nn", "F") and any(map(is_mask, given)))
    return False


def _name(node: ast.AST | None) -> str:
    """The variable that an expression such as ``mask["full_attention"]`` reads."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""
