"""On a CUDA device: systems that choose, reorder and remember against the dense meaning of their nodes, outputs and gradients."""

from __future__ import annotations

import pytest
import torch

import sparsedsl as sd
from sparsedsl import patterns
from sparsedsl.testing import assert_matches_reference, tensor

pytestmark = pytest.mark.gpu

LATER = ["selection reads later queries"]
CHUNK = 16


def length_of(kit, name):
    """Tokens of a call; in a rehearsal a few more than what is chosen of, and fewer for the kernels that the interpreter is slow with."""
    return {"hsa": 72, "nha": 40, "gated delta": 20, "kda": 20}.get(name.split(",")[0], 104) if kit.rehearsing else 2100


def beside_scores(heads):
    """A window or a choice, in documents, under ALiBi and a cap, with a sink: a mask and a score printed into the kernels along lists."""
    selected = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 32)), 3)
    pairs = patterns.causal() & (patterns.sliding_window(24) | selected) & (sd.kv_idx % 5 != 3)
    return sd.attend(pairs, score=patterns.softcap(20.0, patterns.alibi(heads)), sink=0.3)


def two_choices(heads):
    """What one choice took and another did not take away, with logits that remember less and less: a learned gate a token."""
    taken = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 32)), 5)
    dropped = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 16)), 4)
    gate = sd.table("forgotten", dtype=float, learned=True)
    kept = sd.score + gate[sd.h, sd.kv_idx] - gate[sd.h, sd.q_idx]
    return sd.attend(patterns.causal() & (taken & ~dropped | patterns.sliding_window(8)), score=kept)


# Declaration, query and key heads, inputs beside q, k and v: name -> (heads, rows, width) of the lengths and heads of the call.
SYSTEMS = {
    "hsa": (lambda heads: patterns.hsa(CHUNK, 3), (8, 2), ("retrieval_q", "landmarks")),
    "hsa, stick-breaking": (lambda heads: patterns.hsa(CHUNK, 3, "stick_breaking"), (8, 2), ("retrieval_q", "landmarks")),
    "nha": (lambda heads: patterns.nha(16, 8), (4, 2), ("gate",)),
    "nha, window 0": (lambda heads: patterns.nha(16, 0, "masked"), (4, 2), ("gate",)),
    "pbs": (lambda heads: patterns.pbs(32, 64, 0.6), (4, 2), ()),
    "pbs, one order a group": (lambda heads: patterns.pbs(32, 64, 0.6, "group"), (4, 2), ()),
    "tsa": (lambda heads: patterns.token_sparse(0.3, 16, 5, 32), (4, 2), ()),
    "ring": (lambda heads: patterns.ring_linear(sd.decay_table(heads=heads, layer=0, layers=20)), (4, 4), ()),
    "gated delta": (lambda heads: patterns.gated_delta(), (4, 4), ("g", "beta")),
    "kda": (lambda heads: patterns.kda(), (4, 4), ("channels", "beta")),
    "moba": (lambda heads: patterns.moba(32, 3), (4, 2), ()),
    "nsa": (lambda heads: patterns.nsa(16, 32, 4, 48), (4, 2), ("shares",)),
    "sticks": (lambda heads: patterns.stick_breaking(rest="first"), (4, 2), ()),
    "a choice beside scores": (beside_scores, (8, 2), ()),
    "two choices beside learned scores": (two_choices, (4, 2), ("forgotten",)),
}  # fmt: skip


def inputs_of(name, kit, length, dtype=torch.bfloat16):
    """q, k, v and the inputs of a system, its program, all of one dtype on the device of the kit."""
    declare, heads, wanted = SYSTEMS[name]
    q, k, v = kit.inputs(heads, length, dtype=dtype)
    (batch, q_heads), kv_heads = q.shape[:2], k.shape[1]
    shapes = {
        "retrieval_q": (batch, kv_heads, length, 16), "landmarks": (batch, kv_heads, length // CHUNK, 16),
        "gate": (batch, kv_heads, length, 16), "forgotten": (q_heads, length), "shares": (batch, q_heads, length, 3),
        "g": (batch, kv_heads, length), "channels": (batch, kv_heads, length, q.shape[3]), "beta": (batch, kv_heads, length),
    }  # fmt: skip
    called, ranges = {"shares": "gate", "channels": "g"}, {"g": lambda x: -x.abs(), "beta": torch.sigmoid}
    named = {}
    for number, word in enumerate(wanted):
        name = called.get(word, word)
        numbers = ranges.get(name, torch.clone)(tensor(*shapes[word], seed=7 + number))
        named[name] = numbers.to(q.dtype).to(q.device)
    return declare(q_heads), (q, k, v), named


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_systems(kit, triton_backend, name, dtype):
    if kit.rehearsing and dtype == "fp32":
        pytest.skip("rehearsal: fp16 stands for bf16, one type is enough")
    length = length_of(kit, name)
    program, qkv, named = inputs_of(name, kit, length, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    meant = () if isinstance(program, sd.Pattern) else LATER
    compared = assert_matches_reference(sd.compile(program, backend=triton_backend, allow=meant), *qkv, **named)
    assert set(compared) >= {"out", "dq", "dk", "dv"}


@pytest.mark.parametrize("name", ["hsa", "nha", "ring", "moba"])
def test_decode(kit, triton_backend, name):
    """One query at the end of a cache sees what it sees in a whole sequence."""
    length = length_of(kit, name)
    program, (q, k, v), named = inputs_of(name, kit, length)
    attn = sd.compile(program, backend=triton_backend)
    cut = {word: x[:, :, -1:] if word == "retrieval_q" else x for word, x in named.items()}
    with torch.no_grad():
        whole = attn(q, k, v, **named)[:, :, -1:]
        last = attn(q[:, :, -1:], k, v, q_offset=length - 1, **cut)
    assert torch.isfinite(last).all()
    off = (last.float() - whole.float()).norm(dim=-1) / whole.float().norm(dim=-1)
    assert float(off.max()) <= 4 * torch.finfo(q.dtype).eps, "one query and many are summed in another order, and no more"


def test_a_system_inside_of_another(kit, triton_backend):
    """What runs on kept tokens reports no choices, but chooses in the same way on every backend; both round."""
    q, k, v = kit.inputs((4, 2), length_of(kit, "tsa"))
    program = patterns.token_sparse(0.3, 16, 5, 32, inside=patterns.pbs(32, 64, 0.6))
    with torch.no_grad():
        got, wanted = (sd.compile(program, backend=backend)(q, k, v).float() for backend in (triton_backend, "tiled"))
    kept = wanted.norm(dim=-1) > 0
    assert 0 < int(kept.sum()) < kept.numel(), "nothing was dropped, or all"
    assert torch.equal(kept, got.norm(dim=-1) > 0)
    off = (got - wanted).norm(dim=-1)[kept] / wanted.norm(dim=-1)[kept]
    assert float(off.max()) <= 6 * torch.finfo(q.dtype).eps, "weights rounded one by one, and the output, by each of the two"


def test_choices_do_not_wait_for_the_device(kit, triton_backend):
    program, (q, k, v), named = inputs_of("hsa", kit, length_of(kit, "hsa"))
    attn = sd.compile(program, backend=triton_backend)
    with torch.no_grad():
        attn(q, k, v, **named)
        with kit.no_synchronisation():
            attn(q, k, v, **named)
