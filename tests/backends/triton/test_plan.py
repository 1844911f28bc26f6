"""What a call of the ``triton`` lowering is planned as, and what calls share: no kernel is run here."""

from __future__ import annotations

import os

import pytest
import torch

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx, score
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.tiles import classify
from sparsedsl.backends.registry import choose
from sparsedsl.backends.triton import backend as triton_backend
from sparsedsl.backends.triton.attention import TritonKernel, missing
from sparsedsl.backends.triton.launching import strided, tiles_contiguous
from sparsedsl.backends.triton.prepared import prepare
from sparsedsl.codegen.to_triton import triton_source, variant_of
from sparsedsl.runtime.call import check_call
from sparsedsl.runtime.request import CallFacts, Request
from sparsedsl.testing import tensor

causal = kv_idx <= q_idx
doc, chosen, bias = sd.table("doc", monotone=True), sd.table("chosen", dtype=bool), sd.table("bias", learned=True)
packed = sd.attend(causal & (doc[q_idx] == doc[kv_idx]))
blocks = sd.attend(chosen[q_idx // 8, kv_idx // 8])


def facts(**changed):
    values = {
        "device": "cuda", "dtype": "bfloat16", "batch": 1, "heads": 8, "kv_heads": 8, "q_len": 4096, "kv_len": 4096, "head_dim": 64,
        "head_dim_v": 64, "grad": True, "lse": True,
    }  # fmt: skip
    return CallFacts(*(values | changed).values())


def planned(facts, backend, lacking=None):
    """The plan on a machine that lacks what is said there for kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "missing", lambda device: lacking)
        return choose(Request("attention", facts, packed), backend)


def prepared_for(pattern, rows=40, kv_len=40, offset=0, **tables):
    domain = Domain(rows, kv_len, offset, 1, 2, tables)
    return prepare(
        pattern, domain, torch.device("cpu"), (16, 16), lambda domain, block: classify(pattern.mask.expr, domain, block)
    )


# ---- which calls it runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dims", [(16, 16), (72, 200), (256, 256)])
def test_calls_that_it_runs(dtype, dims):
    plan = planned(facts(dtype=dtype, head_dim=dims[0], head_dim_v=dims[1]), "triton")
    assert plan.backend == "triton"


@pytest.mark.parametrize(
    ("changed", "words"), [({"dtype": "float64"}, "no float64"), ({"head_dim": 257}, "up to 256 wide; this one is 257"),
                           ({"head_dim_v": 512}, "up to 256 wide; this one is 512")]
)  # fmt: skip
def test_calls_that_it_refuses(changed, words):
    with pytest.raises(sd.UnsupportedError, match=f"{words}.*Use backend='tiled'"):
        planned(facts(**changed), "triton")
    assert planned(facts(**changed), "auto").backend != "triton"


def test_where_there_is_no_triton_auto_takes_another():
    assert planned(facts(), "auto").backend == "triton"
    assert planned(facts(), "auto", "it is not here").backend != "triton"
    assert planned(facts(device="cpu"), "auto").backend == "cpp"
    with pytest.raises(sd.UnsupportedError, match="it is not here"):
        planned(facts(), "triton", "it is not here")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels run on CPU in Triton's interpreter")
def test_on_cpu_it_says_what_it_needs():
    pytest.importorskip("triton")
    assert missing("cuda") is None
    q, k, v = (tensor(1, 2, 20, 16, seed=seed) for seed in range(3))
    with pytest.raises(sd.UnsupportedError, match=r"the generated kernels need a GPU .*TRITON_INTERPRET=1.*Use backend='tiled'"):
        sd.compile(causal, backend="triton")(q, k, v)


# ---- what the source is made for -------------------------------------------------------------------------------------------------------


def test_nothing_in_the_source_depends_on_lengths():
    texts = {
        prepared_for(packed, rows, keys, doc=torch.arange(200) // 9).source.text for rows, keys in ((40, 40), (3, 77), (1, 199))
    }
    assert len(texts) == 1
    variant = variant_of(packed, head_dim=16)
    assert triton_source(packed, variant) is triton_source(packed, variant)


def test_rows_may_be_empty_where_queries_lie_beyond_the_keys():
    window = sd.attend(causal & (q_idx - kv_idx < 9))
    assert prepared_for(window).variant.safe_rows and not prepared_for(window, offset=1).variant.safe_rows
    assert prepared_for(sd.attend(causal), offset=100).variant.safe_rows


def test_positions_and_tables_of_64_bits_only_where_they_are_needed():
    assert not prepared_for(packed, doc=torch.zeros(40, dtype=torch.int64)).variant.wide
    assert prepared_for(sd.attend(causal), offset=1 << 31).variant.wide
    huge = torch.zeros(1, dtype=torch.bool).expand(1 << 16, 1 << 15)
    assert prepared_for(blocks, chosen=huge).variant.wide_tables == {"chosen"}
    assert not prepared_for(blocks, chosen=torch.zeros(5, 5, dtype=torch.bool)).variant.wide_tables


def test_offsets_of_64_bits_follow_the_strides_of_every_tensor_of_a_launch():
    near, repeated = torch.zeros(1, 1, 40, 16), torch.zeros(1, 1, 1, 16).expand(1, 1, 40, 16)
    # As far apart as rows of 2**26 numbers: nothing of it is touched.
    far = torch.empty(40 << 26, dtype=torch.float16, device="meta").as_strided((1, 1, 40, 16), (0, 0, 1 << 26, 1))
    prepared = prepared_for(sd.attend(causal))

    def reaching(**tensors):
        values = {"rows": 40, "scale": 1.0}
        for name, t in tensors.items():
            values |= strided(name, t)
        return prepared.reaching(values)

    assert reaching() is reaching(q=near, k=near, v=repeated) is prepared
    for name in ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v", "another"):
        assert reaching(**{"q": near, "k": repeated, name: far}).variant.wide
    assert reaching(q=near, k=far) is reaching(out=far)
    # Kernels that no pattern changes count the numbers of a tile in 32 bits, and get a copy of what lies further apart.
    assert tiles_contiguous(near) is near and tiles_contiguous(far).stride(2) == 16


# ---- what calls share --------------------------------------------------------------------------------------------------------------------


def schedule(kernel, length, doc=None, heads=2, **tables):
    q = torch.zeros(1, heads, length, 16)
    tables = {**({} if doc is None else {"doc": doc}), **tables}
    return kernel.schedule(check_call(kernel.pattern, q, q, q, tables))


def test_the_same_lengths_and_tables_are_worked_out_once():
    kernel = TritonKernel(packed, lambda domain, block: classify(packed.mask.expr, domain, block))
    ids = torch.arange(40) // 9
    first = schedule(kernel, 40, ids)
    assert schedule(kernel, 40, ids) is first and schedule(kernel, 30, ids) is not first
    assert first.loop("forward", (16, 16)) is first.loop("forward", (32, 32)), "ends of spans do not depend on tiles"
    assert first.loop("forward", (16, 16)) is not first.loop("grad_kv", (16, 16))
    ids += torch.arange(40) // 20
    changed = schedule(kernel, 40, ids)
    assert changed is not first
    name = "first_keys_0_ptr"
    assert not torch.equal(changed.loop("forward", (16, 16))[name], first.loop("forward", (16, 16))[name])


def test_learned_tables_may_change_their_values():
    pattern = sd.attend(causal, score=score + bias[h, q_idx])
    kernel = TritonKernel(pattern, lambda domain, block: classify(pattern.mask.expr, domain, block))
    values = torch.zeros(2, 40)
    first = schedule(kernel, 40, bias=values)
    values += 1
    assert schedule(kernel, 40, bias=values) is first
    assert schedule(kernel, 40, bias=torch.zeros(2, 41)) is not first


def test_lists_are_made_for_each_tile_size_and_each_side():
    made = []

    def lists(domain, block):
        made.append(block)
        return classify(blocks.mask.expr, domain, block)

    domain = Domain(40, 40, 0, 1, 2, {"chosen": torch.ones(5, 5, dtype=torch.bool)})
    prepared = prepare(blocks, domain, torch.device("cpu"), (16, 16), lists)
    assert prepared.variant.keys == prepared.variant.queries == "lists"
    some = prepared.loop("forward", (16, 16))
    assert prepared.loop("grad_q", (16, 16)) is some and prepared.loop("forward", (32, 16)) is not some
    assert made == [(16, 16), (32, 16)]
    by_keys = prepared.loop("grad_kv", (16, 16))
    assert {"full_starts_queries_ptr", "partial_columns_queries_ptr"} <= set(by_keys)


def test_a_window_needs_nothing_from_memory():
    for kernel in ("forward", "decode", "grad_q", "grad_kv"):
        assert prepared_for(sd.attend(causal & (q_idx - kv_idx < 9))).loop(kernel, (16, 16)) == {}
