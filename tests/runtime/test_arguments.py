"""What a call is given before it is checked: offsets, one batch of keys, slips that are warned of, tensors that are refused."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention.flex_attention import flex_attention

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx
from sparsedsl.runtime import arguments
from sparsedsl.testing import tensor as seeded

causal = kv_idx <= q_idx
doc, other = sd.table("doc", monotone=True), sd.table("other")
bias = sd.table("bias", dtype=float)
choosing = sd.attend(causal & (sd.patterns.sliding_window(8) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 8)), 2)))


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(arguments, "_TOLD", set())


def tensor(*shape, seed=0):
    return seeded(*shape, seed=seed)


def qkv(q_len, kv_len, *, batch=1, kv_batch=None, heads=2, dim=8):
    kv_batch = batch if kv_batch is None else kv_batch
    return (
        tensor(batch, heads, q_len, dim),
        tensor(kv_batch, heads, kv_len, dim, seed=1),
        tensor(kv_batch, heads, kv_len, dim, seed=2),
    )


def told(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in found if issubclass(w.category, sd.CallWarning)]


# ---- positions ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [causal, choosing])
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_end_puts_the_last_query_at_the_last_key(pattern, backend):
    attn = sd.compile(pattern, backend=backend)
    q, k, v = qkv(3, 40)
    assert torch.equal(attn(q, k, v, q_offset="end"), attn(q, k, v, q_offset=37))
    if pattern is choosing:
        ends, numbers = (attn.choices(q, k, v, q_offset=offset) for offset in ("end", 37))
        assert ends.keys() == numbers.keys() and len(ends) == 1


def test_end_is_part_of_a_graph():
    attn = sd.compile(causal, backend="tiled")
    q, k, v = qkv(3, 40)
    torch._dynamo.reset()
    graph = torch.compile(lambda *x: attn(*x, q_offset="end"), fullgraph=True, backend="eager")
    assert torch.equal(graph(q, k, v), attn(q, k, v, q_offset=37))


@pytest.mark.parametrize("offset", ["start", -1, 2.0, True])
def test_an_offset_that_is_none_is_refused(offset):
    with pytest.raises(sd.ShapeError, match=r"q_offset must be a whole number of at least 0, .* or 'end'"):
        sd.compile(causal)(*qkv(5, 3), q_offset=offset)


def test_the_end_is_behind_the_first_query():
    with pytest.raises(sd.ShapeError, match="no more queries than keys; got 5 queries and 3 keys"):
        sd.compile(causal)(*qkv(5, 3), q_offset="end")


@pytest.mark.parametrize(
    "pattern",
    [causal, q_idx < 5, sd.attend(True, score=sd.score + bias[kv_idx - q_idx + 50]), doc[q_idx] == doc[kv_idx], choosing],
)  # fmt: skip
def test_fewer_queries_than_keys_without_an_offset_are_warned_of_once(pattern):
    attn, tensors = sd.compile(pattern), qkv(1, 40)
    tables = {"doc": torch.arange(40) // 9, "bias": torch.zeros(100)}
    wanted = attn.pattern.tables if attn.program.static is not None else ()
    words = {name: tables[name] for name in wanted}
    (text,) = told(lambda: attn(*tensors, **words))
    assert "q_offset='end' (or 39, the position of the first query)" in text and "pass q_offset=0" in text
    assert not told(lambda: attn(*tensors, **words)), "once is enough"


@pytest.mark.parametrize("pattern", [sd.attend(True), kv_idx < 20, doc[q_idx] == other[kv_idx]])
def test_positions_that_are_not_compared_may_differ(pattern):
    attn = sd.compile(pattern)
    words = {name: torch.arange(40) // 9 for name in attn.pattern.tables}
    assert not told(lambda: attn(*qkv(1, 40), **words))


def test_who_says_where_the_queries_stand_is_not_warned():
    attn = sd.compile(causal)
    for offset in (0, 39, "end", torch.tensor(39)):
        assert not told(lambda offset=offset: attn(*qkv(1, 40), q_offset=offset))
    assert not told(lambda: attn(*qkv(40, 40)))
    assert not told(lambda: attn(*qkv(40, 7))), "queries beyond the keys, as between two texts"


def test_an_offset_beyond_the_keys_is_warned_of():
    (text,) = told(lambda: sd.compile(causal)(*qkv(1, 40), q_offset=40))
    assert "q_offset=40 puts the last of 1 queries at position 40, beyond the last of 40 keys, at 39" in text
    assert "q_offset='end' (or 39)" in text
    assert not told(lambda: sd.compile(kv_idx < 9)(*qkv(1, 40), q_offset=40))


def test_tokens_before_heads_are_warned_of():
    q = tensor(1, 64, 4, 8)
    (text,) = told(lambda: sd.compile(causal)(q, q, q))
    assert "64 heads of 4 tokens" in text and "q.transpose(1, 2)" in text
    assert not told(lambda: sd.compile(causal)(q, q, q))


def test_a_decoding_step_of_many_heads_is_none():
    q, k = tensor(1, 64, 1, 8), tensor(1, 64, 100, 8)
    assert not told(lambda: sd.compile(causal)(q, k, k, q_offset="end"))


# ---- one batch of keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [causal, choosing])
@pytest.mark.parametrize("backend", ["reference", "tiled", "auto"])
def test_keys_of_batch_1_serve_all_queries(pattern, backend):
    attn = sd.compile(pattern, backend=backend)
    q, k, v = qkv(40, 40, batch=3, kv_batch=1)
    k, v = k.requires_grad_(), v.requires_grad_()
    out = attn(q, k, v)
    out.square().sum().backward()
    copies = [t.detach().repeat(3, 1, 1, 1).requires_grad_() for t in (k, v)]
    wanted = attn(q, *copies)
    wanted.square().sum().backward()
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close([k.grad, v.grad], [t.grad.sum(0, keepdim=True) for t in copies])


def test_queries_of_batch_1_do_not_serve_all_keys():
    with pytest.raises(sd.ShapeError, match="q, k and v must have one batch size"):
        sd.compile(causal)(*qkv(4, 4, batch=1, kv_batch=3))


# ---- tensors without values, of inference, of another place --------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [causal, choosing])
def test_meta_tensors_give_shapes_and_are_checked(pattern):
    attn = sd.compile(pattern)
    q, k, v = (t.to("meta") for t in qkv(40, 40))
    out, lse = attn(q, k, v, return_lse=True)
    assert (out.shape, out.device.type, lse.shape) == (q.shape, "meta", q.shape[:3])
    with pytest.raises(sd.ShapeError, match="k and v must have the same length"):
        attn(q, k, v[:, :, 1:])


@pytest.mark.parametrize("backend", ["reference", "tiled", "flex", "auto"])
def test_tables_of_inference_mode_count_no_writes_and_are_compared(backend):
    attn = sd.compile(causal & (doc[q_idx] == doc[kv_idx]), backend=backend)
    dense = sd.compile(causal & (doc[q_idx] == doc[kv_idx]), backend="reference")
    with torch.inference_mode():
        q, k, v = qkv(300, 300)
        ids = torch.arange(300) // 37
        before = attn(q, k, v, doc=ids)
        ids[100:] = 9
        after = attn(q, k, v, doc=ids)
        torch.testing.assert_close(after, dense(q, k, v, doc=ids))
    assert not torch.allclose(before, after)


def test_facts_of_tables_of_inference_mode_are_checked_after_a_write():
    attn = sd.compile(causal & (doc[q_idx] == doc[kv_idx]))
    with torch.inference_mode():
        ids = torch.arange(40)
        attn(*qkv(40, 40), doc=ids)
        ids[3] = 0
        with pytest.raises(sd.TableError, match="monotone but falls"):
            attn(*qkv(40, 40), doc=ids)


@pytest.mark.parametrize("pattern", [causal, choosing])
def test_rows_of_other_devices_are_refused_by_name(pattern, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.experimental import context_parallel

    attn = sd.compile(pattern)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        q, k, v = (distribute_tensor(t, mesh, [Shard(2)]) for t in qkv(40, 40))
        with pytest.raises(sd.UnsupportedError, match=r"rows of q.*cp=plan\.on\(mesh\)"):
            attn(q, k, v)
        with pytest.raises(sd.UnsupportedError, match=r"got a DTensor, of which choices\(\)"):
            attn.choices(q, k, v)
        assert attn(*(t.to_local() for t in (q, k, v))).shape == q.shape
        buffer = torch.zeros(1, 40)
        with (
            context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[1]),
            pytest.raises(sd.UnsupportedError, match=r"inside of torch's context_parallel\(\).*cp="),
        ):
            attn(*qkv(40, 40))
        attn(*qkv(40, 40))
    finally:
        dist.destroy_process_group()


# ---- heads --------------------------------------------------------------------------------------------------------------------------


window = sd.table("window")
by_head = causal & (q_idx - kv_idx < window[h])


@pytest.mark.parametrize("pattern", [sd.attend(causal, score=sd.patterns.alibi(4)), sd.attend(causal, heads=4)])
def test_a_part_of_the_heads_is_refused_where_the_pattern_says_how_many_there_are(pattern):
    attn = sd.compile(pattern)
    assert attn(*qkv(9, 9, heads=4)).shape == (1, 4, 9, 8)
    for heads in (2, 8):
        with pytest.raises(sd.ShapeError, match=f"declared for 4 heads; this call has {heads}"):
            attn(*qkv(9, 9, heads=heads))


@pytest.mark.parametrize("pattern", [by_head, by_head & sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 2)), 2)])
def test_a_part_of_the_heads_is_refused_where_a_table_has_more(pattern):
    attn, widths = sd.compile(pattern), torch.tensor([2, 3, 4, 5])
    attn(*qkv(9, 9, heads=4), window=widths)
    with pytest.raises(sd.ShapeError, match="'window' is read by h and has 4 heads; this call has 2"):
        attn(*qkv(9, 9, heads=2), window=widths)
    assert attn(*qkv(9, 9, heads=2), window=widths[2:]).shape == (1, 2, 9, 8)


def test_a_table_that_is_not_only_read_by_the_head_does_not_count_heads():
    near = sd.table("near", dtype=float)
    pattern = sd.attend(causal, score=sd.score + near[sd.h] - near[sd.q_idx])
    assert pattern.head_reads == frozenset()
    q, k, v = qkv(9, 9, heads=2)
    near = torch.linspace(0, 1, 9)
    torch.testing.assert_close(
        sd.compile(pattern)(q, k, v, near=near),
        sd.compile(pattern, backend="reference")(q, k, v, near=near),
        rtol=1e-5,
        atol=1e-5,
    )


def test_declared_heads_follow_the_pattern():
    score = sd.patterns.softcap(9, sd.patterns.alibi(4)) + 1
    pattern = sd.attend(causal, score=score)
    assert score.heads == pattern.heads == 4 and sd.attend(causal).heads is None
    assert pattern != sd.attend(causal, score=sd.parse(score.text)) and pickle.loads(pickle.dumps(pattern)) == pattern
    from sparsedsl.program.program_text import read_program

    assert "heads=4" in pattern.text and read_program(sd.Program(pattern).text).static == pattern
    program = sd.Program(sd.attend(causal & sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 2)), 2), score=score))
    from sparsedsl.program.program_text import read_program

    again = read_program(program.text)
    assert again == program and again.root.pattern.heads == 4
    with pytest.raises(sd.PatternError, match="one part is written for 8 heads, another for 4"):
        sd.patterns.alibi(4, sd.patterns.alibi(8))
    with pytest.raises(sd.PatternError, match="heads must be a whole number of at least 1; got 0"):
        sd.attend(causal, heads=0)


def test_analyses_take_the_heads_that_the_pattern_says():
    pattern = sd.attend(causal, score=sd.patterns.alibi(4))
    assert sd.analyse(pattern, 64).heads == 4
    assert (
        "heads 4" in str(sd.compile(pattern).explain(64)) and sd.analyse(by_head, 64, window=torch.tensor([1, 2, 3])).heads == 3
    )
    assert sd.compile(by_head).block_mask(256, 256, window=torch.tensor([1, 2, 3])).kv_num_blocks.shape[1] == 3
    for ask in (lambda: sd.analyse(pattern, 64, heads=2), lambda: sd.compile(pattern).explain(64, heads=2)):
        with pytest.raises(sd.ShapeError, match="declared for 4 heads; this call has 2"):
            ask()


# ---- functions for FlexAttention ------------------------------------------------------------------------------------------------------


def test_a_block_mask_goes_to_another_process():
    attn = sd.compile(sd.attend(causal & (doc[q_idx] == doc[kv_idx]), score=sd.patterns.softcap(5)))
    ids = torch.arange(256) // 100
    mask = attn.block_mask(256, 256, doc=ids)
    again = pickle.loads(pickle.dumps(mask))
    scores = pickle.loads(pickle.dumps(attn.score_mod(doc=ids)))
    q, k, v = qkv(256, 256)
    wanted = attn(q, k, v, doc=ids)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=again, score_mod=scores), wanted)
