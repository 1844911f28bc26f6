"""What the loops of a kernel do, read in NVIDIA's machine code (SASS).

Input: a cubin. Output: :class:`~sparsedsl.gpu.machine_loops.LoopCounts` of every innermost loop that multiplies matrices, in the order of
the code. Counts are instructions of one warp.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from sparsedsl.errors import UnsupportedError
from sparsedsl.gpu.machine_loops import LoopCounts, MatrixCounts, Step, inner_loops
from sparsedsl.gpu.nvidia_tools import run_tool

__all__ = ["loops_in", "loops_of"]

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA\S*\s((?:\S+,\s*)*)`?\(?(?:0x)?([0-9a-f]+)\b")
_GUARD = re.compile(r"^@!?U?P\w+\s+")
_WGMMA = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\.\S*\s+R\d+,\s*(\w+)")
_MMA = re.compile(r"HMMA\.(16|8)(8|16|32)(\d+)\.")
_TENSOR_MEMORY = re.compile(r"\bUTC\w*MMA\S*\s+(\w+)\[.*idesc\[(UR\d+)\]")
_CONSTANT = re.compile(r"^UMOV (UR\d+), 0x([0-9a-f]+)$")
_UNIFORM = re.compile(r"^(\w\S*)\s+UR(\d+)\b")
# The units that execute an instruction, by the first word of its name; what is not here only takes its issue slot.
_PACKED = ("FFMA2", "FMUL2", "FADD2")  # two numbers a lane
_MULTIPLY_ADD = ("FFMA", "FMUL", "FADD", "IMAD", *_PACKED, *_PACKED)
_INTEGER_AND_COMPARE = (
    "FMNMX", "FMNMX3", "FSETP", "FSEL", "ISETP", "SEL", "LOP3", "IADD3", "VIADD", "SHF", "LEA", "PRMT", "IABS", "VIMNMX", "IMNMX", "FSET",
    "F2FP", "I2FP", "PLOP3", "FCHK", "ISCADD", "MOV",
)  # fmt: skip
_CONVERSIONS = ("I2F", "F2I", "F2F", "POPC", "FLO")  # on the special function units
_LOCAL = ("LDL", "STL")
_ENDS = ("EXIT", "RET")
# The inner length of an instruction of tensor memory, by the format of its left operand: fp16, bf16, tf32.
_INNER = {0: 16, 1: 16, 2: 8}


def loops_of(cubin: bytes) -> tuple[LoopCounts, ...]:
    """The loops of a kernel's binary.

    Raises:
        UnsupportedError: Triton's copy of ``cuobjdump`` cannot be run, or does not know the binary's processor.
    """
    text = run_tool("cuobjdump", cubin, ".cubin", ["-sass"])
    if not _LINE.search(text):
        raise UnsupportedError(f"cuobjdump shows no machine code: {text.strip()[:200]!r}")
    return loops_in(text)


def loops_in(text: str) -> tuple[LoopCounts, ...]:
    r"""The loops of machine code as ``cuobjdump -sass`` prints it.

    >>> code = '''
    ...     /*0000*/  LDL R1, [R2] ;
    ...     /*0010*/  MUFU.EX2 R3, R4 ;
    ...     /*0020*/  HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR12], R24 ;
    ...     /*0030*/  @P3 BRA 0x10 ;'''
    >>> loops_in(code)[0].issued, loops_in(code)[0].exponentials, loops_in(code)[0].local
    (3, 1, 0)
    """
    lines = [(int(place, 16), words) for place, words in _LINE.findall(text)]
    numbers = {place: number for number, (place, _) in enumerate(lines)}
    words = [words for _, words in lines]
    code, shapes = [_step(one, numbers) for one in words], _tensor_memory_shapes(words)
    return inner_loops(code, lambda places: _counts(words, shapes, places))


def _step(words: str, numbers: dict[int, int]) -> Step:
    plain = _GUARD.sub("", words)
    guarded = plain != words
    branch = _BRANCH.search(plain)
    if branch is not None:
        return Step(words, numbers.get(int(branch[2], 16)), guarded or bool(branch[1]))
    return Step(words, goes_on=guarded or plain.split(".")[0].split()[0] not in _ENDS)


def _tensor_memory_shapes(words: Sequence[str]) -> dict[int, tuple[int, int, int]]:
    """Number of each instruction of tensor memory -> its shape, from the descriptor that was last put into the register it names."""
    held: dict[str, int] = {}
    found = {}
    for number, text in enumerate(words):
        if moved := _CONSTANT.match(text):
            held[moved[1]] = int(moved[2], 16)
        elif product := _TENSOR_MEMORY.search(text):
            found[number] = _described(held.get(product[2], 0))
        elif written := _UNIFORM.match(_GUARD.sub("", text)):
            wide = 2 if re.search(r"\.(64|WIDE)\b", written[1]) else 4 if ".128" in written[1] else 1
            for register in range(int(written[2]), int(written[2]) + wide):
                held.pop(f"UR{register}", None)
    return found


def _described(descriptor: int) -> tuple[int, int, int]:
    """The shape that an instruction descriptor of ``tcgen05.mma`` says; PTX's manual has the places of its bits.

    >>> _described(0x8100490), _described(0x8110490), _described(0)
    ((128, 64, 16), (128, 64, 16), (0, 0, 0))
    """
    rows, columns, inner = (descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8, _INNER.get(descriptor >> 7 & 7, 0)
    return (rows, columns, inner) if rows and columns and inner else (0, 0, 0)


def _counts(words: Sequence[str], shapes: dict[int, tuple[int, int, int]], places: Sequence[int]) -> LoopCounts:
    names = [_GUARD.sub("", words[place]).split()[0] for place in places]
    first = Counter(name.split(".")[0] for name in names)
    kinds: Counter[tuple[tuple[int, int, int], int, bool]] = Counter()
    for place in places:
        if group := _WGMMA.search(words[place]):
            kinds[(int(group[1]), int(group[2]), int(group[3])), 4, group[4] == "gdesc"] += 1
        elif single := _MMA.search(words[place]):
            kinds[(int(single[1]), int(single[2]), int(single[3])), 1, False] += 1
        elif started := _TENSOR_MEMORY.search(words[place]):
            kinds[shapes[place], 0, started[1] == "gdesc"] += 1
    return LoopCounts(
        issued=len(names),
        exponentials=sum(name.startswith("MUFU.EX2") for name in names),
        special=first["MUFU"] + sum(first[name] for name in _CONVERSIONS),
        multiply_add=sum(first[name] for name in _MULTIPLY_ADD),
        integer=sum(first[name] for name in _INTEGER_AND_COMPARE),
        local=sum(first[name] for name in _LOCAL),
        matrix=tuple(MatrixCounts(shape, warps, shared, n) for (shape, warps, shared), n in sorted(kinds.items())),
    )
