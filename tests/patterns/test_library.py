"""The library as a whole: every public name has its text form on file, reads back from it, and is documented."""

from __future__ import annotations

import inspect

import pytest

import sparsedsl as sd
from sparsedsl.program.program_text import read_program

P = sd.patterns

# One entry for each public function, more where options change the form. The texts are in tests/golden/patterns/test_library/.
EXAMPLES = {
    "alibi": lambda: P.alibi(8),
    "alibi.table": lambda: P.alibi(),
    "alibi.on_capped": lambda: P.alibi(12, P.softcap(30)),
    "alibi_slope": lambda: P.alibi_slope(8),
    "alibi_slope.twelve": lambda: P.alibi_slope(12),
    "alibi_window": lambda: P.alibi_window(16, 256),
    "bigbird": lambda: P.bigbird(),
    "bigbird.causal": lambda: P.bigbird(32, random_count=1, causal=True),
    "block_causal": lambda: P.block_causal(16),
    "block_diffusion": lambda: P.block_diffusion(16),
    "block_diffusion.length": lambda: P.block_diffusion(16, length=64),
    "blocks": lambda: P.blocks(),
    "blocks.per_head": lambda: P.blocks("chosen", 64, 32, heads=True, batched=True),
    "causal": lambda: P.causal(),
    "chunked": lambda: P.chunked(8192),
    "chunked.per_head": lambda: P.chunked(sd.table("size", values_in=(1, 64))[sd.h]),
    "dilated": lambda: P.dilated(64, 4),
    "dilated.two_sided": lambda: P.dilated(64, 4, two_sided=True),
    "duo_attention": lambda: P.duo_attention(),
    "document_prefix": lambda: P.document_prefix(),
    "documents": lambda: P.documents(),
    "documents.batched": lambda: P.documents("segment", batched=True),
    "documents.offsets": lambda: P.documents(offsets="start"),
    "fire": lambda: P.fire(2),
    "fox": lambda: P.fox(),
    "full": lambda: P.full(),
    "gemma2": lambda: P.gemma2(0),
    "gemma2.odd": lambda: P.gemma2(1, query_scalar=144),
    "gemma3": lambda: P.gemma3(0),
    "global_tokens": lambda: P.global_tokens(4),
    "gpt_oss": lambda: P.gpt_oss(0),
    "grid_position": lambda: P.grid_position(sd.q_idx, (8, 8), order="morton")[0],
    "hstu": lambda: P.hstu(P.causal(), 4096),
    "kerple": lambda: P.kerple(),
    "kerple.power": lambda: P.kerple(P.softcap(30), kernel="power"),
    "llama4": lambda: P.llama4(0),
    "longformer": lambda: P.longformer(),
    "longformer.dilated": lambda: P.longformer(64, 2, dilation=3),
    "mistral": lambda: P.mistral(),
    "mla": lambda: P.mla(),
    "neighbourhood_2d": lambda: P.neighbourhood_2d(32, 48, (7, 5)),
    "neighbourhood_2d.clip": lambda: P.neighbourhood_2d(32, 48, 6, edge="clip", causal=(False, True)),
    "neighbourhood_2d.dilated": lambda: P.neighbourhood_2d(32, 48, 5, dilation=3),
    "neighbourhood_2d.morton": lambda: P.neighbourhood_2d(16, 16, 5, order="morton"),
    "neighbourhood_2d.tiled": lambda: P.neighbourhood_2d(32, 48, 7, order="tiled", tile=(8, 8)),
    "neighbourhood_3d": lambda: P.neighbourhood_3d(8, 16, 16, (3, 5, 5), causal=(True, False, False)),
    "packed": lambda: P.packed(),
    "packed.window": lambda: P.packed(128),
    "prefix": lambda: P.prefix(128),
    "prefix.table": lambda: P.prefix(sd.table("prefix")[sd.b]),
    "random_blocks": lambda: P.random_blocks(64, 2, seed=0),
    "random_blocks.causal": lambda: P.random_blocks(64, 1, seed=3, causal=True),
    "relative_bias": lambda: P.relative_bias(64),
    "relative_bias.one_way": lambda: P.relative_bias(64, bidirectional=False),
    "relu_squared": lambda: P.relu_squared(P.causal(), 64),
    "retained": lambda: P.retained(64, recent=6),
    "shared_prefix": lambda: P.shared_prefix(),
    "sigmoid": lambda: P.sigmoid(P.causal(), 4096),
    "sinks": lambda: P.sinks(4),
    "sliding_tile": lambda: P.sliding_tile((32, 48), (24, 24), (8, 8)),
    "sliding_tile.video": lambda: P.sliding_tile((8, 16, 16), (4, 8, 8), (4, 4, 4)),
    "sliding_window": lambda: P.sliding_window(512),
    "sliding_window.per_head": lambda: P.sliding_window(sd.table("window")[sd.h]),
    "sliding_window.two_sided": lambda: P.sliding_window(512, two_sided=True),
    "softpick": lambda: P.softpick(P.causal()),
    "softcap": lambda: P.softcap(50),
    "softcap.of_alibi": lambda: P.softcap(50, P.alibi(8)),
    "stick_breaking": lambda: P.stick_breaking(),
    "ssmax": lambda: P.ssmax(),
    "streaming_llm": lambda: P.streaming_llm(),
    "strided": lambda: P.strided(64),
    "strided.far_only": lambda: P.strided(64, local=1),
    "strided_fixed": lambda: P.strided_fixed(64, summary=4),
    "t5": lambda: P.t5(decoder=True),
    "t5_bias": lambda: P.t5_bias(),
    "t5_bucket": lambda: P.t5_bucket(),
    "tree": lambda: P.tree(),
}
PROGRAMS = {
    "based": lambda: P.based(),
    "delta_net": lambda: P.delta_net(),
    "flexprefill": lambda: P.flexprefill(),
    "gated_delta": lambda: P.gated_delta(),
    "gla": lambda: P.gla(),
    "rwkv6": lambda: P.rwkv6(),
    "rwkv7": lambda: P.rwkv7(),
    "csa": lambda: P.csa(),
    "differential": lambda: P.differential(),
    "dsa": lambda: P.dsa(),
    "h2o": lambda: P.h2o(),
    "hca": lambda: P.hca(sink=0.5),
    "hils": lambda: P.hils(),
    "hisa": lambda: P.hisa(),
    "infllm_v2": lambda: P.infllm_v2(),
    "minference": lambda: P.minference(),
    "nsa_published": lambda: P.nsa_published(),
    "qsa": lambda: P.qsa(),
    "hsa": lambda: P.hsa(),
    "kda": lambda: P.kda(),
    "hsa_ultralong": lambda: P.hsa_ultralong(),
    "landmark": lambda: P.landmark(),
    "lightning": lambda: P.lightning(4, 3, 20),
    "mosa": lambda: P.mosa(),
    "hsa.stick_breaking": lambda: P.hsa(32, 8, "stick_breaking", inner="softmax1"),
    "moba": lambda: P.moba(),
    "nha": lambda: P.nha(),
    "nha.slots_only": lambda: P.nha(window=0, empty="masked", temperature=1.0),
    "nha.window_only": lambda: P.nha(window=None),
    "nsa": lambda: P.nsa(),
    "pbs": lambda: P.pbs(),
    "pbs.group": lambda: P.pbs(64, 512, 0.95, share="group"),
    "quest": lambda: P.quest(),
    "quest.ranked": lambda: P.quest(own=False),
    "retnet": lambda: P.retnet(4),
    "ring_linear": lambda: P.ring_linear(sd.decay_table(4, layer=3, layers=20)),
    "seer_attention": lambda: P.seer_attention(),
    "snapkv": lambda: P.snapkv(),
    "ssd": lambda: P.ssd(),
    "token_sparse": lambda: P.token_sparse(),
    "token_sparse.pbs": lambda: P.token_sparse(0.01, inside=P.pbs()),
    "vsa": lambda: P.vsa(),
    "xattention": lambda: P.xattention(),
}


def test_every_public_name_has_an_example():
    assert {name.split(".")[0] for name in EXAMPLES | PROGRAMS} == set(P.__all__)
    assert sorted(P.__all__) == P.__all__


@pytest.mark.parametrize("name", EXAMPLES)
def test_text(golden, name):
    assert golden == EXAMPLES[name]().text


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_text(golden, name):
    assert golden == sd.Program(PROGRAMS[name]()).text


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_text_reads_back(name):
    program = sd.Program(PROGRAMS[name]())
    assert read_program(program.text) == program


@pytest.mark.parametrize("name", EXAMPLES)
def test_text_reads_back(name):
    expression = EXAMPLES[name]()
    parts = [expression.mask, expression.score, expression.sink] if isinstance(expression, sd.Pattern) else [expression]
    for part in filter(lambda part: part is not None, parts):
        again = sd.parse(part.text)
        # a constant's kind is not in its text: `True` reads back as a mask, a learned read as a score
        assert again.same_as(part) and again.key == part.key, part.text


@pytest.mark.parametrize("name", EXAMPLES | PROGRAMS)
def test_same_arguments_same_key(name):
    make = (EXAMPLES | PROGRAMS)[name]
    first, second = (sd.Program(make()) if name in PROGRAMS else make() for _ in range(2))
    assert first.key == second.key


@pytest.mark.parametrize("name", P.__all__)
def test_docstring(name):
    """First a sentence, with the maths where it fits; arguments, errors and source where there are any; an example."""
    function = getattr(P, name)
    text = inspect.getdoc(function)
    assert text.splitlines()[0].endswith(".")
    for argument in inspect.signature(function).parameters:
        assert argument in text.split("Args:")[-1], f"{name}: argument {argument} is not explained"
    assert ">>> import sparsedsl as sd" in text
    if name not in ("alibi_slope", "t5_bucket", "grid_position", "packed", "block_causal", "alibi_window"):
        assert "Source:" in text
