"""Loops in machine code of both makers: found by where they can be entered, counted by what they do; and the cycles that come of it."""

from __future__ import annotations

import dataclasses

import pytest

from sparsedsl.errors import UnsupportedError
from sparsedsl.gpu import amdgcn
from sparsedsl.gpu.loop_cycles import cycles, products_a_cycle
from sparsedsl.gpu.machine_loops import LoopCounts, MatrixCounts
from sparsedsl.gpu.sass import loops_in
from sparsedsl.gpu.targets import TARGETS

SM_80, SM_90, SM_100, GFX942 = (TARGETS[name] for name in ("sm_80", "sm_90", "sm_100", "gfx942"))

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
# Products of tensor memory, of 128 x 64 and of 64 x 128; who waits for a barrier turns behind the end, and jumps back into the loop.
WAITS = """
        /*0000*/                   UMOV UR39, 0x8100490 ;
        /*0010*/                   UTCHMMA gdesc[UR6], gdesc[UR8], tmem[UR14], tmem[UR38], idesc[UR39], !UPT ;
        /*0020*/                   UMOV UR39, 0x4210490 ;
        /*0030*/                   UTCHMMA tmem[UR6], gdesc[UR8], tmem[UR14], tmem[UR38], idesc[UR39], UPT ;
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0050*/               @!P0 BRA 0xa0 ;
        /*0060*/                   FFMA2 R2, R4, R6, R8 ;
        /*0070*/                @P1 BRA 0x0 ;
        /*0080*/                   UTCHMMA tmem[UR6], gdesc[UR8], tmem[UR14], tmem[UR38], idesc[UR39], UPT ;
        /*0090*/                   EXIT ;
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*00b0*/               @!P0 BRA 0xa0 ;
        /*00c0*/                   BRA 0x60 ;
"""
# The end of the second loop stands before its beginning, which is jumped to; beside it a loop that multiplies nothing.
AMD = """
kernel:                                ; @kernel
	s_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:                               ; =>This Inner Loop Header: Depth=1
	.loc	1 67 29                         ; file:67:29
	v_mfma_f32_32x32x8_bf16 v[0:15], v[2:3], v[4:5], 0
	v_mfma_f32_32x32x8_bf16 v[0:15], v[2:3], v[4:5], v[0:15]
	v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[0:1]
	v_exp_f32_e32 v1, v2
	v_lshlrev_b32_e32 v2, 3, v0
	scratch_load_dword v6, off, off offset:4 ; 4-byte Folded Reload
	s_cbranch_scc1 .LBB0_1
	s_branch .LBB0_3
.LBB0_2:                               ;   in Loop: Header=BB0_3 Depth=1
	v_mfma_f32_16x16x16_f16 v[0:3], v[2:3], v[4:5], v[0:3]
	s_cbranch_scc0 .LBB0_5
.LBB0_3:                               ; =>This Inner Loop Header: Depth=1
	v_rcp_f32_e32 v1, v2
	s_cbranch_execz .LBB0_2
	ds_read_b64 v[2:3], v7
	s_branch .LBB0_2
.LBB0_5:
	v_add_f32_e32 v1, v2, v3
	s_cbranch_vccnz .LBB0_5
	s_endpgm
.Lfunc_end0:
"""


def test_what_the_instructions_of_a_loop_do():
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


def test_a_jump_back_out_of_code_that_waits_is_no_loop():
    (loop,) = loops_in(WAITS)
    assert (loop.issued, loop.multiply_add) == (8 + 3, 2)
    assert loop.matrix == (MatrixCounts((64, 128, 16), 0, False, 1), MatrixCounts((128, 64, 16), 0, True, 1))
    assert loop.products(8) == loop.products(4) == 2 * 128 * 64 * 16, "one thread starts each of them, once for the block"


def test_shapes_that_the_code_does_not_say_are_not_guessed():
    (loop,) = loops_in(WAITS.replace("UMOV UR39, 0x4210490", "R2UR.64 UR38, R5"))
    assert loop.matrix_issued == 2
    for ask in (lambda: loop.products(4), lambda: cycles(loop, 4, SM_100)):
        with pytest.raises(UnsupportedError, match="the shape of a matrix instruction is not known"):
            ask()


def test_loops_of_amd_wherever_their_end_stands():
    first, second = amdgcn.loops_in(AMD)
    assert first == LoopCounts(
        issued=7, exponentials=1, special=1, multiply_add=1, integer=1, local=1, matrix=(MatrixCounts((32, 32, 8), 1, False, 2),)
    )
    assert second == LoopCounts(
        issued=6, exponentials=0, special=1, multiply_add=0, integer=0, local=0, matrix=(MatrixCounts((16, 16, 16), 1, False, 1),)
    )
    assert first.products(4) == 4 * 2 * 32 * 32 * 8
    found = cycles(first, 8, GFX942)
    # Two warps a part: each two products of 8 * 4 cycles; 4 cycles a vector instruction of 64 lanes, 16 a special one.
    assert (found.matrix, found.rest) == (2 * 2 * 32, 2 * (4 + 4 + 16))


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
    (started,) = loops_in(WAITS)
    # Once for the block: 128 x 64 reads both operands from shared memory, 64 x 128 takes as long as 128 x 128.
    assert cycles(started, 8, SM_100).matrix == cycles(started, 4, SM_100).matrix == (128 + 64) * 16 * 2 / 128 + 64
