"""Kernels of recurrent sources, interpreted, against the recurrences written as loops in float64: results, states and all gradients.

How far off a result may be: twice what the same loop is off in the precision of the kernels, plus a rounding of what is added up, before
anything cancels (the loop on absolute values, :func:`linear_sizes`, :func:`slot_sizes`).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedsl.backends.tiled.scan_slots import SlotState
from sparsedsl.backends.triton.scan_linear import linear_scan_triton
from sparsedsl.backends.triton.scan_pass import ScanTiles
from sparsedsl.backends.triton.scan_slots import slot_scan_triton
from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.testing import tensor

HALVES = (torch.float16, torch.bfloat16)
CUTS = (ScanTiles(32, 16, 16, 4), ScanTiles(16, 16, 32, 4), ScanTiles(64, 32, 16, 4))


@pytest.fixture(autouse=True, scope="module")
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# ---- the recurrences -----------------------------------------------------------------------------------------------------------------


def linear_loop(q, k, v, state, *, log_decay, scale, q_offset, documents):
    """out and the last state, key after key."""
    group, outs, states = q.shape[1] // k.shape[1], [], []
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    decay = log_decay.to(q.dtype).exp()[:, None, None]
    for j in range(k.shape[2]):
        if documents is not None and j:
            state = state * (documents[:, j] == documents[:, j - 1])[:, None, None, None]
        state = decay * state + k[:, :, j, :, None] * v[:, :, j, None, :]
        states.append(state)
    for i in range(q.shape[2]):
        outs.append(scale * (q[:, :, i, None, :] @ states[q_offset + i])[:, :, 0])
    return torch.stack(outs, 2), state


def slot_loop(q, k, v, write, decay, keys, values, *, seen, scale, delay, q_offset, documents):
    """Scores and what is read of the values at every slot, row after row, and the last state; ``seen``: None, or rows that see nothing."""
    group, at = q.shape[1] // k.shape[1], {-1: (keys, values)}
    for j in range(k.shape[2]):
        if documents is not None and j:
            same = (documents[:, j] == documents[:, j - 1])[:, None, None, None]
            keys, values = keys * same, values * same
        a, s = decay[:, :, j, :, None], write[:, :, j, :, None]
        keys, values = a * keys + s * k[:, :, j, None, :], a * values + s * v[:, :, j, None, :]
        at[j] = keys, values
    scores, read = [], []
    for i in range(q.shape[2]):
        then = [x.repeat_interleave(group, dim=1) for x in at[max(q_offset + i - delay, -1)]]
        scores.append(scale * (then[0] @ q[:, :, i, :, None])[..., 0])
        read.append(then[1])
    return torch.stack(scores, 2), torch.stack(read, 2), keys, values


def rows_that_see(k, q_len, q_offset, delay, documents, written, masked):
    """(B, Hkv, Sq): whether slots hold anything for a query."""
    seen = torch.ones(*k.shape[:2], q_len, dtype=torch.bool)
    for i in range(q_len):
        newest = q_offset + i - delay
        if documents is not None:
            seen[:, :, i] &= (documents[:, q_offset + i] == documents[:, max(newest, 0)])[:, None]
        if masked and newest < 0:
            seen[:, :, i] &= written
    return seen


# ---- linear attention ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    q_len: int = 40
    kv_len: int = 40
    q_offset: int = 0
    width: int = 5
    width_v: int = 7
    dtype: torch.dtype = torch.float32
    strength: float = 0.3
    state: bool = False
    documents: tuple[int, ...] = ()
    cut: ScanTiles = CUTS[0]
    layout: str = "contiguous"

    def make(self):
        heads = self.kv_heads * self.group
        shapes = (
            (heads, self.q_len, self.width),
            (self.kv_heads, self.kv_len, self.width),
            (self.kv_heads, self.kv_len, self.width_v),
        )
        leaves = [tensor(self.batch, *shape, seed=i, dtype=self.dtype, layout=self.layout) for i, shape in enumerate(shapes)]
        leaves.append(tensor(self.batch, heads, self.width, self.width_v, seed=3) * self.state)
        log_decay = -self.strength * tensor(heads, seed=4).abs()
        words = {"scale": 0.4, "q_offset": self.q_offset, "documents": document_ids(self.documents, self.kv_len)}
        cotangents = (
            tensor(self.batch, heads, self.q_len, self.width_v, seed=5, dtype=self.dtype),
            tensor(*leaves[3].shape, seed=6),
        )
        return leaves, log_decay, words, cotangents


def document_ids(begins, length):
    """Ids that change at ``begins``, one row."""
    if not begins:
        return None
    return torch.tensor([[sum(begin <= j for begin in begins) for j in range(length)]])


def with_gradients(run, leaves, cotangents):
    """Results by name, gradients as d0, d1, ..."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    results = run(*leaves)
    total = sum((torch.where(x.isfinite(), x, 0) * d.to(x)).sum() for x, d in zip(results, cotangents, strict=True))
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [
        *(x.detach() for x in results),
        *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)),
    ]


def assert_close(names, got, exact, plain, sizes, dtype):
    """``exact``: in float64; ``plain``: the loop in float32; ``sizes``: what a rounding is relative to.
    A state that was not given is not named."""
    fine = torch.finfo(torch.float32).eps
    for name, one, wanted, rough, size in zip(names, got, exact, plain, sizes, strict=False):
        assert one.shape == wanted.shape, name
        assert not one.isnan().any(), name
        finite = wanted.isfinite()
        assert torch.equal(one.isfinite(), finite), name
        one, rough = (torch.where(finite, x.double(), 0.0) for x in (one, rough))
        error = (one - torch.where(finite, wanted, 0.0)).abs()
        own = (rough - torch.where(finite, wanted, 0.0)).abs().max()
        rounding = torch.finfo(dtype).eps if dtype in HALVES and name not in ("lse", "keys", "values", "last") else fine
        allowed = 2 * (own + (rounding + 4 * fine) * size) + torch.finfo(dtype).smallest_normal
        assert error.max() <= allowed, f"{name}: off by {error.max():.3g}, allowed {allowed:.3g}"


def assert_linear(case: Linear):
    leaves, log_decay, words, cotangents = case.make()

    def kernels(q, k, v, state):
        given = {"state": state} if case.state else {}
        return linear_scan_triton(q, k, v, log_decay, tiles=case.cut, **words, **given)

    def loop(kind, *tensors):
        run = lambda *x: linear_loop(*x, log_decay=log_decay, **words)  # noqa: E731
        return with_gradients(run, [x.to(kind) for x in tensors], [x.to(kind) for x in cotangents])

    exact, plain = loop(torch.float64, *leaves), loop(torch.float32, *leaves)
    absolute = [x.abs() for x in leaves], [x.double().abs() for x in cotangents]
    sizes = with_gradients(
        lambda *x: linear_loop(*x, log_decay=log_decay, **words), [x.double() for x in absolute[0]], absolute[1]
    )  # every term is positive
    got = with_gradients(kernels, leaves, cotangents)
    names = ("out", "last", "q", "k", "v", "state")[: 6 if case.state else 5]
    assert_close(names, got, exact, plain, [x.abs().max() for x in sizes], case.dtype)


LINEAR = {
    "ragged": Linear(),
    "state, two heads a key head, offset": Linear(kv_heads=2, group=2, state=True, q_len=21, kv_len=37, q_offset=13),
    "documents, batch, transposed": Linear(batch=2, documents=(9, 16, 17, 33), state=True, layout="transposed"),
    "strong decay": Linear(strength=200.0, cut=CUTS[1], group=2),
    "no decay": Linear(strength=0.0, cut=CUTS[2], q_len=70, kv_len=70),
    "one row": Linear(q_len=1, kv_len=1, state=True, width=1, width_v=1),
    "wide": Linear(q_len=17, kv_len=17, width=33, width_v=40),
    "half": Linear(dtype=torch.float16, group=2, state=True),
    "bfloat16": Linear(dtype=torch.bfloat16, group=2, documents=(20,)),
}


@pytest.mark.parametrize("case", LINEAR.values(), ids=LINEAR)
def test_R1_R10_linear_attention_and_its_gradients(case):
    assert_linear(case)


# Batch entries, key heads, query heads of each: programs are what the interpreter takes its time for.
HEADS = [sizes for sizes in itertools.product((1, 2), repeat=3) if math.prod(sizes) <= 4]


@st.composite
def linear_cases(draw):
    kv_len = draw(st.integers(1, 36))
    q_len = draw(st.integers(1, kv_len))
    sizes = dict(zip(("batch", "kv_heads", "group"), draw(st.sampled_from(HEADS)), strict=True))
    sizes |= {name: draw(st.integers(1, 18)) for name in ("width", "width_v")}
    return Linear(
        **sizes, q_len=q_len, kv_len=kv_len, q_offset=draw(st.integers(0, kv_len - q_len)),
        dtype=draw(st.sampled_from((torch.float32, *HALVES))), strength=draw(st.sampled_from((0.0, 0.1, 3.0))),
        state=draw(st.booleans()), documents=tuple(sorted(draw(st.sets(st.integers(1, 35), max_size=3)))),
        cut=draw(st.sampled_from(CUTS)), layout=draw(st.sampled_from(("contiguous", "transposed"))),
    )  # fmt: skip


@given(linear_cases())
@settings(max_examples=6)
def test_random_linear_attention(case):
    assert_linear(case)


def wave(a, rows, columns=2):
    """The numbers of the reference values: sin(a + 0.7 i + 1.3 j)."""
    i, j = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(columns, dtype=torch.float64)
    return torch.sin(a + 0.7 * i + 1.3 * j)[None, None].float()


def assert_rows(got, wanted):
    torch.testing.assert_close(got.reshape(-1), torch.tensor(wanted), rtol=0, atol=2e-6)


def test_R_linear_attention_known_values():
    q, k, v = (wave(a, 4) for a in (0.1, 0.5, 0.9))
    out, last = linear_scan_triton(q, k, v, torch.tensor([-(2**-0.5)]), scale=2**-0.5)
    assert_rows(out, [0.558072, 0.576004, 1.161225, 0.534414, 0.989619, -0.083162, 0.366369, -0.521984])
    assert_rows(last, [0.692203, -0.578084, 0.118360, 0.772038])


def test_R7_two_calls_are_one():
    leaves, log_decay, *_ = Linear(group=2, q_len=40).make()
    q, k, v, _ = leaves
    whole, last = linear_scan_triton(q, k, v, log_decay, scale=0.4)
    first, state = linear_scan_triton(q[:, :, :23], k[:, :, :23], v[:, :, :23], log_decay, scale=0.4)
    second, end = linear_scan_triton(q[:, :, 23:], k[:, :, 23:], v[:, :, 23:], log_decay, scale=0.4, state=state)
    torch.testing.assert_close(torch.cat([first, second], 2), whole)
    torch.testing.assert_close(end, last)


def test_R9_a_decay_of_zero():
    q, k, v = (tensor(1, 1, 20, 4, seed=i) for i in range(3))
    out, last = linear_scan_triton(q, k, v, torch.tensor([-math.inf]), scale=0.5)
    torch.testing.assert_close(out, 0.5 * (q * k).sum(3, keepdim=True) * v)
    torch.testing.assert_close(last, k[:, :, -1:].transpose(2, 3) @ v[:, :, -1:])


# ---- gated slots ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slots(Linear):
    slots: int = 6
    delay: int = 3
    temperature: float = 8.0
    empty: str = "zero_sink"
    strength: float = 3.0
    written: bool = True

    def make(self):
        leaves, _, words, (d_out, _) = super().make()
        lead = self.batch, self.kv_heads
        gate = (tensor(*lead, self.kv_len, self.slots, seed=7, layout=self.layout) * self.strength).to(self.dtype)
        before = [tensor(*lead, self.slots, width, seed=8) * self.state for width in (self.width, self.width_v)]
        cotangents = [d_out, *(tensor(*shape, seed=9) for shape in (d_out.shape[:3], *(x.shape for x in before)))]
        return [*leaves[:3], gate, *before], words, cotangents


def slots_of(case, words, q, k, v, gate, keys, values):
    """The loop's results, with what a size is made of."""
    log_decay = torch.nn.functional.logsigmoid(gate) / case.temperature
    parts = {
        "scale": words["scale"],
        "delay": case.delay,
        "q_offset": case.q_offset,
        "documents": words["documents"],
        "seen": None,
    }
    written = torch.full(k.shape[:2], case.state and case.written)
    seen = rows_that_see(k, case.q_len, case.q_offset, case.delay, words["documents"], written, case.empty == "masked")
    seen = seen.repeat_interleave(case.group, dim=1)[..., None]
    scores, read, *last = slot_loop(q, k, v, -torch.expm1(log_decay), log_decay.exp(), keys, values, **parts)
    scores = torch.where(seen, scores, 0.0)
    lse = scores.logsumexp(3)
    weights = torch.where(seen, scores.softmax(3), 0.0)
    out = (weights[..., None, :] @ read)[..., 0, :]
    if case.empty == "masked":
        lse = torch.where(seen[..., 0], lse, -math.inf)
    return (out, lse, *last), weights, read


def slot_sizes(case, words, leaves, cotangents):
    """The size of what is added up in each result, before anything cancels."""
    leaves, cotangents = ([x.detach().double() for x in some] for some in (leaves, cotangents))
    _, weights, read = slots_of(case, words, *leaves)
    d_out, d_lse, *d_last = (x.abs() for x in cotangents)
    q, k, v, keys, values = (leaves[i].abs().requires_grad_() for i in (0, 1, 2, 4, 5))
    log_decay = torch.nn.functional.logsigmoid(leaves[3]) / case.temperature
    decay, write = log_decay.exp().requires_grad_(), (-torch.expm1(log_decay)).requires_grad_()
    parts = {
        "scale": words["scale"],
        "delay": case.delay,
        "q_offset": case.q_offset,
        "documents": words["documents"],
        "seen": None,
    }
    scores, sums, *last = slot_loop(q, k, v, write, decay, keys, values, **parts)
    d_weights = (sums @ d_out[..., None])[..., 0].detach()
    mean = (weights * d_weights).sum(3, keepdim=True)
    d_scores = weights * (d_weights + mean + d_lse[..., None])
    terms = scores * d_scores + weights * (sums @ d_out[..., None])[..., 0]
    total = terms.sum() + sum((x * d).sum() for x, d in zip(last, d_last, strict=True))
    dq, dk, dv, dkeys, dvalues, ddecay, dwrite = torch.autograd.grad(
        total, (q, k, v, keys, values, decay, write), allow_unused=True
    )
    # Gates: what ends and begins in each row of a chunk is added up, over the heads of a group.
    sums_of_rows = terms.detach().sum(2).unflatten(1, (-1, case.group)).sum(2)[:, :, None] + (write * dwrite).sum(2, keepdim=True)
    dgate = (sums_of_rows + ddecay * decay + dwrite * decay) * torch.sigmoid(-leaves[3]) / case.temperature
    largest = scores.abs().max()
    out = read.abs().max() * (1 + largest)
    found = [out, 1 + largest, *(x.abs().max() for x in last)]
    # a weight is exp of a score: an error of the score is as large in it
    return [*found, *((1 + largest) * x.abs().max() for x in (dq, dk, dv, dgate, dkeys, dvalues))]


def assert_slots(case: Slots):
    leaves, words, cotangents = case.make()

    def kernels(q, k, v, gate, keys, values):
        lead = k.shape[:2]
        state = SlotState(keys, values, torch.full(lead, case.written)) if case.state else None
        out, lse, last = slot_scan_triton(
            q, k, v, gate, delay=case.delay, temperature=case.temperature, empty=case.empty, state=state, tiles=case.cut, **words
        )
        assert bool(last.written.all())
        return out, lse, last.keys, last.values

    def loop(kind):
        run = lambda *x: slots_of(case, words, *x)[0]  # noqa: E731
        return with_gradients(run, [x.to(kind) for x in leaves], [x.to(kind) for x in cotangents])

    got = with_gradients(kernels, leaves, cotangents)
    names = ("out", "lse", "keys", "values", "q", "k", "v", "gate", "state.keys", "state.values")[: 10 if case.state else 8]
    sizes = slot_sizes(case, words, leaves, cotangents)
    assert_close(names, got, loop(torch.float64), loop(torch.float32), sizes, case.dtype)


SLOTS = {
    "ragged": Slots(),
    "no delay, two heads a key head": Slots(delay=0, kv_heads=2, group=2, slots=17, q_len=9, kv_len=20, q_offset=11),
    "state, offset": Slots(state=True, q_len=20, kv_len=36, q_offset=5, delay=9),
    "state of nothing": Slots(state=True, written=False, empty="masked", delay=9, q_len=20, kv_len=20),
    "documents, batch": Slots(batch=2, documents=(9, 16, 17, 33), state=True, empty="masked", layout="transposed"),
    "documents, one at the edge of a chunk": Slots(documents=(3, 11, 20), delay=5, cut=CUTS[1]),
    "strong gates": Slots(strength=300.0, temperature=0.5, cut=CUTS[2]),
    "delay beyond all": Slots(delay=50, q_len=10, kv_len=10, state=True),
    "wide": Slots(width=33, width_v=40, slots=33, q_len=17, kv_len=17, delay=1),
    "half": Slots(dtype=torch.float16, group=2, state=True),
    "bfloat16": Slots(dtype=torch.bfloat16, group=2, documents=(20,)),
}


@pytest.mark.parametrize("case", SLOTS.values(), ids=SLOTS)
def test_N1_N8_slots_and_their_gradients(case):
    assert_slots(case)


@st.composite
def slot_cases(draw):
    base = draw(linear_cases())
    return Slots(
        **{**base.__dict__, "strength": draw(st.sampled_from((1.0, 5.0, 100.0)))},
        slots=draw(st.integers(1, 20)), delay=draw(st.integers(0, 24)), temperature=draw(st.sampled_from((8.0, 1.0))),
        empty=draw(st.sampled_from(("zero_sink", "masked"))), written=draw(st.booleans()),
    )  # fmt: skip


@given(slot_cases())
@settings(max_examples=3)
def test_random_slots(case):
    assert_slots(case)


def windowed(q, k, v, window, scale, out, lse):
    """One softmax over slots and the last ``window`` tokens, from the slots' results; the share of the slots."""
    scores = scale * q.double() @ k.double().transpose(2, 3)
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    scores = scores.masked_fill((j > i) | (i - j >= window), -math.inf)
    share = (lse.double() - torch.logaddexp(lse.double(), scores.logsumexp(3))).exp()
    return share[..., None] * out + (1 - share)[..., None] * (scores.softmax(3) @ v.double()), share


def test_N_slots_known_values():
    q, k, v, f = (wave(a, 6) for a in (0.1, 0.5, 0.9, 1.7))
    words = {"temperature": 8.0, "scale": 2**-0.5}
    # after the last query the slots hold the keys before its window
    out, lse, last = slot_scan_triton(q, k[:, :, :4], v[:, :, :4], f[:, :, :4], delay=2, **words)
    joint, share = windowed(q, k, v, 2, 2**-0.5, out, lse)
    wanted = [
        0.395441,
        0.408147,
        0.622258,
        0.365622,
        0.603461,
        -0.035955,
        0.329678,
        -0.388988,
        -0.062028,
        -0.597169,
        -0.466787,
        -0.557507,
    ]
    assert_rows(joint.float(), wanted)
    assert_rows(share.float(), [0.495177, 0.301990, 0.332564, 0.382825, 0.362271, 0.302169])
    assert_rows(last.keys, [0.181992, -0.035300, 0.296850, -0.009619])
    assert_rows(last.values, [0.133684, -0.109881, 0.237437, -0.129870])
    out, lse, _ = slot_scan_triton(q, k, v, f, delay=0, **words)
    assert_rows(windowed(q, k, v, 2, 2**-0.5, out, lse)[0][:, :, 5].float(), [-0.499544, -0.581816])


def test_N4_gates_wide_open_and_shut():
    q, k, v = (tensor(1, 1, 20, 4, seed=i) for i in range(3))
    words = {"delay": 2, "temperature": 8.0, "scale": 0.5}
    for size in (1e4, math.inf):
        out, lse, last = slot_scan_triton(q, k, v, torch.full((1, 1, 20, 3), size), **words)
        assert not out.any() and not last.keys.any()
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(3)))
        out, _, last = slot_scan_triton(q, k, v, torch.full((1, 1, 20, 3), -size), **words)
        torch.testing.assert_close(out[:, :, 2:], v[:, :, :-2])
        torch.testing.assert_close(last.values, v[:, :, -1:].expand(1, 1, 3, 4))


def test_N5_two_calls_are_one():
    """A call that continues gets the keys that no query has let go of yet, again."""
    leaves, *_ = Slots(group=2).make()
    q, k, v, gate, _, _ = leaves
    words = {"delay": 5, "temperature": 8.0, "scale": 0.4}
    whole, lse, last = slot_scan_triton(q, k, v, gate, **words)
    first, lse_1, state = slot_scan_triton(q[:, :, :23], k[:, :, :18], v[:, :, :18], gate[:, :, :18], **words)
    rest = (x[:, :, 18:] for x in (k, v, gate))
    second, lse_2, end = slot_scan_triton(q[:, :, 23:], *rest, q_offset=5, state=state, **words)
    torch.testing.assert_close(torch.cat([first, second], 2), whole)
    torch.testing.assert_close(torch.cat([lse_1, lse_2], 2), lse)
    torch.testing.assert_close(end.keys, last.keys)


def test_N6_packed_documents_are_separate_calls():
    leaves, *_ = Slots(documents=(13, 30)).make()
    q, k, v, gate, _, _ = leaves
    words = {"delay": 4, "temperature": 1.0, "scale": 0.4, "empty": "masked"}
    packed = slot_scan_triton(q, k, v, gate, documents=document_ids((13, 30), 40), **words)
    for begin, end in ((0, 13), (13, 30), (30, 40)):
        alone = slot_scan_triton(*(x[:, :, begin:end] for x in (q, k, v, gate)), **words)
        for got, wanted in zip(packed[:2], alone[:2], strict=True):
            torch.testing.assert_close(got[:, :, begin:end], wanted)
    torch.testing.assert_close(packed[2].values, alone[2].values)


# ---- what they refuse, and calls of nothing ----------------------------------------------------------------------------------------------


def call_linear(x, **words):
    return linear_scan_triton(x, x, x, torch.zeros(1), **{"scale": 1.0, **words})


def call_slots(x, slots=2, **words):
    gate = torch.zeros(*x.shape[:3], slots)
    return slot_scan_triton(x, x, x, gate, **{"delay": 1, "temperature": 8.0, "scale": 1.0, **words})


@pytest.mark.parametrize(("call", "name"), [(call_linear, "linear_scan"), (call_slots, "slot_scan")])
def test_refusals(call, name):
    x = torch.ones(1, 1, 3, 2)
    with pytest.raises(UnsupportedError, match=f"{name}_triton: states are float32, too coarse for float64 inputs; use {name}"):
        call(x.double())
    with pytest.raises(UnsupportedError, match=f"{name}_triton: head_dim is 257, the kernels hold at most 256; use {name}"):
        call(torch.ones(1, 1, 3, 257))
    with pytest.raises(ShapeError, match="sees keys up to position"):
        call(x, q_offset=2)
    with pytest.raises(ShapeError, match="scale must be a positive number; got 0"):
        call(x, scale=0)


def test_too_many_slots():
    with pytest.raises(UnsupportedError, match="the number of slots is 129, the kernels hold at most 128; use slot_scan"):
        call_slots(torch.ones(1, 1, 3, 2), slots=129)


@pytest.mark.parametrize("shape", [(0, 1, 3, 2), (1, 1, 0, 2)])
@pytest.mark.parametrize("call", [call_linear, call_slots])
def test_nothing_to_do(call, shape):
    x = torch.ones(shape, requires_grad=True)
    out, *_, last = call(x)
    assert out.shape == shape
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert not grad.any()
    held = last if isinstance(last, torch.Tensor) else last.keys
    assert not held.any()


def test_keys_without_queries():
    x, none = torch.ones(1, 1, 3, 2), torch.ones(1, 1, 0, 2)
    _, last = linear_scan_triton(none, x, x, torch.zeros(1), scale=1.0)
    torch.testing.assert_close(last, torch.full((1, 1, 2, 2), 3.0))
    gate = torch.full((1, 1, 3, 1), -math.inf, requires_grad=True)
    _, lse, slots = slot_scan_triton(none, x, x, gate, delay=1, temperature=8.0, scale=1.0)
    torch.testing.assert_close(slots.keys, torch.ones(1, 1, 1, 2))
    assert lse.shape == (1, 1, 0) and bool(slots.written.all())


def test_queries_that_see_the_state_alone():
    x, none = torch.ones(1, 1, 3, 2), torch.ones(1, 1, 0, 2)
    state = SlotState(torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 5.0), torch.ones(1, 1, dtype=torch.bool))
    words = {"delay": 3, "temperature": 8.0, "scale": 1.0, "state": state}
    out, _, last = slot_scan_triton(x, none, none, torch.ones(1, 1, 0, 2), **words)
    torch.testing.assert_close(out, torch.full((1, 1, 3, 2), 5.0))
    torch.testing.assert_close(last.values, state.values)


def test_no_second_derivatives():
    x = torch.ones(1, 1, 3, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(call_linear(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.sum().backward()


def test_only_what_is_asked_for():
    """Inputs without gradients get none, and the others the same as with them."""
    q, k, v, gate = replace(Slots(), q_len=20, kv_len=20).make()[0][:4]
    words = {"delay": 1, "temperature": 8.0, "scale": 0.4}
    results = []
    for needing in ((q, k, v, gate), (k,)):
        for x in (q, k, v, gate):
            x.requires_grad_(any(x is y for y in needing))
        results.append(torch.autograd.grad(slot_scan_triton(q, k, v, gate, **words)[0].square().sum(), needing))
    assert torch.equal(results[0][1], results[1][0])


# ---- rows that lie far apart ---------------------------------------------------------------------------------------------------------


# As far apart as rows of a tile may lie, and further: those are copied.
@pytest.mark.parametrize(("distance", "length"), [((1 << 23) - 8, 260), (1 << 26, 36)], ids=["far", "further"])
@pytest.mark.parametrize("kind", [Linear, Slots])
def test_rows_whose_offsets_take_64_bits(apart, kind, distance, length):
    assert distance * (length - 1) > 1 << 31
    case = kind(q_len=length, kv_len=length, dtype=torch.float16, cut=ScanTiles(128, 64, 16, 4))
    given, *decay, words, cotangents = case.make()
    given = given[:4] if kind is Slots else given[:3]
    d_out = cotangents[0]

    def run(given, d_out):
        given = [t.detach().requires_grad_() for t in given]
        if kind is Linear:
            out, _ = linear_scan_triton(*given, *decay, tiles=case.cut, **words)
        else:
            out, *_ = slot_scan_triton(*given, delay=case.delay, temperature=case.temperature, tiles=case.cut, **words)
        return out, *torch.autograd.grad(out, given, d_out)

    near, far = run(given, d_out), run([apart(t, distance) for t in given], apart(d_out, distance))
    for one, other in zip(near, far, strict=True):
        assert torch.equal(one, other)
