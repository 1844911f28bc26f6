"""The library: published sparse attention patterns as declarations. ``docs/patterns.md`` shows each with its picture.

Functions return a ``Mask``, a ``Score``, or, where a pattern is more than a mask, a ``Pattern``. Masks compose with
``& | ~ ^``, scores nest: ``softcap(50, alibi(8))``. Where a count may differ between heads or batch entries, it may be an
expression: ``sliding_window(sd.table("window")[sd.h])``.
"""

from __future__ import annotations

from sparsedsl.lang.advice import answer_for, public_only
from sparsedsl.patterns.anchors import global_tokens, prefix, sinks
from sparsedsl.patterns.blockwise import block_causal, block_diffusion, blocks, random_blocks
from sparsedsl.patterns.far_chunks import hils, hsa_ultralong, landmark, quest
from sparsedsl.patterns.grids import grid_position, neighbourhood_2d, neighbourhood_3d, sliding_tile
from sparsedsl.patterns.head_forms import differential, duo_attention, mla, retained
from sparsedsl.patterns.indexed import csa, dsa, hca, hisa, infllm_v2, nsa_published, qsa
from sparsedsl.patterns.local import causal, chunked, dilated, full, sliding_window, strided, strided_fixed
from sparsedsl.patterns.models import (
    alibi_window,
    bigbird,
    gemma2,
    gemma3,
    gpt_oss,
    llama4,
    longformer,
    mistral,
    streaming_llm,
    t5,
)
from sparsedsl.patterns.normalisers import hstu, relu_squared, sigmoid, softpick, stick_breaking
from sparsedsl.patterns.packing import document_prefix, documents, packed, shared_prefix, tree
from sparsedsl.patterns.prompts import flexprefill, h2o, mosa, seer_attention, snapkv, vsa, xattention
from sparsedsl.patterns.recurrent import based, delta_net, gated_delta, gla, kda, lightning, retnet, rwkv6, rwkv7, ssd
from sparsedsl.patterns.scores import (
    alibi,
    alibi_slope,
    fire,
    fox,
    kerple,
    relative_bias,
    softcap,
    ssmax,
    t5_bias,
    t5_bucket,
)
from sparsedsl.patterns.systems import hsa, minference, moba, nha, nsa, pbs, ring_linear, token_sparse

__all__ = [
    "alibi",
    "alibi_slope",
    "alibi_window",
    "based",
    "bigbird",
    "block_causal",
    "block_diffusion",
    "blocks",
    "causal",
    "chunked",
    "csa",
    "delta_net",
    "differential",
    "dilated",
    "document_prefix",
    "documents",
    "dsa",
    "duo_attention",
    "fire",
    "flexprefill",
    "fox",
    "full",
    "gated_delta",
    "gemma2",
    "gemma3",
    "gla",
    "global_tokens",
    "gpt_oss",
    "grid_position",
    "h2o",
    "hca",
    "hils",
    "hisa",
    "hsa",
    "hsa_ultralong",
    "hstu",
    "infllm_v2",
    "kda",
    "kerple",
    "landmark",
    "lightning",
    "llama4",
    "longformer",
    "minference",
    "mistral",
    "mla",
    "moba",
    "mosa",
    "neighbourhood_2d",
    "neighbourhood_3d",
    "nha",
    "nsa",
    "nsa_published",
    "packed",
    "pbs",
    "prefix",
    "qsa",
    "quest",
    "random_blocks",
    "relative_bias",
    "relu_squared",
    "retained",
    "retnet",
    "ring_linear",
    "rwkv6",
    "rwkv7",
    "seer_attention",
    "shared_prefix",
    "sigmoid",
    "sinks",
    "sliding_tile",
    "sliding_window",
    "snapkv",
    "softcap",
    "softpick",
    "ssd",
    "ssmax",
    "stick_breaking",
    "streaming_llm",
    "strided",
    "strided_fixed",
    "t5",
    "t5_bias",
    "t5_bucket",
    "token_sparse",
    "tree",
    "vsa",
    "xattention",
]


__getattr__, __dir__ = public_only(__name__, __all__, "pattern")
answer_for(globals(), __all__)
