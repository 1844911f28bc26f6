"""What all exports share: scale, soft cap, sinks and what would be lost; lengths, offsets, sizes, programs and wrong arguments."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import sparsedsl as sd
from tests.export.brute import ANY, ANY_OF_ALL, assert_is, dense, random_mask

P = sd.patterns
ONE = torch.zeros(1, 1, dtype=torch.int32)
CALLS = {
    "cudnn": lambda pattern, **words: sd.export.cudnn(pattern, 8, **words),
    "flashmask": lambda pattern, **words: sd.export.flashmask(pattern, 8, **words),
    "flashmask 4": lambda pattern, **words: sd.export.flashmask(pattern, 8, version=4, **words),
    "magi": lambda pattern, **words: sd.export.magi(pattern, 8, **words),
    "flashinfer": lambda pattern, **words: sd.export.flashinfer(pattern, 8, block=4, **words),
    "flashinfer paged": lambda pattern, **words: sd.export.flashinfer_paged(pattern, [8], block_table=ONE, kv_lens=[8], **words),
    "flash_attention 2": lambda pattern, **words: sd.export.flash_attention(pattern, 8, **words),
    "flash_attention 4": lambda pattern, **words: sd.export.flash_attention(pattern, 8, version=4, **words),
    "flash_attention 4, blocks": lambda pattern, **words: sd.export.flash_attention(pattern, 8, version=4, blocks=True, **words),
    "splash": lambda pattern, **words: sd.export.splash(pattern, 128, block=128, **words),
    "natten": lambda pattern, **words: sd.export.natten(pattern, shape=(8,), **words),
    "xformers": lambda pattern, **words: sd.export.xformers(pattern, 8, **words),
}
SCALE = {"cudnn": "softmax_scale", "flashmask": "softmax_scale", "flashmask 4": "softmax_scale", "magi": "softmax_scale",
         "flashinfer": "sm_scale", "flashinfer paged": "sm_scale", "flash_attention 2": "softmax_scale",
         "flash_attention 4": "softmax_scale", "flash_attention 4, blocks": "softmax_scale", "natten": "scale",
         "xformers": "scale"}  # fmt: skip
CAP = {"magi": "softcap", "flashinfer": "logits_soft_cap", "flashinfer paged": "logits_soft_cap", "flash_attention 2": "softcap",
       "flash_attention 4": "softcap", "flash_attention 4, blocks": "softcap", "splash": "attn_logits_soft_cap"}  # fmt: skip
SINK = {"flashmask 4": "learnable_sink", "magi": "sink", "flash_attention 4": "learnable_sink",
        "flash_attention 4, blocks": "learnable_sink", "splash": "sinks"}  # fmt: skip


@pytest.mark.parametrize("engine", CALLS)
def test_scale_cap_and_sink_by_the_engines_names(engine):
    call, plain = CALLS[engine], P.causal()
    e = call(sd.attend(plain, scale=0.25))
    if engine == "splash":
        assert e.q_scale == 0.25 and call(plain).q_scale is None
    else:
        assert e.args[SCALE[engine]] == 0.25 and SCALE[engine] not in call(plain).args
    capped = sd.attend(plain, score=P.softcap(30))
    if engine in CAP:
        assert call(capped).args[CAP[engine]] == 30.0
    else:
        with pytest.raises(sd.UnsupportedError, match=r"score=30\*tanh\(score / 30\) would be lost"):
            call(capped)
    sunk = sd.attend(plain, sink=sd.table("sinks_of_heads", learned=True)[sd.h])
    sinks = torch.tensor([0.5, -1.0])
    if engine in SINK:
        got = call(sunk, heads=2, sinks_of_heads=sinks).args[SINK[engine]]
        assert (
            got.dtype == (torch.bfloat16 if SINK[engine] == "learnable_sink" else torch.float32)
            and got.flatten().tolist() == [0.5, -1.0]
            and got.shape[-1] == 2
        )
    else:
        with pytest.raises(sd.UnsupportedError, match=r"sink=sinks_of_heads\[h\] would be lost"):
            call(sunk, heads=2, sinks_of_heads=sinks)


def test_a_sink_is_not_rounded():
    with pytest.raises(
        sd.UnsupportedError, match=r"the sink of head 0 is 0\.1\d*, which this engine would round to 0\.100\d+: it takes"
    ):
        sd.export.flash_attention(sd.attend(P.causal(), sink=0.1), 8, version=4)
    sunk = sd.attend(P.causal(), sink=sd.table("sinks_of_heads", learned=True)[sd.h])
    e = sd.export.magi(sunk, 8, heads=2, head=1, sinks_of_heads=torch.tensor([0.5, -1.0]))
    assert e.args["sink"].tolist() == [[-1.0]]
    assert sd.export.flash_attention(sd.attend(P.causal(), sink=0.0), 8, version=4).args["learnable_sink"].tolist() == [0.0]


@pytest.mark.parametrize("engine", CALLS)
def test_no_other_score_is_dropped(engine):
    for score in (P.alibi(8), sd.score + 1, P.softcap(30) * 2, sd.tanh(sd.score) * 2, P.softcap(30, P.alibi(8))):
        with pytest.raises(sd.UnsupportedError, match=r"would be lost; sd\.compile"):
            CALLS[engine](sd.attend(P.causal(), score=score), heads=8)


@pytest.mark.parametrize("engine", CALLS)
def test_results_are_frozen_and_say_what_they_are(engine):
    e = CALLS[engine](P.causal())
    assert e.engine == engine.split(" ")[0] and any(char.isdigit() for char in e.read_at)
    assert e.bytes == sum(v.nbytes for f in dataclasses.fields(e) if isinstance(v := getattr(e, f.name), torch.Tensor))
    assert repr(e).startswith(type(e).__name__) and "bytes" in repr(e)
    with pytest.raises(dataclasses.FrozenInstanceError):
        e.args = {}
    length = 128 if engine == "splash" else 8
    assert_is(e, dense(P.causal(), length, length))


@pytest.mark.parametrize("seed", range(6))
def test_any_mask_at_any_offset(seed):
    """Engines that hold every mask, at offsets of their own, with batch entries and heads."""
    q_len, kv_len = ((9, 9), (5, 12), (12, 6))[seed % 3]
    bits = random_mask(2, 2, q_len + 3, kv_len, share=(0.1, 0.5, 0.9)[seed % 3], seed=seed)
    words = {"q_offset": 3, "batch": 2, "heads": 2, "bits": bits}
    wanted = bits[:, :, 3:].bool()
    assert_is(sd.export.cudnn(ANY_OF_ALL, q_len, kv_len, **words), wanted)
    assert_is(sd.export.flash_attention(ANY_OF_ALL, q_len, kv_len, version=4, blocks=True, block=(4, 4), **words), wanted)
    for head in (0, 1):
        assert_is(sd.export.magi(ANY_OF_ALL, q_len, kv_len, head=head, **words), wanted[:, head : head + 1])
    one = bits[0, 0]
    assert_is(sd.export.flashinfer(ANY, q_len, kv_len, q_offset=3, block=(4, 3), bits=one), wanted[:1, :1])


def test_positions_count_from_the_offset():
    for q_offset in (0, 3, 9):
        wanted = dense(P.sliding_window(4), 5, 12, q_offset)
        assert_is(sd.export.cudnn(P.sliding_window(4), 5, 12, q_offset=q_offset), wanted)
        assert_is(sd.export.flashmask(P.sliding_window(4), 5, 12, q_offset=q_offset), wanted)
        assert_is(sd.export.magi(P.sliding_window(4), 5, 12, q_offset=q_offset), wanted)
    assert_is(sd.export.cudnn(P.causal(), 5, 12), dense(P.causal(), 5, 12, 7))
    with pytest.raises(
        sd.ShapeError, match="5 queries do not end at the last of 3 keys; say where the first one stands: q_offset="
    ):
        sd.export.cudnn(P.causal(), 5, 3)
    assert_is(sd.export.flash_attention(sd.kv_idx < 9, 5, 3), torch.ones(1, 1, 5, 3).bool())


def test_sizes_are_refused_before_they_are_made():
    with pytest.raises(
        sd.UnsupportedError, match=r"cudnn: mask_func \(1, 1, 1048576\) would take at least 4 MiB, over max_bytes=1000000"
    ):
        sd.export.cudnn(sd.kv_idx < 5, 64, 8, batch=1 << 14, max_bytes=10**6)
    with pytest.raises(sd.UnsupportedError, match="the runs of keys of all queries would take at least"):
        sd.export.cudnn(P.causal(), 1 << 30)
    with pytest.raises(sd.UnsupportedError, match="the blocks of 128 x 128 tokens would take at least"):
        sd.export.flash_attention(P.causal(), 1 << 22, version=4, blocks=True)
    with pytest.raises(sd.UnsupportedError, match=r"flashinfer: mask \(36, 128, 128\)"):
        sd.export.flashinfer(P.causal(), 1024, max_bytes=1 << 19)
    bits = random_mask(256, 256)
    with pytest.raises(sd.UnsupportedError, match="the runs of keys of all queries"):
        sd.export.magi(ANY, 256, bits=bits, max_bytes=1 << 14)


def test_programs_and_other_arguments():
    with pytest.raises(
        sd.UnsupportedError, match=r"cudnn: choices depend on q and k: run attn.choices\(q, k, v\), export the bound pattern"
    ):
        sd.export.cudnn(P.moba(16, 2), 64)
    for static in (sd.compile(P.causal()), sd.Program(P.causal()), sd.attend(P.causal())):
        assert sd.export.cudnn(static, 4).mask_func.tolist() == [[[1, 2, 3, 4]]]
    for words, error, text in (
        ({}, sd.ShapeError, "the number of queries is missing"),
        ({"q_len": 0}, sd.ShapeError, "q_len must be"),
        ({"q_len": 4, "q_lens": [4]}, sd.ShapeError, "alone, without q_len"),
        ({"q_lens": [4], "kv_lens": [4, 4]}, sd.ShapeError, "must name as many sequences; got 1 and 2"),
        ({"q_lens": []}, sd.ShapeError, "at least one sequence"),
        ({"q_len": 4, "heads": 4, "kv_heads": 3}, sd.ShapeError, "heads must be a multiple of kv_heads; got 4 and 3"),
        ({"q_len": 4, "doc": ONE}, sd.TableError, "doc"),
        ({"q_len": 4, "q_ofset": 1}, sd.TableError, "q_offset"),
        ({"q_len": 4, "max_bytes": 0}, sd.ShapeError, "max_bytes must be"),
    ):
        with pytest.raises(error, match=text):
            sd.export.cudnn(P.causal(), **words)
    for words, text in (
        ({"version": 5}, "version must be 2, 3 or 4"),
        ({"blocks": True}, "blocks=True is of version 4"),
        ({"head": 1}, "head must be below heads=1"),
    ):
        with pytest.raises(sd.ShapeError, match=text):
            sd.export.flash_attention(P.causal(), 4, **words)
    with pytest.raises(sd.ShapeError, match="version must be 3 or 4"):
        sd.export.flashmask(P.causal(), 4, version=2)
    with pytest.raises(sd.ShapeError, match="shape must be one to three"):
        sd.export.natten(P.causal(), shape=(2, 2, 2, 2))
    with pytest.raises(sd.ShapeError, match="kv_padding=3 pads the keys"):
        sd.export.xformers(P.causal(), lens=[4], kv_padding=3)
    with pytest.raises(sd.TableError, match="missing table doc"):
        sd.export.cudnn(P.documents(), 4)


def test_fits_is_a_table():
    doc = torch.tensor([0] * 100 + [1] * 156)
    table = sd.export.fits(P.packed(), 256, shape=(16, 16), doc=doc)
    assert table["flash_attention 2"] == 24 and table["xformers"] == 24 and table["flashmask"] == 1024
    assert table["splash"] == sd.export.splash(P.packed(), 256, doc=doc).bytes
    assert table["natten"].startswith("natten: ")
    assert "shape=" in sd.export.fits(P.causal(), 256)["natten"]
    with pytest.raises(sd.TableError):
        sd.export.fits(P.packed(), 256)
