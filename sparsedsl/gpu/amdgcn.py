"""What the loops of a kernel do, read in AMD's assembly (CDNA), which LLVM writes one instruction a line.

Input: the text. Output: :class:`~sparsedsl.gpu.machine_loops.LoopCounts` of every innermost loop that multiplies matrices, in the order of
the code. Counts are instructions of one warp (a wave of 64 lanes).
"""

from __future__ import annotations

import re
from collections import Counter

from sparsedsl.gpu.machine_loops import LoopCounts, MatrixCounts, Step, inner_loops

__all__ = ["loops_in"]

_LINE = re.compile(r"^(?:(\.?\w+):|\t([a-z]+_\w+)(.*))", re.MULTILINE)
_MATRIX = re.compile(r"^v_mfma_\w+?_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_")
_SPECIAL = re.compile(r"^v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
_MULTIPLY_ADD = re.compile(r"^v_(pk_)?(fma|fmac|mac|mul|add|sub|subrev)_(legacy_)?f")
_ENDS = ("s_endpgm", "s_setpc_b64")


def loops_in(text: str) -> tuple[LoopCounts, ...]:
    r"""The loops of assembly as ``triton.compile`` keeps it under ``"amdgcn"``.

    >>> code = "kernel:\n\ts_nop 0\n.LBB0_1:\n\tv_exp_f32_e32 v1, v2\n\tv_mfma_f32_32x32x8_bf16 v[0:15], v[2:3], v[4:5], 0\n"
    >>> (loop,) = loops_in(code + "\tscratch_load_dword v1, off, off\n\ts_cbranch_scc1 .LBB0_1\n\ts_endpgm\n")
    >>> loop.issued, loop.exponentials, loop.local, loop.products(warps=4)
    (4, 1, 1, 32768)
    """
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for label, name, rest in _LINE.findall(text):
        if label:
            labels[label] = len(lines)
        else:
            lines.append((name, rest.partition(";")[0].strip()))
    code = [
        Step(name, labels.get(rest) if "branch" in name else None, name != "s_branch" and name not in _ENDS)
        for name, rest in lines
    ]
    return inner_loops(code, lambda places: _counts([lines[place][0] for place in places]))


def _counts(names: list[str]) -> LoopCounts:
    kinds: Counter[tuple[int, int, int]] = Counter()
    for name in names:
        if product := _MATRIX.match(name):
            rows, columns, inner, blocks = (int(size or 1) for size in product.groups())
            kinds[rows, columns * blocks, inner] += 1
    special = sum(bool(_SPECIAL.match(name)) for name in names)
    multiply_add = sum(bool(_MULTIPLY_ADD.match(name)) for name in names)
    vector = sum(name.startswith("v_") for name in names) - sum(kinds.values())
    return LoopCounts(
        issued=len(names),
        exponentials=sum(name.startswith("v_exp_") for name in names),
        special=special,
        multiply_add=multiply_add,
        integer=vector - special - multiply_add,
        local=sum(name.startswith("scratch_") for name in names),
        matrix=tuple(MatrixCounts(shape, 1, False, count) for shape, count in sorted(kinds.items())),
    )
