"""Products for the `tiled` lowering: every shape, type and layout gives what float64 gives, whichever of torch's kernels runs it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedsl.runtime import gemm
from sparsedsl.runtime.gemm import product, product_nt, product_tn
from sparsedsl.testing import tensor
from sparsedsl.tiling.cutting import CUTTING

sizes = st.integers(1, 40)


def near(got: torch.Tensor, wanted: torch.Tensor, terms: int) -> bool:
    """Within the rounding of a sum of ``terms`` products of numbers below five."""
    return got.shape == wanted.shape and float((got.double() - wanted).abs().max()) <= 25 * terms * torch.finfo(got.dtype).eps


@given(
    count=st.integers(1, 3), m=sizes, n=sizes, d=sizes, single=st.sampled_from((1, 1 << 30)), linear=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)  # fmt: skip
@settings(max_examples=100)
def test_products_are_those_of_float64(count, m, n, d, single, linear, dtype):
    with CUTTING.using(single=single), pytest.MonkeyPatch.context() as patch:
        if not linear:
            patch.setattr(gemm, "has_linear", lambda: False)
        x, y = tensor(count, m, d, seed=0, dtype=dtype), tensor(count, n, d, seed=1, dtype=dtype)
        s, v = tensor(count, m, n, seed=2, dtype=dtype), tensor(count, n, d, seed=3, dtype=dtype)
        assert near(product_nt(x, y), x.double() @ y.double().mT, d)
        assert near(product(s, v), s.double() @ v.double(), n)
        assert near(product_tn(s, x), s.double().mT @ x.double(), m)
        assert near(product_nt(x, y, tanh=True), torch.tanh(x.double() @ y.double().mT), d)


@pytest.mark.parametrize("single", [1, 1 << 30])
def test_rows_that_lie_apart(single, options):
    """Strips are views: of every other row, of a part of each row, of overlapping keys."""
    options(CUTTING, single=single)
    whole = tensor(1, 90, 32, seed=0)
    x, y = whole[:, ::2, 4:20], whole[:, 7:50, 8:24]
    assert near(product_nt(x, y), x.double() @ y.double().mT, 16)
    s = product_nt(x, y)
    assert near(product(s, y), s.double() @ y.double(), 25 * 43)
    assert near(product_tn(s, x), s.double().mT @ x.double(), 25 * 45)
    windows = whole[0].as_strided((5, 30, 32), (10 * 32, 32, 1))
    assert near(product_nt(windows, windows), windows.double() @ windows.double().mT, 32)
    assert near(product_tn(windows, windows), windows.double().mT @ windows.double(), 30)


@pytest.mark.parametrize("single", [1, 1 << 30])
def test_tanh_is_as_accurate_as_torchs(single, options):
    options(CUTTING, single=single)
    x = torch.cat([torch.linspace(-20, 20, 4001), torch.logspace(-20, 1, 500), torch.tensor([0.0, -0.0, 1e30, -1e30])])[
        None, :, None
    ]
    got, wanted = product_nt(x, torch.ones(1, 1, 1), tanh=True)[0, :, 0], torch.tanh(x.double())[0, :, 0]
    assert bool(((got - wanted).abs() <= 4 * torch.finfo(torch.float32).eps * wanted.abs() + 1e-37).all())


def test_a_product_of_its_own_asks_onednn(monkeypatch):
    """The quick kernel runs where it should, and only there: one float32 product of many results."""
    called = []
    real = gemm.linear
    monkeypatch.setattr(gemm, "linear", lambda *words: called.append(words) or real(*words))
    monkeypatch.setattr(gemm, "has_linear", lambda: False)
    large = tensor(1, 300, 16, seed=0)
    product_nt(large, large)
    assert not called
    monkeypatch.undo()
    if not gemm.has_linear():
        pytest.skip("this build of torch has no oneDNN product")
    monkeypatch.setattr(gemm, "linear", lambda *words: called.append(words) or real(*words))
    product_nt(large, large)
    assert len(called) == 1
    for x in (large.double(), large[:, :8], large.expand(2, -1, -1)):
        product_nt(x, x)
    assert len(called) == 1
