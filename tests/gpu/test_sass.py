"""Loops in machine code: found by their branches, counted by what their instructions do; and the cycles that come of it."""

from __future__ import annotations

import dataclasses

import pytest

from sparsedsl.gpu.loop_cycles import cycles, products_a_cycle
from sparsedsl.gpu.sass import LoopCounts, MatrixCounts, loops_in
from sparsedsl.gpu.targets import TARGETS

SM_80, SM_90, SM_100 = (TARGETS[name] for name in ("sm_80", "sm_90", "sm_100"))

WARP_GROUP = """
        /*0000*/                   S2R R11, SR_CTAID.X ;   /* 0x00 */
        /*0010*/              @!P3 BRA 0x0080 ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R88, R120, gdesc[UR4].tnspB, R88, gsb0 ;
        /*0040*/              @!P0 MUFU.EX2 R3, R4 ;
        /*0050*/                   FFMA R3, R4, R5, R6 ;
        /*0060*/                   STL [R1+0x8], R3 ;
        /*0070*/               @P3 BRA 0x20 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
"""
NESTED = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   MUFU.RCP R1, R2 ;
        /*0020*/                   HMMA.16816.F32.BF16 R104, R88.reuse, R80, RZ ;
        /*0030*/                   LDL.64 R3, [R4] ;
        /*0040*/                   ISETP.GT.AND P0, PT, R2, R3, PT ;
        /*0050*/              @!P1 BRA `(0x20) ;
        /*0060*/                   HMMA.1688.F32.TF32 R104, R88, R80, R104 ;
        /*0070*/                   I2F.RP R5, R6 ;
        /*0080*/                @P1 BRA P2, 0x60 ;
        /*0090*/                @P0 BRA 0x10 ;
"""
WAITS = """
        /*0000*/                   UTCHMMA gdesc[UR6], gdesc[UR8], tmem[UR14], tmem[UR38], idesc[UR39], !UPT ;
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0020*/               @!P0 BRA 0x10 ;
        /*0030*/                @P1 BRA 0x0 ;
"""


def test_a_loop_is_what_a_backward_branch_encloses():
    (loop,) = loops_in(WARP_GROUP)
    assert loop == LoopCounts(
        issued=6, exponentials=1, special=1, multiply_add=1, integer=0, local=1,
        matrix=(MatrixCounts((64, 64, 16), 4, False, 1), MatrixCounts((64, 128, 16), 4, True, 1)),
    )  # fmt: skip
    assert loop.products(8) == 2 * (64 * 128 * 16 + 64 * 64 * 16)
    assert loop.local_share == pytest.approx(1 / 6)


def test_loops_in_loops_are_the_inner_ones_in_order():
    first, second = loops_in(NESTED)
    assert (first.issued, first.local, first.integer, first.matrix) == (4, 1, 1, (MatrixCounts((16, 8, 16), 1, False, 1),))
    assert (second.issued, second.special, second.matrix) == (3, 1, (MatrixCounts((16, 8, 8), 1, False, 1),))
    assert first.products(4) == 4 * 16 * 8 * 16


def test_a_loop_that_waits_is_no_inner_loop():
    (loop,) = loops_in(WAITS)
    assert (loop.issued, loop.tensor_memory, loop.matrix, loop.matrix_issued) == (4, 1, (), 1)


def test_cycles():
    assert [products_a_cycle(target) for target in (SM_80, SM_90, SM_100)] == [1024, 2048, 4096]
    (loop,) = loops_in(WARP_GROUP)
    found = cycles(loop, 8, SM_90)
    # Two warp groups; 64 + 32 cycles of products each, 48 + 16 of reading operands; two warps share a part's special function unit.
    assert (found.matrix, found.rest) == (2 * (64 + 32), 2 * 8)
    assert (found.serial, found.overlapped) == (192 + 16, 192)
    narrow = dataclasses.replace(loop, matrix=(MatrixCounts((64, 32, 16), 4, True, 1),))
    assert cycles(narrow, 4, SM_90).matrix == (32 + 64) * 16 * 2 / 128  # longer than the 16 cycles of the products
    more = dataclasses.replace(loop, issued=loop.issued + 100)
    assert cycles(more, 8, SM_90).rest == 2 * (more.issued - 2)
    (unknown,) = loops_in(WAITS)
    assert cycles(unknown, 4, SM_100, useful=4096.0 * 7).matrix == 7
