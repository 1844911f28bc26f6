"""What a program does in one call on random rows: how much of each value goes into each result, and what it chose. Seeded."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import torch

from sparsedsl.analysis.head_counts import count_heads
from sparsedsl.errors import MissingPackageError, UnsupportedError
from sparsedsl.execute.compiling import compile as compile_pattern
from sparsedsl.plotting import plot
from sparsedsl.program.branches import Attend
from sparsedsl.program.graph import Program
from sparsedsl.program.recurrences import Linear
from sparsedsl.selection.selected_blocks import SelectedBlocks
from sparsedsl.view.setting import Setting

__all__ = ["LONGEST", "graph_picture", "random_call"]

# Tokens of a call at most: its results are dense, and on the page.
LONGEST = 256
HEADS, WIDTH = 4, 16
# Rows are means of so many neighbours, as in text: what is near is alike.
ALIKE = 8


def random_call(program: Program, setting: Setting, tables: Mapping[str, Any]) -> dict[str, Any]:
    """Layers of a call of at most :data:`LONGEST` tokens: ``weights``, and a table of booleans for each choice among blocks.

    The weight of a key is what its value adds to the result of a query: what the call gives for values that are one-hot.

    >>> import sparsedsl as sd
    >>> found = random_call(sd.Program(sd.patterns.moba(chunk=16, top_k=2)), Setting(q_len=64), {})
    >>> [(part["name"], part["rows"], part["columns"]) for part in found["layers"]]
    [('weights', 64, 64), ('top_k', 64, 4)]
    """
    length, heads = min(setting.q_len, LONGEST), _heads(program, tables)
    tensors, named = _tensors(program, length, heads, setting.seed, tables)
    notes = [f"one call on random rows (seed {setting.seed}), {length} tokens, {heads} heads"]
    if setting.q_len > length or setting.q_offset or setting.keys != setting.q_len:
        notes.append(f"the call has queries and keys 0 .. {length - 1}: dense results of longer ones have no room here")
    attn = compile_pattern(program, backend="reference")
    head = setting.head % heads
    layers = []
    with torch.no_grad():
        try:
            weights = attn(tensors["q"], tensors["k"], torch.eye(length).expand(1, heads, length, length), **named)[0, head].abs()
            layers.append(_shades("weights", weights / (float(weights.max()) or 1.0), length))
        except UnsupportedError as error:
            notes.append(f"weights are not shown: {error}")
        chosen = attn.choices(tensors["q"], tensors["k"], tensors["v"], **named)
    for label, value in chosen.items():
        table = value.table() if isinstance(value, SelectedBlocks) else value
        if isinstance(table, torch.Tensor) and table.dtype == torch.bool and table.ndim == 4:
            one = table[0, head % table.shape[1]]
            layers.append(_shades(label, one.float(), length))
            notes.append(
                f"{label}: {int(one.sum()):,} of {one.numel():,} blocks chosen, {float(one.sum(1).float().mean()):.3g} a row"
            )
        else:
            notes.append(f"{label}: {_said(table)}")
    return {"layers": layers, "notes": notes, "length": length, "head": head}


def _heads(program: Program, tables: Mapping[str, Any]) -> int:
    """As many as the program is written for, else :data:`HEADS`."""
    decays = [len(node.log_decays) for node in program.nodes(Linear) if isinstance(node.decay, tuple)]
    counted = count_heads((node.pattern for node in program.nodes(Attend)), tables, None)
    return next(iter(decays), counted if counted > 1 else HEADS)


def _tensors(
    program: Program, length: int, heads: int, seed: int, tables: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """q, k and v, and what the program wants beside them."""
    try:
        from sparsedsl.testing.call_shapes import AttentionCase
        from sparsedsl.testing.program_inputs import named_inputs
    except ImportError:
        raise MissingPackageError("a random call of a program", "hypothesis", "view") from None
    case = AttentionCase(heads=heads, kv_heads=heads, q_len=length, kv_len=length, head_dim=WIDTH, head_dim_v=WIDTH)
    named: dict[str, Any] = named_inputs(program, case, seed=seed, dtype=torch.float32, ragged=True) | dict(tables)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(1, heads, length + ALIKE - 1, WIDTH, generator=generator)
    alike = rows.unfold(2, ALIKE, 1).mean(-1) * 3
    return {"q": alike, "k": alike, "v": alike}, named


def _shades(name: str, values: torch.Tensor, length: int) -> dict[str, Any]:
    """A layer of bytes 0 .. 255, over all queries and keys of the call."""
    codes = (values.clamp(0, 1) * 255).ceil().to(torch.uint8)
    rows, columns = codes.shape
    cell = [-(-length // rows), -(-length // columns)]
    data = base64.b64encode(codes.contiguous().numpy().tobytes()).decode("ascii")
    return {"name": name, "q": 0, "kv": 0, "rows": rows, "columns": columns, "cell": cell, "queries": length, "keys": length,
            "packed": False, "data": data}  # fmt: skip


def _said(value: Any) -> str:
    """What was chosen, in a few words."""
    if isinstance(value, torch.Tensor):
        flat = value.flatten()
        some = ", ".join(f"{float(x):g}" for x in flat[:8])
        return f"{'x'.join(map(str, value.shape))}: {some}{' ...' if flat.numel() > 8 else ''}"
    return f"{type(value).__name__}"


def graph_picture(program: Program, setting: Setting, theme: str) -> str:
    """The graph of a program as SVG. Raises :class:`~sparsedsl.MissingPackageError` without matplotlib."""
    figure = plot(program, setting.q_len, setting.kv_len, q_offset=setting.q_offset, theme=theme)
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True)
    text = written.getvalue()
    return text[text.index("<svg") :]
