"""Kernels of linear attention whose decays come with the data, interpreted, against the recurrence in float64.

How far off a result may be: four times what the recurrence itself is off in float32, and sixteen roundings of the largest result (a chunk
has sixteen rows). A log decay's gradient is what later rows read minus what they wrote: of it, of the largest of those, before they cancel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sparsedsl.backends.triton.limits import LIMITS
from sparsedsl.backends.triton.scan_gated import gated_scan_triton
from sparsedsl.backends.triton.scan_pass import ScanTiles
from sparsedsl.errors import UnsupportedError
from tests.programs.gated_loop import loop
from tests.programs.linear_recipe import checksum, l2, recipe

Tensor = torch.Tensor
TILES = ScanTiles(16, 16, 16, 4)


@pytest.fixture(autouse=True, scope="module")
def unwritten_memory_is_nan() -> Any:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Gated:
    """``heads``: of q, k, v, log decays and beta. ``forgets``: a row whose log decay is -inf."""

    vector: bool = False
    delta: bool = False
    erases: bool = False
    heads: tuple[int, ...] = (1, 1, 1, 1, 1)
    batch: int = 1
    rows: int = 21
    keys: int = 21
    width: int = 5
    width_v: int = 7
    strength: float = 0.5
    forgets: int | None = None
    state: bool = False
    documents: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32

    def make(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        generator = torch.Generator().manual_seed(7)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        (hq, hk, hv, hg, hb), channels = self.heads, [self.width] * self.vector
        x = {
            "q": random(self.batch, hq, self.rows, self.width).to(self.dtype),
            "k": l2(random(self.batch, hk, self.keys, self.width)).to(self.dtype),
            "v": random(self.batch, hv, self.keys, self.width_v).to(self.dtype),
            "g": -self.strength * random(1, hg, self.keys, *channels).abs(),
        }  # fmt: skip
        if self.forgets is not None:
            x["g"][:, :, self.forgets] = -math.inf
        if self.delta:
            x["beta"] = 2 * torch.sigmoid(random(self.batch, hb, self.keys))
        if self.erases:
            x["erase"] = l2(random(self.batch if self.batch % 2 else 1, hb, self.keys, self.width)).to(self.dtype)
        if self.state:
            x["state"] = random(self.batch, max(self.heads[1:]), self.width, self.width_v)
        ids = torch.tensor([[sum(begin <= j for begin in self.documents) for j in range(self.keys)]])
        return x, {
            "scale": 0.3,
            "q_offset": self.keys - self.rows,
            **({"documents": ids.expand(self.batch, -1)} if self.documents else {}),
        }


def results(run: Any, inputs: dict[str, Tensor], words: dict[str, Any]) -> dict[str, Tensor]:
    """Results, and gradients of a sum of both by their names."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out, last = run(**leaves, **words)
    # Cotangents that float16 and bfloat16 hold, so that all precisions have the same.
    total = sum((t * (torch.arange(t.numel()) * 5 % 17 / 8 - 1).to(t).view_as(t)).sum() for t in (out, last))
    grads = torch.autograd.grad(total, list(leaves.values()))
    return {"out": out.detach(), "last": last.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


def kernels(g: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    return gated_scan_triton(log_decay=g, tiles=TILES, **given)


CASES = {
    "scalar, two heads a state, offset": Gated(heads=(2, 1, 1, 1, 1), rows=9, state=True),
    "scalar, delta, more values, batch, documents": Gated(
        delta=True, heads=(1, 1, 2, 1, 2), batch=2, rows=18, keys=18, documents=(5, 16)
    ),
    "vector, strong, forgets": Gated(vector=True, strength=20.0, forgets=6, state=True, width=3),
    "vector, delta, documents, half": Gated(vector=True, delta=True, documents=(9, 10, 18), state=True, dtype=torch.float16),
    "scalar, delta, strong, forgets, bfloat16": Gated(delta=True, strength=20.0, forgets=17, dtype=torch.bfloat16),
    "vector, delta, wide": Gated(vector=True, delta=True, width=17, width_v=18, rows=17, keys=17),
    "scalar, erases, batch": Gated(delta=True, erases=True, heads=(2, 1, 2, 1, 2), batch=2, rows=18, keys=18, state=True),
    "vector, erases, documents, strong": Gated(
        vector=True, delta=True, erases=True, documents=(7,), strength=20.0, forgets=3, width=18
    ),
    "vector, erases, bfloat16": Gated(vector=True, delta=True, erases=True, dtype=torch.bfloat16),
    "one row": Gated(vector=True, delta=True, rows=1, keys=1, state=True, width=1, width_v=1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_results_and_gradients_are_those_of_the_recurrence(case: Gated) -> None:
    inputs, words = case.make()
    exact, plain = (
        results(loop, {name: x.to(kind) for name, x in inputs.items()}, words) for kind in (torch.float64, torch.float32)
    )
    got = results(kernels, inputs, words)
    sizes = {name: float(x.abs().max()) for name, x in exact.items()}
    sizes["dg"] += sum(float((inputs[n].double() * exact[f"d{n}"]).abs().sum(3).max()) for n in ("q", "k"))
    for name, wanted in exact.items():
        of_operands = name == "out" or name in ("dq", "dk", "dv", "derase")
        rounding = torch.finfo(case.dtype if of_operands else torch.float32).eps + 16 * torch.finfo(torch.float32).eps
        allowed = 4 * float((plain[name] - wanted).abs().max()) + rounding * sizes[name]
        assert got[name].shape == wanted.shape, name
        error = float((got[name].double() - wanted).abs().max())
        assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"
    if case.forgets is not None:
        assert not got["dg"][:, :, case.forgets].any()
    if not case.vector or case.delta:  # token by token
        with torch.no_grad(), LIMITS.using(scan_steps=100):
            for one, other in zip(kernels(**inputs, **words), (exact["out"], exact["last"]), strict=True):
                rounding = torch.finfo(one.dtype).eps
                torch.testing.assert_close(one.double(), other, rtol=0, atol=4 * rounding * float(other.abs().max()) + 1e-6)


GOLDEN = {
    "T10": ("gs", (1.7843836693, -0.1771317381, 2.5476798792, -0.0699749431, -0.3139919815, 1.2254392435, 0.2741975088, 0.0705132466)),
    "T11": ("gv", (1.9269099725, -0.1059623083, 2.2668308795, 0.0620464008, -0.4558899470, 1.2120712038, 0.9108318411, -0.1581461386)),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_T10_T11_golden_values(name: str) -> None:
    r, (gate, wanted) = recipe(), GOLDEN[name]
    leaves = [x.float().requires_grad_() for x in (l2(r.q), l2(r.k), r.v, getattr(r, gate), r.beta, r.state)]
    out, last = gated_scan_triton(*leaves[:5], scale=0.5, state=leaves[5], tiles=TILES)
    grads = torch.autograd.grad((r.w.float() * out).sum() + (r.state.cos().float() * last).sum(), leaves)
    assert [checksum(x) for x in (out, last, *grads)] == pytest.approx(wanted, abs=2e-5)


def test_equal_keys_and_a_beta_of_2_grow_nothing() -> None:
    """T13, and what powers of a triangular matrix in place of substitution give 1e19 for."""
    rows = 64
    key = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 1, rows, 4)
    given = {"v": torch.zeros(1, 1, rows, 1), "log_decay": torch.zeros(1, 1, rows), "beta": torch.full((1, 1, rows), 2.0)}
    state = torch.ones(1, 1, 4, 1, requires_grad=True)
    out, _ = gated_scan_triton(key, key, **given, scale=1.0, state=state, tiles=ScanTiles(64, 16, 16, 4))
    assert out.flatten().tolist() == [-1.0, 1.0] * (rows // 2)


@pytest.mark.parametrize("vector", [False, True])
def test_T28_nothing_later_reaches_a_query(vector: bool) -> None:
    inputs, words = Gated(vector=vector, delta=True, state=True, keys=12, rows=12).make()
    with LIMITS.using(scan_steps=0):
        whole, _ = kernels(**inputs, **words)
        for name in ("k", "v", "g", "beta"):
            inputs[name] = inputs[name].clone()
            inputs[name][:, :, 7:] *= 3.0
        changed, _ = kernels(**inputs, **words)
    assert torch.equal(whole[:, :, :7], changed[:, :, :7])
    assert not torch.equal(whole[:, :, 7:], changed[:, :, 7:])


@pytest.mark.parametrize("vector", [False, True])
def test_not_even_roundings_of_a_later_document_reach_a_gradient(vector: bool) -> None:
    inputs, words = Gated(vector=vector, delta=True, keys=12, rows=12, documents=(7,)).make()
    before = results(kernels, inputs, words)
    inputs["v"][:, :, 7:] *= 1e4
    after = results(kernels, inputs, words)
    assert all(torch.equal(before[name][:, :, :7], after[name][:, :, :7]) for name in ("dq", "dk", "dv", "dg", "dbeta"))
    assert not torch.equal(before["dg"][:, :, 7:], after["dg"][:, :, 7:])


def test_what_they_refuse() -> None:
    inputs, words = Gated().make()
    with pytest.raises(UnsupportedError, match="too coarse for float64 inputs"):
        kernels(**{name: x.double() for name, x in inputs.items()}, **words)
    wide, words = Gated(width=257, keys=2, rows=2).make()
    with pytest.raises(UnsupportedError, match="head_dim is 257, the kernels hold at most 256; use gated_scan"):
        kernels(**wide, **words)
