"""Every pattern of the library through every engine: its mask, or a refusal whose pair is real; what fits at a million tokens."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparsedsl as sd
from tests.export.brute import assert_is, assert_refusal_is_real, dense

P = sd.patterns
S = 64
DOC = torch.tensor([0] * 24 + [1] * 10 + [2] * 30)
CHOSEN = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.6
START = torch.tensor([0, 24, 34, 64])

# One entry for each public function that gives a mask or a pattern: the declaration, tables, heads.
LIBRARY = {
    "alibi_window": (lambda: P.alibi_window(4, 8), {}, 4),
    "bigbird": (lambda: P.bigbird(8), {}, 1),
    "block_causal": (lambda: P.block_causal(8), {}, 1),
    "block_diffusion": (lambda: P.block_diffusion(8, length=32), {}, 1),
    "blocks": (lambda: P.blocks("chosen", 8, heads=True), {"chosen": CHOSEN}, 2),
    "causal": (P.causal, {}, 1),
    "chunked": (lambda: P.chunked(16), {}, 1),
    "dilated": (lambda: P.dilated(4, 3), {}, 1),
    "document_prefix": (P.document_prefix, {"doc": DOC, "start": START, "prefix": torch.tensor([8, 5, 16])}, 1),
    "documents": (P.documents, {"doc": DOC}, 1),
    "duo_attention": (lambda: P.duo_attention(8, 4), {"retrieval": torch.tensor([True, False])}, 2),
    "full": (P.full, {}, 1),
    "gemma2": (lambda: P.gemma2(0), {}, 1),
    "gemma3": (lambda: P.gemma3(0), {}, 1),
    "global_tokens": (lambda: P.global_tokens(4), {}, 1),
    "gpt_oss": (lambda: P.gpt_oss(0), {}, 4),
    "hstu": (lambda: P.hstu(P.causal(), divisor=64), {}, 1),
    "llama4": (lambda: P.llama4(0), {}, 1),
    "longformer": (lambda: P.longformer(8, 2), {}, 1),
    "mistral": (P.mistral, {}, 1),
    "mla": (P.mla, {}, 1),
    "neighbourhood_2d": (lambda: P.neighbourhood_2d(8, 8, 3), {}, 1),
    "neighbourhood_3d": (lambda: P.neighbourhood_3d(4, 4, 4, (3, 3, 3), causal=(True, False, False)), {}, 1),
    "packed": (lambda: P.packed(6), {"doc": DOC}, 1),
    "prefix": (lambda: P.prefix(10), {}, 1),
    "random_blocks": (lambda: P.random_blocks(8, 2, seed=0), {}, 1),
    "relu_squared": (lambda: P.relu_squared(P.sliding_window(8)), {}, 1),
    "retained": (lambda: P.retained(32, 4), {"stays": CHOSEN[:1, :, :4].reshape(1, 1, 32)}, 1),
    "shared_prefix": (P.shared_prefix, {"branch": torch.tensor([0] * 20 + [1] * 14 + [2] * 10 + [3] * 20)}, 1),
    "sigmoid": (lambda: P.sigmoid(P.sliding_window(8), length=64), {}, 1),
    "sinks": (lambda: P.sinks(4), {}, 1),
    "sliding_tile": (lambda: P.sliding_tile((8, 8), (4, 4), (2, 2)), {}, 1),
    "sliding_window": (lambda: P.sliding_window(8), {}, 1),
    "softpick": (lambda: P.softpick(P.causal()), {}, 1),
    "stick_breaking": (P.stick_breaking, {}, 1),
    "strided": (lambda: P.strided(8), {}, 1),
    "strided_fixed": (lambda: P.strided_fixed(8, summary=2), {}, 1),
    "streaming_llm": (P.streaming_llm, {}, 1),
    "t5": (lambda: P.t5(decoder=True), {}, 4),
    "tree": (P.tree, {"subtree_end": torch.tensor([min(64, n + 1 + (n % 7) * (n % 3)) for n in range(S)])}, 1),
}  # fmt: skip
# Programs, which are refused as a whole: some that choose, and some that are no softmax over a mask.
CHOOSING = {"hsa", "moba", "nsa", "pbs", "token_sparse"}
NO_SOFTMAX = {"based", "delta_net", "gated_delta", "gla", "kda", "nha", "ring_linear", "rwkv6", "rwkv7", "ssd"}
ENGINES = {
    "cudnn": (sd.export.cudnn, {}),
    "flashmask": (sd.export.flashmask, {"version": 4}),
    "magi": (sd.export.magi, {}),
    "flashinfer": (sd.export.flashinfer, {"block": (16, 8)}),
    "flash_attention 2": (sd.export.flash_attention, {}),
    "flash_attention 3": (sd.export.flash_attention, {"version": 3}),
    "flash_attention 4": (sd.export.flash_attention, {"version": 4}),
    "flash_attention 4, blocks": (sd.export.flash_attention, {"version": 4, "blocks": True, "block": (16, 8)}),
    "xformers": (sd.export.xformers, {}),
    "natten": (sd.export.natten, {"shape": (8, 8)}),
}


def test_every_mask_of_the_library_is_here():
    given = {name: inspect.signature(getattr(P, name)).return_annotation for name in P.__all__}
    assert {*LIBRARY} == {name for name, kind in given.items() if kind in ("Mask", "Pattern")}


@pytest.mark.parametrize("name", LIBRARY)
def test_t18_the_mask_or_a_refusal_that_is_real(name):
    make, tables, heads = LIBRARY[name]
    pattern = make()
    mask = pattern.mask if isinstance(pattern, sd.Pattern) else pattern
    wanted = dense(mask, S, S, heads=heads, **tables)
    held = []
    for engine, (function, words) in ENGINES.items():
        try:
            e = function(mask, S, heads=heads, **words, **tables)
        except sd.UnsupportedError as refusal:
            text = str(refusal)
            assert text.startswith(engine.split(" ")[0] + ": ")
            if "heads 0 and" in text:
                query, key = (int(part) for part in text.split("first at query ")[1].split(")")[0].split(", key "))
                assert not torch.equal(wanted[0, 0, query, key], wanted[0, 1, query, key])
            elif "along axis" not in text:
                assert_refusal_is_real(text, wanted[0, 0])
        else:
            held.append(engine)
            assert_is(e, wanted)
    assert "cudnn" in held and "flash_attention 4, blocks" in held


@pytest.mark.parametrize("name", sorted(CHOOSING | NO_SOFTMAX))
def test_programs_are_refused_with_the_way_out(name):
    program = P.ring_linear(sd.decay_table(4, layer=3, layers=20)) if name == "ring_linear" else getattr(P, name)()
    way = (
        r"choices depend on q and k: run attn.choices\(q, k, v\)"
        if name in CHOOSING
        else r"no single softmax over a mask.*sd\.compile"
    )
    with pytest.raises(sd.UnsupportedError, match=f"^magi: .*{way}"):
        sd.export.magi(program, 64)


class Largest(TorchDispatchMode):
    """The largest tensor that any operator made, in bytes."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
        return result


def test_t19_fits_at_a_million_tokens():
    """Bytes follow the runs: nothing is nearly as large as a bit a pair (128 GiB), nor as a byte a block of 128 x 128 (64 MiB)."""
    length = 1 << 20
    with Largest() as largest:
        table = sd.export.fits(P.sliding_window(4096), length, max_bytes=1 << 26)
    assert largest.nbytes <= 1 << 26
    assert table["cudnn"] == 12 * length and table["flashmask"] == 4 * length  # 12 MiB, 4 MiB
    assert table["magi"] == 40 and table["flash_attention 2"] == table["splash"] == table["xformers"] == 0
    assert "flashinfer: mask (" in table["flashinfer"] and "over max_bytes" in table["flashinfer"]
    assert "cudnn" in str(table) and len(str(table).splitlines()) == len(table)
