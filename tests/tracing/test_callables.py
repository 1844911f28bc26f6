"""Every kind of callable FlexAttention users write, and the numbers and tensors they capture."""

from __future__ import annotations

import functools
import gc
import operator
import weakref

import pytest
import torch

from sparsedsl.errors import TableError, TraceError
from sparsedsl.tracing import trace_mask, trace_score

WINDOW = 3
DOCUMENTS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4])


def from_globals(b, h, q_idx, kv_idx):
    return (q_idx - kv_idx < WINDOW) & (DOCUMENTS[q_idx] == DOCUMENTS[kv_idx])


def with_default(b, h, q_idx, kv_idx, window=4, table=DOCUMENTS):
    return (q_idx - kv_idx < window) & (table[q_idx] == 0)


def with_more(table, window, b, h, q_idx, kv_idx, *, both_ways=False):
    near = (q_idx - kv_idx).abs() < window if both_ways else q_idx - kv_idx < window
    return near & (table[q_idx] == table[kv_idx])


class Holder:
    """A callable object, with methods of every kind."""

    window = 5

    def __init__(self):
        self.starts = torch.tensor([0, 3, 5, 9, 14])

    def __call__(self, b, h, q_idx, kv_idx):
        return q_idx - self.starts[DOCUMENTS[q_idx]] <= kv_idx

    def method(self, b, h, q_idx, kv_idx):
        return self._near(q_idx, kv_idx) & (self.starts[h] <= kv_idx)

    def _near(self, q_idx, kv_idx):
        return q_idx - kv_idx < self.window

    @classmethod
    def class_method(cls, b, h, q_idx, kv_idx):
        return q_idx - kv_idx < cls.window

    @staticmethod
    def static_method(b, h, q_idx, kv_idx):
        return q_idx <= kv_idx


class MaskModule(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("limits", torch.tensor([2, 4, 6]))

    def forward(self, b, h, q_idx, kv_idx):
        return (q_idx - kv_idx).abs() <= self.limits[h]


class BiasModule(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.5))
        self.relative = torch.nn.Embedding(8, 3)

    def forward(self, score, b, h, q_idx, kv_idx):
        return score * self.gain + self.relative((q_idx - kv_idx).clamp(0, 7))[h]


CALLABLES = {
    "function": from_globals,
    "defaults": with_default,
    "lambda": lambda b, h, q, kv: q >= kv,
    "starred": lambda *indices: operator.ge(*indices[2:]),
    "closure": (lambda window: lambda b, h, q, kv: q - kv < window)(4),
    "partial": functools.partial(with_more, DOCUMENTS, 4),
    "partial, keywords": functools.partial(with_more, DOCUMENTS, 4, both_ways=True),
    "callable object": Holder(),
    "bound method": Holder().method,
    "class method": Holder.class_method,
    "static method": Holder.static_method,
    "module": MaskModule(),
    "decorated": functools.wraps(from_globals)(lambda *args, **kwargs: from_globals(*args, **kwargs)),
    "callable of a callable": (lambda inner: lambda b, h, q, kv: ~inner(b, h, kv, q))(from_globals),
    "numbers": (lambda i, f, flag: lambda b, h, q, kv: (q - kv < i) & (kv < f) & flag | (not flag))(5, 7.5, True),
    "Python bool": lambda b, h, q, kv: True,
    "torch constant": lambda b, h, q, kv: torch.tensor(False),
    "branch on a number": lambda b, h, q, kv: (q >= kv) if WINDOW > 2 else (q <= kv),
    "loop over numbers": lambda b, h, q, kv: functools.reduce(operator.or_, [(q - kv) == d for d in (0, 1, 4)]),
    "loop over a table": lambda b, h, q, kv: functools.reduce(operator.or_, [q - kv == d for d in DOCUMENTS[::5].tolist()]),
}


@pytest.mark.parametrize("name", CALLABLES)
def test_masks(name, same_mask):
    same_mask(CALLABLES[name])


def test_score_module(same_score):
    score = same_score(BiasModule())
    assert {name: spec.learned for name, spec in score.tables.items()} == {"gain": True, "relative_weight": True}


def test_transformers_functions(same_mask):
    """The functions that transformers' models build their masks from."""
    masks = pytest.importorskip("transformers.masking_utils")
    padding = torch.arange(17)[None] >= torch.tensor([[0], [4]])
    packed = DOCUMENTS[None].expand(2, -1).contiguous()
    same_mask(masks.causal_mask_function)
    same_mask(masks.sliding_window_causal_mask_function(4))
    same_mask(masks.chunked_causal_mask_function(4, torch.tensor([0, 3])))
    same_mask(
        masks.and_masks(
            masks.causal_mask_function, masks.padding_mask_function(padding), masks.packed_sequence_mask_function(packed)
        )
    )
    same_mask(masks.add_offsets_to_mask_function(masks.causal_mask_function, 5, 2))


def test_names_come_from_the_code():
    def names(function):
        return list(trace_mask(function).tables)

    holder, tables = Holder(), [DOCUMENTS, DOCUMENTS + 1]
    nested = {"ids": {"doc": DOCUMENTS * 1}}
    assert names(from_globals) == ["DOCUMENTS"]
    assert names(holder) == ["DOCUMENTS", "starts"]
    assert names(holder.method) == ["starts"]
    assert names(MaskModule()) == ["limits"]
    assert names(functools.partial(with_more, DOCUMENTS, 4)) == ["table_table"]  # `table` declares tables in the text form
    assert names(lambda b, h, q, kv: tables[1][q] == 1) == ["tables_1"]
    assert names(lambda b, h, q, kv: nested["ids"]["doc"][q] == 1) == ["doc"]
    _private = q_idx = DOCUMENTS.clone()
    assert names(lambda b, h, q, kv: _private[q] == 1) == ["private"]
    assert names(lambda b, h, q, kv: q_idx[q] == 1) == ["q_idx_table"]


def test_two_tensors_of_one_name_in_one_callable():
    def at_least(limits):
        return lambda b, h, q, kv: kv >= limits[h]

    low, high = at_least(torch.tensor([1, 2])), at_least(torch.tensor([3, 4]))
    mask = trace_mask(lambda b, h, q, kv: low(b, h, q, kv) & ~high(b, h, q, kv))
    assert {name: table.tolist() for name, table in mask.bound.items()} == {"limits": [1, 2], "limits_2": [3, 4]}
    with pytest.raises(TableError, match="two different tensors"):
        trace_mask(low) & trace_mask(high)
    both = trace_mask(low) & trace_mask(high, rename={"limits": "high"})
    assert list(both.tables) == ["high", "limits"]
    with pytest.raises(TraceError, match="rename names other; the callable reads limits"):
        trace_mask(low, rename={"other": "high"})


def test_one_tensor_traced_twice_is_one_table():
    """The mask and the score of a pattern are traced one by one; what they share must be the same object again."""
    scalar, table = torch.tensor(3), torch.arange(17) % 4
    masks = [lambda b, h, q, kv: q - kv < scalar, lambda b, h, q, kv: table.to(torch.int32).view(-1)[q] < torch.arange(2, 40)[kv]]
    for mask in masks:
        first, second = trace_mask(mask), trace_mask(mask)
        assert first.key == second.key
        assert list((first & second).bound) == list(first.bound)


def test_a_captured_scalar_stays_an_argument():
    window = torch.tensor(3)

    def mask_mod(b, h, q_idx, kv_idx):
        return q_idx - kv_idx < window * 2 + 1

    mask = trace_mask(mask_mod)
    assert str(mask) == "q_idx - kv_idx <= 2*window[0]"
    window.fill_(9)
    assert mask.bound["window"].tolist() == [9]
    prefix = torch.tensor([4, 5, 6])
    assert str(trace_mask(lambda b, h, q, kv: kv < prefix[1])) == "kv_idx < prefix[1]"
    assert str(trace_mask(lambda b, h, q, kv: kv < prefix[-1] - 1)) == "kv_idx - prefix[2] <= -2"
    assert str(trace_mask(lambda b, h, q, kv: kv < int(prefix[1]))) == "kv_idx <= 4"


def test_captured_scalars_do_not_live_forever():
    def trace_one():
        window = torch.tensor(3)
        trace_mask(lambda b, h, q, kv: q - kv < window)
        return weakref.ref(window)

    gone = trace_one()
    gc.collect()
    assert gone() is None


def test_measured_facts():
    table = torch.tensor([0, 0, 2, 5])
    falling = torch.tensor([3, 1, 2])
    declared = {
        lambda b, h, q, kv: table[q] == table[kv]: "table('values', monotone=True)",
        lambda b, h, q, kv: falling[q] == 1: "table('values')",
        lambda b, h, q, kv: q % falling[h] == 0: "table('values', values_in=(1, 2147483647))",
        lambda b, h, q, kv: (table > 1)[table[q]]: "table('values', monotone=True, values_in=(0, 2147483647))",
        lambda b, h, q, kv: table.float()[q] < 1: "table('values', dtype=float)",
        lambda b, h, q, kv: torch.stack([table, table])[b, q] == 1: "table('values', monotone=True)",
        lambda b, h, q, kv: torch.stack([table, -table])[b, q] == 1: "table('values')",
    }
    for function, text in declared.items():
        mask = trace_mask(function)
        name = next(n for n, spec in mask.tables.items() if spec.dtype != "bool")
        renamed = trace_mask(function, rename={name: "values"})
        assert renamed.tables["values"].declaration() == text


def test_tables_of_unusual_types(same_mask):
    ids = torch.tensor([0, 0, 1, 1, 40_000] + [50_000] * 12)
    for dtype in (torch.uint16, torch.uint32, torch.int16):
        packed = ids.to(dtype) if dtype != torch.int16 else (ids // 2).to(dtype)
        assert same_mask(lambda b, h, q, kv, packed=packed: packed[q] == packed[kv]).tables["packed"].monotone
    weight = torch.linspace(-1, 1, 17).to(torch.float8_e4m3fn)
    same_mask(lambda b, h, q, kv: weight[q].float() * 2 <= weight[kv].float())


def test_learned_tables():
    bias = torch.nn.Parameter(torch.randn(2, 8))
    score = trace_score(lambda score, b, h, q, kv: score + bias.view(-1)[q % 16] + bias[0][kv % 8])
    assert [spec.learned for spec in score.tables.values()] == [True, True]
    view = next(table for name, table in score.bound.items() if name != "bias")
    view.sum().backward()
    view.sum().backward()  # bound once, used in many steps
    assert bias.grad.tolist() == [[2.0] * 8] * 2
    with pytest.raises(TraceError, match=r"learned table that is computed before it is read.*torch.exp\(bias\[h\]\)"):
        trace_score(lambda score, b, h, q, kv: score + bias.exp()[0, q])
    # no gradient flows through a mask: a parameter is an ordinary table there
    assert not trace_mask(lambda b, h, q, kv: bias[0, q] > 0).tables["bias"].learned


def test_python_may_branch_on_captured_scalars(same_mask):
    """Their values are known while tracing; what Python takes from them is a constant of the trace."""
    wide, limit, both_ways = torch.tensor(7), torch.tensor(2.5), torch.tensor(True)

    def mask_mod(b, h, q_idx, kv_idx):
        near = q_idx - kv_idx < wide
        if wide > 2 and (wide + 1) % 2 == 0 and not limit * 2 < 3:
            near = near & (kv_idx % int(wide - 4) == 0)
        if both_ways:
            near = near | (kv_idx - q_idx < limit.item()) & (kv_idx > max(wide, 3) - 6)
        return near & (kv_idx < len(range(wide)) + wide.tolist())

    assert str(same_mask(mask_mod).tables["wide"].declaration()) == "table('wide')"
