"""Systems by their names in the library beside the formulas of their papers, written down naively: outputs and gradients in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import sparsedsl as sd

Tensor = torch.Tensor
P = sd.patterns
N, D, DV = 23, 6, 5


def unit(x: Tensor) -> Tensor:
    """Rows of length 1."""
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def each_head(heads: int, one: Callable[[int], Tensor]) -> Tensor:
    """``(1, heads, N, ..)`` from a formula of one head."""
    return torch.stack([one(h) for h in range(heads)])[None]


def gated_delta(t: dict[str, Tensor]) -> Tensor:
    """``S_t = S_(t-1) (alpha_t (I - beta_t k_t k_t^T)) + beta_t v_t k_t^T``, ``o_t = S_t q_t`` (2412.06464, equation 10); two value heads
    share a head of q and k."""

    def head(h: int) -> Tensor:
        q, k, v = unit(t["q"][0, h // 2]) * D**-0.5, unit(t["k"][0, h // 2]), t["v"][0, h]
        alpha, beta = t["g"][0, h].exp(), t["beta"][0, h]
        state, rows = torch.zeros(DV, D, dtype=torch.float64), []
        for n in range(N):
            erase = torch.eye(D, dtype=torch.float64) - beta[n] * torch.outer(k[n], k[n])
            state = state @ (alpha[n] * erase) + beta[n] * torch.outer(v[n], k[n])
            rows.append(state @ q[n])
        return torch.stack(rows)

    return each_head(4, head)


def kda(t: dict[str, Tensor]) -> Tensor:
    """``S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_(t-1) + beta_t k_t v_t^T``, ``o_t = S_t^T q_t`` (2510.26692, equation 1)."""

    def head(h: int) -> Tensor:
        q, k, v = unit(t["q"][0, h]) * D**-0.5, unit(t["k"][0, h]), t["v"][0, h]
        alpha, beta = t["g"][0, h].exp(), t["beta"][0, h]
        state, rows = torch.zeros(D, DV, dtype=torch.float64), []
        for n in range(N):
            erase = torch.eye(D, dtype=torch.float64) - beta[n] * torch.outer(k[n], k[n])
            state = erase @ torch.diag(alpha[n]) @ state + beta[n] * torch.outer(k[n], v[n])
            rows.append(state.T @ q[n])
        return torch.stack(rows)

    return each_head(2, head)


def gla(t: dict[str, Tensor]) -> Tensor:
    """The parallel form, ``P_ij = sum_d q_id k_jd b_id / b_jd``, ``b_i = prod_(n <= i) alpha_n``, ``O = (P * M) V`` (2312.06635, eq. 4)."""

    def head(h: int) -> Tensor:
        b = t["g"][0, h].exp().cumprod(0)
        return (((t["q"][0, h] * D**-0.5 * b) @ (t["k"][0, h] / b).T).tril()) @ t["v"][0, h]

    return each_head(2, head)


def rwkv6(t: dict[str, Tensor]) -> Tensor:
    """``wkv_t = diag(u) k_t^T v_t + sum_(i < t) diag(prod_(i < j < t) w_j) k_i^T v_i``, ``o_t = r_t wkv_t`` (2404.05892, equation 18)."""

    def head(h: int) -> Tensor:
        r, k, v, w = t["q"][0, h], t["k"][0, h], t["v"][0, h], t["g"][0, h].exp()
        rows = []
        for n in range(N):
            wkv = torch.outer(t["bonus"][h] * k[n], v[n])
            for i in range(n):
                wkv = wkv + torch.outer(w[i + 1 : n].prod(0) * k[i], v[i])
            rows.append(r[n] @ wkv)
        return torch.stack(rows)

    return each_head(2, head)


def rwkv7(t: dict[str, Tensor]) -> Tensor:
    """``wkv_t = wkv_(t-1) (diag(w_t) - n_t^T (a_t n_t)) + v_t^T k_t``, ``o_t = r_t wkv_t^T`` (2503.14456, equation 17)."""

    def head(h: int) -> Tensor:
        w = t["g"][0, h].exp()
        removal, state, rows = t["erase"][0, h] * w, torch.zeros(DV, D, dtype=torch.float64), []
        for n in range(N):
            state = state @ (torch.diag(w[n]) - torch.outer(removal[n], t["along"][0, h, n]))
            state = state + torch.outer(t["v"][0, h, n], t["k"][0, h, n])
            rows.append(state @ t["q"][0, h, n])
        return torch.stack(rows)

    return each_head(2, head)


def mamba_2(t: dict[str, Tensor]) -> Tensor:
    """``h_t = exp(A dt_t) h_(t-1) + dt_t B_t x_t``, ``y_t = C_t^T h_t`` as a semiseparable matrix: ``L * (C B^T)``,
    ``L_ij = prod_(j < n <= i) a_n`` (2405.21060, equation 3); heads share B and C."""

    def head(h: int) -> Tensor:
        a = t["g"][0, h].exp()
        decays = torch.tensor([[0.0] * N] * N, dtype=torch.float64)
        rows = [torch.stack([a[j + 1 : i + 1].prod() if j <= i else decays[i, j] for j in range(N)]) for i in range(N)]
        return (torch.stack(rows) * (t["q"][0, 0] @ t["k"][0, 0].T)) @ t["v"][0, h]

    return each_head(3, head)


def dsa(t: dict[str, Tensor]) -> Tensor:
    """``I_ts = sum_j w_tj relu(q^I_tj k^I_s)``; attention to the keys of the greatest four, one set for all heads (2512.02556)."""
    index = torch.einsum("jt,jts->ts", t["index_weights"][0], (t["index_q"][0] @ t["index_k"][0].mT).relu())
    rows = []
    for n in range(N):
        picked = index[n, : n + 1].sort(descending=True, stable=True).indices[:4]  # zeros of the relu tie: the earlier
        rows.append(
            torch.stack([(t["k"][0, 0, picked] @ t["q"][0, h, n] * D**-0.5).softmax(0) @ t["v"][0, 0, picked] for h in range(2)])
        )
    return torch.stack(rows, 1)[None]


# Windows of 4 keys, one every 2; blocks of 4, of which 3 are picked; a window of 5.
LENGTH, STRIDE, SELECT, PICKED, NEAR = 4, 2, 4, 3, 5


def nsa(t: dict[str, Tensor]) -> Tensor:
    """``o = sum_c g_c Attn(q, K_c, V_c)`` over compressed, selected and near keys; the importance of a block is
    ``sum_m sum_n p_cmp[l'/d j + m + n]`` over the strips of a window and of the block, summed over a group (2502.11089, 5 to 10)."""
    group, out = 2, []
    for h in range(4):
        q, k, v = t["q"][0, h] * D**-0.5, t["k"][0, h // group], t["v"][0, h // group]
        rows = []
        for n in range(N):
            over = max(0, (n + 1 - LENGTH) // STRIDE + 1)
            mass = [
                (t["compressed_k"][0, h // group, :over] @ t["q"][0, m, n] * D**-0.5).softmax(0)
                for m in range(h // group * group, (h // group + 1) * group)
            ]
            branches = [
                mass[h % group] @ t["compressed_v"][0, h // group, :over] if over else torch.zeros(DV, dtype=torch.float64)
            ]
            paid = sum(mass).tolist() if over else []
            worth = {
                u: sum(
                    paid[c]
                    for strip in range(u * SELECT // STRIDE, (u + 1) * SELECT // STRIDE)
                    for c in range(strip - LENGTH // STRIDE + 1, strip + 1)
                    if 0 <= c < over
                )
                for u in range(n // SELECT + 1)
            }
            always = {0, n // SELECT, max(0, n // SELECT - 1)}
            others = sorted((u for u in worth if u not in always), key=lambda u: (-worth[u], u))
            picked = [*always, *others][:PICKED] if len(always) < PICKED else sorted(always)
            for keys in ([j for j in range(n + 1) if j // SELECT in picked], list(range(max(0, n + 1 - NEAR), n + 1))):
                branches.append((k[keys] @ q[n]).softmax(0) @ v[keys])
            rows.append(sum(gate * part for gate, part in zip(t["gate"][0, h, n], branches, strict=True)))
        out.append(torch.stack(rows))
    return torch.stack(out)[None]


# Name -> the program, what it is by its paper, and the shapes of a call; decays and shares are made of what is drawn for them.
SYSTEMS: dict[str, tuple[Any, Callable[[dict[str, Tensor]], Tensor], dict[str, tuple[int, ...]]]] = {
    "gated_delta": (P.gated_delta(), gated_delta, {"q": (2, N, D), "k": (2, N, D), "v": (4, N, DV), "g": (4, N), "beta": (4, N)}),
    "kda": (P.kda(), kda, {"q": (2, N, D), "k": (2, N, D), "v": (2, N, DV), "g": (2, N, D), "beta": (2, N)}),
    "gla": (P.gla(), gla, {"q": (2, N, D), "k": (2, N, D), "v": (2, N, DV), "g": (2, N, D)}),
    "rwkv6": (P.rwkv6(), rwkv6, {"q": (2, N, D), "k": (2, N, D), "v": (2, N, DV), "g": (2, N, D), "bonus": (2, D)}),
    "rwkv7": (P.rwkv7(), rwkv7, {
        "q": (2, N, D), "k": (2, N, D), "v": (2, N, DV), "g": (2, N, D), "erase": (2, N, D), "along": (2, N, D),
    }),
    "mamba_2": (P.ssd(), mamba_2, {"q": (1, N, D), "k": (1, N, D), "v": (3, N, DV), "g": (3, N)}),
    "dsa": (P.dsa(4), dsa, {
        "q": (2, N, D), "k": (1, N, D), "v": (1, N, DV), "index_q": (3, N, 4), "index_k": (1, N, 4), "index_weights": (3, N),
    }),
    "nsa": (P.nsa_published(LENGTH, STRIDE, SELECT, PICKED, NEAR), nsa, {
        "q": (4, N, D), "k": (2, N, D), "v": (2, N, DV), "gate": (4, N, 3),
        "compressed_k": (2, (N - LENGTH) // STRIDE + 1, D), "compressed_v": (2, (N - LENGTH) // STRIDE + 1, DV),
    }),
}  # fmt: skip


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_the_paper_says(system: str, backend: str, draw: Any, grads: Any, assert_close: Any) -> None:
    program, formula, shapes = SYSTEMS[system]
    tensors = {name: draw(1, *shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}
    made = {"g": lambda x: -0.3 * x.abs(), "erase": lambda x: 0.2 * x, "along": lambda x: 0.2 * x, "bonus": lambda x: x[0]}
    for name, make in (made | dict.fromkeys(("beta", "gate"), torch.sigmoid)).items():
        tensors |= {name: make(tensors[name])} if name in tensors else {}
    attn = sd.compile(program, backend=backend)
    assert_close(attn(**tensors), formula(tensors), 1e-10)

    def by_formula(return_lse: bool = False, **given: Tensor) -> Tensor:
        return formula(given)

    got, wanted = grads(attn, tensors), grads(by_formula, tensors)
    for name, slope in wanted.items():
        assert_close(got[name], slope, 1e-10)
    assert wanted["v"].any() and wanted["q"].any()
