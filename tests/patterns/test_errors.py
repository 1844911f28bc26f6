"""Wrong arguments and the message each gets: the function and the argument, what was wanted, what was got."""

from __future__ import annotations

import pytest

import sparsedsl as sd

P = sd.patterns
window = sd.table("window")

WRONG = [
    (
        lambda: P.sliding_window(-3),
        "sliding_window(): w must be at least 1 (the window counts the query itself); got -3",
    ),
    (
        lambda: P.sliding_window(0),
        "sliding_window(): w must be at least 1 (the window counts the query itself); got 0",
    ),
    (
        lambda: P.sliding_window(2.5),
        "sliding_window(): w must be a whole number or an index expression such as table[sd.h]; got 2.5 (float)",
    ),
    (
        lambda: P.sliding_window(window),
        "sliding_window(): w is the table 'window' itself; read it, for one value per head window[sd.h], "
        "for one per batch entry window[sd.b]",
    ),
    (
        lambda: P.sliding_window(sd.q_idx * 0 - 1),
        "sliding_window(): w must be at least 1 (the window counts the query itself); got -1",
    ),
    (lambda: P.sliding_window(True), "got True (bool)"),
    (
        lambda: P.sliding_window(4, two_sided=1),
        "sliding_window(): two_sided must be True or False; got 1 (int)",
    ),
    (lambda: P.dilated(4, 0), "dilated(): step must be at least 1; got 0"),
    (lambda: P.dilated(0, 2), "dilated(): w must be at least 1 (the window counts the query itself); got 0"),
    (
        lambda: P.dilated(4, window[sd.h]),
        "dilated(): step must be a whole number; got Index(window[h]) (Index)",
    ),
    (lambda: P.strided(0), "strided(): step must be at least 1; got 0"),
    (
        lambda: P.strided(4, local=0),
        "strided(): local must be at least 1 (the window counts the query itself); got 0",
    ),
    (
        lambda: P.strided_fixed(4, summary=5),
        "strided_fixed(): summary must be at most step, which is 4; got 5",
    ),
    (lambda: P.chunked(0), "chunked(): size must be at least 1; got 0"),
    (
        lambda: P.chunked(window[sd.h]),
        "must be known not to be zero; got window[h]. Use a constant, a length, or a table declared with",
    ),
    (lambda: P.sinks(-1), "sinks(): n must be at least 0; got -1"),
    (lambda: P.prefix(-1), "prefix(): n must be at least 0; got -1"),
    (
        lambda: P.prefix("prefix"),
        "prefix(): n must be a whole number or an index expression such as table[sd.h]; got 'prefix' (str)",
    ),
    (lambda: P.global_tokens(-1), "global_tokens(): n must be at least 0; got -1"),
    (lambda: P.documents("my doc"), "table name must be a Python identifier"),
    (
        lambda: P.documents("x", offsets="x"),
        "documents(): doc and offsets are two tables and want two names; got 'x' for both",
    ),
    (lambda: P.documents(batched="yes"), "documents(): batched must be True or False; got 'yes' (str)"),
    (
        lambda: P.document_prefix(prefix="doc"),
        "document_prefix(): prefix is a table of its own and wants its own name; got 'doc'",
    ),
    (lambda: P.packed(0), "sliding_window(): w must be at least 1"),
    (lambda: P.blocks(block_q=0), "blocks(): block_q must be at least 1; got 0"),
    (lambda: P.blocks(block_kv=-2), "blocks(): block_kv must be at least 1; got -2"),
    (lambda: P.block_causal(0), "block_causal(): block must be at least 1; got 0"),
    (lambda: P.random_blocks(0, 1, seed=0), "random_blocks(): block must be at least 1; got 0"),
    (lambda: P.random_blocks(4, -1, seed=0), "random_blocks(): count must be at least 0; got -1"),
    (lambda: P.random_blocks(4, 1, seed=-1), "random_blocks(): seed must be at least 0; got -1"),
    (lambda: P.random_blocks(4, 1, seed="a"), "random_blocks(): seed must be a whole number; got 'a' (str)"),
    (lambda: P.block_diffusion(0), "block_diffusion(): block must be at least 1; got 0"),
    (
        lambda: P.block_diffusion(16, length=40),
        "block_diffusion(): length must be a multiple of block, which is 16; got 40",
    ),
    (lambda: P.neighbourhood_2d(0, 4, 3), "neighbourhood_2d(): height must be at least 1; got 0"),
    (
        lambda: P.neighbourhood_2d(4, 4, 0),
        "neighbourhood_2d(): kernel must be at least 1 (it counts the query's own position); got 0",
    ),
    (
        lambda: P.neighbourhood_2d(4, 4, (3, 3, 3)),
        "kernel must be a whole number or 2 of them, one for each axis; got (3, 3, 3)",
    ),
    (
        lambda: P.neighbourhood_2d(4, 4, 5),
        'kernel * dilation must fit the grid on each axis; got (5, 5) in (4, 4). edge="clip" has no limit',
    ),
    (
        lambda: P.neighbourhood_2d(8, 8, 3, dilation=3),
        "kernel * dilation must fit the grid on each axis; got (9, 9) in (8, 8)",
    ),
    (
        lambda: P.neighbourhood_2d(8, 8, 3, edge="wrap"),
        "neighbourhood_2d(): edge must be one of 'shift', 'clip'; got 'wrap'",
    ),
    (
        lambda: P.neighbourhood_2d(8, 8, 3, order="hilbert"),
        "order must be one of 'raster', 'tiled', 'morton'; got 'hilbert'",
    ),
    (
        lambda: P.neighbourhood_2d(8, 8, 3, order="tiled"),
        "order=\"tiled\" and tile=(..) go together; got order='tiled', tile=None",
    ),
    (
        lambda: P.neighbourhood_2d(8, 8, 3, tile=(2, 2)),
        "order=\"tiled\" and tile=(..) go together; got order='raster', tile=(2, 2)",
    ),
    (
        lambda: P.neighbourhood_2d(8, 8, 3, order="tiled", tile=3),
        "the tile must divide the grid on each axis; got (3, 3) in (8, 8)",
    ),
    (
        lambda: P.neighbourhood_2d(8, 16, 3, order="morton"),
        'order="morton" wants sides that are one power of two; got 8 x 16',
    ),
    (
        lambda: P.neighbourhood_2d(8, 8, 3, causal="rows"),
        "causal must be True or False, or 2 of them, one for each axis; got 'rows'",
    ),
    (lambda: P.neighbourhood_3d(8, 8, 0, 3), "neighbourhood_3d(): width must be at least 1; got 0"),
    (
        lambda: P.sliding_tile(64, 8, 8),
        "sliding_tile(): shape must be (height, width) or (frames, height, width); got 64",
    ),
    (
        lambda: P.sliding_tile((8, 8), 6, 4),
        "sliding_tile(): kernel must be a multiple of the tile on each axis; got (6, 6), tile (4, 4)",
    ),
    (
        lambda: P.sliding_tile((8, 8), 12, 4),
        "sliding_tile(): kernel must fit the grid on each axis; got (12, 12) in (8, 8)",
    ),
    (
        lambda: P.grid_position(sd.q_idx, 64),
        "grid_position(): shape must be a tuple of whole numbers; got 64",
    ),
    (
        lambda: P.grid_position("q", (8, 8)),
        "index of grid_position() must be an index expression or a whole number; got 'q' (str)",
    ),
    (lambda: P.alibi(0), "alibi(): heads must be at least 1; got 0"),
    (
        lambda: P.alibi(8, "score"),
        "alibi(): logit must be a score or index expression or a number; got 'score' (str)",
    ),
    (lambda: P.alibi_slope(-1), "alibi_slope(): heads must be at least 1; got -1"),
    (lambda: P.softcap(0), "softcap(): cap must be a positive number; got 0 (int)"),
    (lambda: P.softcap(float("inf")), "softcap(): cap must be a positive number; got inf (float)"),
    (lambda: P.relative_bias(-1), "relative_bias(): max_distance must be at least 0; got -1"),
    (lambda: P.t5_bias(3), "t5_bucket(): buckets must be at least 4; got 3"),
    (
        lambda: P.t5_bucket(33),
        "t5_bucket(): buckets must be even if bidirectional, half for each direction; got 33",
    ),
    (
        lambda: P.t5_bucket(32, 8),
        "t5_bucket(): max_distance must be at least 9 (8 distances have a bucket of their own); got 8",
    ),
    (lambda: P.longformer(-2), "longformer(): window must be at least 0; got -2"),
    (
        lambda: P.longformer(5),
        "longformer(): window counts keys on both sides together and must be even; got 5",
    ),
    (
        lambda: P.bigbird(window_blocks=2),
        "bigbird(): window_blocks must be odd, with equal numbers on both sides; got 2",
    ),
    (lambda: P.bigbird(global_blocks=-1), "bigbird(): global_blocks must be at least 0; got -1"),
    (
        lambda: P.streaming_llm(0),
        "sliding_window(): w must be at least 1 (the window counts the query itself); got 0",
    ),
    (lambda: P.alibi_window(8, 0), "sliding_window(): w must be at least 1"),
    (lambda: P.mistral(-1), "mistral(): layer must be at least 0; got -1"),
    (lambda: P.gemma2(0, cap=-50), "softcap(): cap must be a positive number; got -50 (int)"),
    (lambda: P.gemma3(0, period=0), "gemma3(): period must be at least 1; got 0"),
    (lambda: P.gemma3(0, query_scalar=0), "gemma3(): query_scalar must be a positive number; got 0 (int)"),
    (lambda: P.gpt_oss("local"), "gpt_oss(): layer must be a whole number; got 'local' (str)"),
    (lambda: P.llama4(-1), "llama4(): layer must be at least 0; got -1"),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message.split(" must")[0][:40] for _, message in WRONG])
def test_wrong_arguments(call, message):
    with pytest.raises(sd.PatternError) as error:
        call()
    assert message in str(error.value)
