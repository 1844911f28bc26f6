"""One decision: what ``explain`` names is what runs, what it refuses is refused by the call, and every way out that is named works."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.backends import registry
from sparsedsl.backends.protocol import Backend, PatternRunner
from sparsedsl.execute import dispatch
from sparsedsl.execute.static import StaticAttention
from sparsedsl.program.effect_rules import LATER_QUERIES
from sparsedsl.testing.program_inputs import named_inputs
from sparsedsl.testing.strategies import tables_for

causal = sd.kv_idx <= sd.q_idx
BACKENDS = ("auto", *registry.BACKENDS)


class Watched:
    """A backend that writes down that it ran."""

    def __init__(self, inner: Backend, ran: set[str]):
        self.inner, self.ran, self.name = inner, ran, inner.name

    def __getattribute__(self, name: str) -> Any:
        if name in ("inner", "ran", "name", "__class__", "__dict__"):
            return object.__getattribute__(self, name)
        inner, found = self.inner, getattr(self.inner, name)
        if name in ("selected", "slots", "linear", "gated"):
            self.ran.add(inner.name)
        if name == "pattern":
            return lambda *args, **words: WatchedRunner(found(*args, **words), inner.name, self.ran)
        return found


class WatchedRunner:
    """A pattern on a backend that writes down that it ran."""

    def __init__(self, inner: PatternRunner, name: str, ran: set[str]):
        self.inner, self.name, self.ran = inner, name, ran

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def described(self, *args: Any) -> Any:
        return self.inner.described(*args)

    def attend(self, *args: Any, **words: Any) -> Any:
        self.ran.add(self.name)
        return self.inner.attend(*args, **words)


@contextlib.contextmanager
def watched() -> Any:
    """The names of the backends that run something."""
    ran: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "BACKENDS", {name: Watched(backend, ran) for name, backend in registry.BACKENDS.items()})
        patch.setattr(dispatch, "static_attention", lambda pattern, new_tables: StaticAttention(pattern, minimal=not new_tables))
        dispatch._TAKEN.clear()
        yield ran
    dispatch._TAKEN.clear()


def assert_one_decision(attn: sd.Attention, q: Any, k: Any, v: Any, case: Any, words: dict[str, Any], named: Any) -> str | None:
    """``explain`` names backends if and only if the call runs on them; the refusal, if it is refused."""
    sizes = {axis: size for node in attn.program.inputs.values() for axis, size in zip(node.axes, named[node.name].shape, strict=True)
             if axis.isidentifier() and axis not in ("batch", "heads", "kv_heads", "queries", "keys", "head_dim", "value_dim")}  # fmt: skip
    tables = {name: named[name] for name in attn.program.tables if name in named}
    explained = attn.explain(
        case.q_len, case.kv_len, batch=case.batch, heads=case.heads, kv_heads=case.kv_heads, head_dim=case.head_dim,
        head_dim_v=case.head_dim_v or case.head_dim, dtype=q.dtype, q_offset=case.q_offset, sizes=sizes or None, **words, **tables,
    )  # fmt: skip
    refusal = None
    with watched() as ran:
        again = sd.compile(attn.program, backend=attn.backend, allow=sorted(attn.allow))
        try:
            leaves = [t.detach().requires_grad_(words["grad"]) for t in (q, k, v)]
            again(*leaves, q_offset=case.q_offset, return_lse=words["return_lse"], **named)
        except sd.UnsupportedError as error:
            refusal = str(error)
    if explained.plan is None:
        assert refusal is not None, f"explain refuses: {explained.refusal}\nand the call runs on {ran}"
        assert refusal == explained.refusal
        return refusal
    assert refusal is None, f"explain names {explained.plan.backend}\nand the call is refused: {refusal}"
    if attn.backend == "reference" and attn.program.static is None:
        assert explained.plan.backend == "reference" and not ran  # by its own rules, which ask no backend
    elif {case.batch, case.q_len, case.kv_len} & {0}:
        assert not ran
    else:
        assert ran == set(explained.plan.backend.split(", ")), (ran, explained.plan)
    return None


@given(data=st.data())
@settings(max_examples=60)
def test_what_explain_names_is_what_runs(data: st.DataObject) -> None:
    case = data.draw(kit.shapes(max_len=40, max_heads=4).filter(lambda c: c.q_offset + c.q_len <= c.kv_len))
    words = {"grad": data.draw(st.booleans()), "return_lse": data.draw(st.booleans())}
    backend = data.draw(st.sampled_from([name for name in BACKENDS if name != "flex"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    if data.draw(st.booleans()):
        program = data.draw(kit.programs(heads=case.heads))
        named = data.draw(kit.program_inputs(program, case, dtype=dtype))
    else:
        pattern = data.draw(kit.patterns(depth=2))
        program, named = sd.Program(pattern), data.draw(tables_for(pattern, case))
    allow = [LATER_QUERIES] if data.draw(st.booleans()) else []
    q, k, v = data.draw(kit.inputs(case, dtype=dtype))
    assert_one_decision(sd.compile(program, backend=backend, allow=allow), q, k, v, case, words, named)


# ---- ways out --------------------------------------------------------------------------------------------------------------------

CASE = kit.AttentionCase(batch=1, heads=2, kv_heads=1, q_len=20, kv_len=20)
PROGRAMS = {
    "window": causal & (sd.q_idx - sd.kv_idx < 5),
    "choice": causal & ((sd.q_idx - sd.kv_idx < 5) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4)), 2)),
    "linear": sd.linear([0.5, 0.9]),
    "delta": sd.linear(0.9, beta=sd.input("beta", "batch kv_heads keys"), features="l2"),
}


@pytest.mark.parametrize("words", [{"grad": True, "return_lse": False}, {"grad": False, "return_lse": True}], ids=["grad", "lse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["flex", "triton"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_way_out_that_is_named_works(name: str, backend: str, dtype: torch.dtype, words: dict[str, bool]) -> None:
    if name in ("linear", "delta") and words["return_lse"]:
        return  # no softmax, no LSE: refused for every backend
    q, k, v = (kit.tensor(*shape, seed=i, dtype=dtype) for i, shape in enumerate((CASE.q_shape, CASE.k_shape, CASE.v_shape)))
    given = named_inputs(sd.Program(PROGRAMS[name]), CASE, seed=5, dtype=dtype)
    refusal = assert_one_decision(sd.compile(PROGRAMS[name], backend=backend), q, k, v, CASE, words, given)
    assert refusal is not None, "on CPU neither has gradients or the LSE"
    others = re.findall(r"backend='(\w+)'", refusal)
    assert "tiled" in others
    for other in others:
        assert assert_one_decision(sd.compile(PROGRAMS[name], backend=other), q, k, v, CASE, words, given) is None
    for text, change in (
        ("cast to float32", lambda t, w: ([x.float() for x in t], w)),
        ("torch.no_grad()", lambda t, w: (t, {**w, "grad": False})),
        ("return_lse=False", lambda t, w: (t, {**w, "return_lse": False})),
    ):
        tensors, changed = change([q, k, v], words)
        runs = registry.named(backend).name == backend and _runs(name, backend, tensors, changed)
        assert (text in refusal) == (runs and changed | {"dtype": tensors[0].dtype} != words | {"dtype": dtype}), (text, refusal)


def _runs(name: str, backend: str, tensors: list[torch.Tensor], words: dict[str, bool]) -> bool:
    explained = sd.compile(PROGRAMS[name], backend=backend).explain(
        20, 20, heads=2, kv_heads=1, head_dim=CASE.head_dim, dtype=tensors[0].dtype, **words
    )
    return explained.plan is not None
