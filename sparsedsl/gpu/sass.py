"""What the loops of a compiled kernel do in one turn, counted in NVIDIA's machine code (SASS): the work that decides speed, without a GPU.

Input: a cubin. Output: a :class:`LoopCounts` for every innermost loop that multiplies matrices, in the order of the code. A loop is what
a backward branch encloses. Counts are instructions of one warp; :mod:`sparsedsl.gpu.loop_cycles` makes cycles of them.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from sparsedsl.errors import UnsupportedError
from sparsedsl.gpu.nvidia_tools import run_tool

__all__ = ["LoopCounts", "MatrixCounts", "loops_in", "loops_of"]

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA\S*\s(?:\S+,\s*)*`?\(?(?:0x)?([0-9a-f]+)\b")
_GUARD = re.compile(r"^@!?U?P\w+\s+")
_WGMMA = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\.\S*\s+R\d+,\s*(\w+)")
_MMA = re.compile(r"HMMA\.(16|8)(8|16|32)(\d+)\.")
# The units that execute an instruction, by the first word of its name; what is not here only takes its issue slot.
_MULTIPLY_ADD = ("FFMA", "FMUL", "FADD", "IMAD", "FFMA2", "FMUL2", "FADD2")
_INTEGER_AND_COMPARE = (
    "FMNMX", "FMNMX3", "FSETP", "FSEL", "ISETP", "SEL", "LOP3", "IADD3", "VIADD", "SHF", "LEA", "PRMT", "IABS", "VIMNMX", "IMNMX", "FSET",
    "F2FP", "I2FP", "PLOP3", "FCHK", "ISCADD", "MOV",
)  # fmt: skip
_CONVERSIONS = ("I2F", "F2I", "F2F", "POPC", "FLO")  # on the special function units
_LOCAL = ("LDL", "STL")


@dataclass(frozen=True)
class MatrixCounts:
    """Matrix instructions of one kind in a turn. ``shape``: rows, columns and inner length of one; ``warps`` that execute it together
    (4: a warp group); ``from_shared``: whether its left operand lies in shared memory; ``count``: how many."""

    shape: tuple[int, int, int]
    warps: int
    from_shared: bool
    count: int


@dataclass(frozen=True)
class LoopCounts:
    """Instructions that one warp issues in one turn of a loop.

    ``issued`` all of them; ``exponentials`` EX2 and ``special`` all of the special function units; ``multiply_add`` of the FMA units;
    ``integer`` of the integer and compare units; ``local`` loads and stores of local memory; ``matrix`` instructions by kind, empty where
    their shape is not in the code (``tensor_memory``: how many those are, of Blackwell).
    """

    issued: int
    exponentials: int
    special: int
    multiply_add: int
    integer: int
    local: int
    matrix: tuple[MatrixCounts, ...]
    tensor_memory: int = 0

    @property
    def matrix_issued(self) -> int:
        """Matrix instructions of any kind."""
        return self.tensor_memory + sum(kind.count for kind in self.matrix)

    def products(self, warps: int) -> int:
        """Multiplications that a block of ``warps`` warps executes on matrix units in a turn; those done twice count twice."""
        return sum(kind.count * kind.shape[0] * kind.shape[1] * kind.shape[2] * (warps // kind.warps) for kind in self.matrix)

    @property
    def local_share(self) -> float:
        """The part of what is issued that reads or writes local memory."""
        return self.local / max(1, self.issued)


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
    code = [(int(place, 16), words) for place, words in _LINE.findall(text)]
    ends = []
    for place, words in code:
        to = _BRANCH.search(_GUARD.sub("", words))
        if to is not None and int(to[1], 16) < place:
            ends.append((int(to[1], 16), place))
    found = []
    for begin, end in sorted(ends):
        body = [words for place, words in code if begin <= place <= end]
        counts = _counts(body)
        inner = [other for other in ends if other != (begin, end) and begin <= other[0] and other[1] <= end]
        # A loop around others has their instructions too; one that waits for a barrier multiplies nothing.
        around = any(_counts([w for p, w in code if b <= p <= e]).matrix_issued for b, e in inner)
        if counts.matrix_issued and not around:
            found.append(counts)
    return tuple(found)


def _counts(body: list[str]) -> LoopCounts:
    names = [_GUARD.sub("", words).split()[0] for words in body]
    first = Counter(name.split(".")[0] for name in names)
    kinds: Counter[tuple[tuple[int, int, int], int, bool]] = Counter()
    for words in body:
        if group := _WGMMA.search(words):
            kinds[(int(group[1]), int(group[2]), int(group[3])), 4, group[4] == "gdesc"] += 1
        elif single := _MMA.search(words):
            kinds[(int(single[1]), int(single[2]), int(single[3])), 1, False] += 1
    return LoopCounts(
        issued=len(body),
        exponentials=sum(name.startswith("MUFU.EX2") for name in names),
        special=first["MUFU"] + sum(first[name] for name in _CONVERSIONS),
        multiply_add=sum(first[name] for name in _MULTIPLY_ADD),
        integer=sum(first[name] for name in _INTEGER_AND_COMPARE),
        local=sum(first[name] for name in _LOCAL),
        matrix=tuple(MatrixCounts(shape, warps, shared, n) for (shape, warps, shared), n in sorted(kinds.items())),
        tensor_memory=first["UTCHMMA"] + first["UTCQMMA"],
    )
