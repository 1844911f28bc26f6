"""Linear attention with decays and write rules from inputs: golden values, made once in float64 by code that shares nothing with ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl.execute.state import ProgramState
from tests.programs.linear_recipe import checksum, l2, recipe

Tensor = torch.Tensor
R = recipe()
QN, KN = l2(R.q), l2(R.k)
G, VECTOR, BETA = (sd.input(n, f"batch value_heads keys{more}") for n, more in (("g", ""), ("g", " head_dim"), ("beta", "")))
SCALAR = sd.linear(log_decay=G)
GLA = sd.linear(log_decay=VECTOR)
GDN = sd.linear(log_decay=G, beta=BETA)
KDA = sd.linear(log_decay=VECTOR, beta=BETA)
IDS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 3, 3, 3], [5] * 7 + [6] * 6])


def started(attn: Any, state: Tensor | None, given: dict[str, Tensor]) -> ProgramState | None:
    """A state of no tokens that holds ``state``."""
    if state is None:
        return None
    (label,) = (name for node, name in attn.program.labels.items() if node.function == "linear")
    recent = {name: x[:, :, :0] for name, x in given.items() if name not in "qu"}
    return ProgramState(attn.program.key, 0, recent, {label: state})


def measured(
    program: Any, backend: str, given: dict[str, Tensor], *, state: Tensor | None = None, w: Tensor = R.w, dtype: Any = None
) -> dict[str, float]:
    """Checksums of the output, of the state after, and of the gradients of ``sum(w out) + sum(cos(state) after)``."""
    given = {name: x.to(dtype) if dtype and x.is_floating_point() else x for name, x in given.items()}
    attn = sd.compile(program, backend=backend)
    leaves = {name: x.clone().requires_grad_() for name, x in given.items() if x.is_floating_point()}
    if state is not None:
        leaves["S0"] = state.to(dtype or state.dtype).clone().requires_grad_()
    tensors = {**given, **{name: x for name, x in leaves.items() if name != "S0"}}
    out, after = attn(**tensors, state=started(attn, leaves.get("S0"), given), return_state=True)
    (last,) = after.recurrent.values()
    loss = (w.to(out) * out).sum() + (0.0 if state is None else (torch.cos(state).to(last) * last).sum())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = {f"d{name}": checksum(x) for name, x in zip(leaves, grads, strict=True)}
    return {"o": checksum(out), "p": float(out.detach()[-1, -1, 7, 1]), "S": checksum(last), **found}


def assert_golden(got: dict[str, float], wanted: dict[str, float], tolerance: float = 6e-11) -> None:
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value, abs=tolerance, rel=tolerance), name


QKV = {"q": R.q, "k": R.k, "v": R.v}
NORMAL = {"q": QN, "k": KN, "v": R.v}
# Of T20: published rates of decay; what is erased is read before it decays.
KEYS, DECAY = "batch heads keys head_dim", -math.exp(-0.5) * torch.sigmoid(3 * R.gv + 2)
# Name -> program, inputs, state, weights of the loss, and the numbers.
Case = tuple[Callable[[], Any], dict[str, Tensor], Tensor | None, dict[str, float]]
CASES: dict[str, Case] = {
    "T01 scalar": (lambda: SCALAR, {**QKV, "g": R.gs}, R.state, {
        "o": 6.8518628894, "p": 1.4269263513, "S": -0.5175607130, "dq": 6.2813445849, "dk": 1.3731279989, "dv": -3.4024783935,
        "dg": 7.4267280909, "dS0": -0.7221825111,
    }),
    "T02 vector": (lambda: GLA, {**QKV, "g": R.gv}, R.state, {
        "o": 7.9554433324, "p": 1.7362022300, "S": -0.3157335830, "dq": 5.8834262353, "dk": 0.9110133109, "dv": -3.2603024034,
        "dg": 6.7568020023, "dS0": -1.6745322327,
    }),
    "T03 constants": (lambda: sd.linear(log_decay=[-0.25, -0.0625]), QKV, None, {
        "o": 8.8607614524, "p": 1.7647614003, "S": 4.0575619887,
    }),
    "T05 elu1": (lambda: sd.linear(1.0, features="elu1", normalised="sum", eps=1e-6), QKV, None, {
        "o": 13.6670560958, "p": -0.0181544534, "S": 20.1151324743, "dv": -1.7815065659,
    }),
    "T06 relu": (lambda: sd.linear(1.0, features="relu", normalised="sum", eps=1e-6), QKV, None, {
        "o": 9.0992416793, "p": -0.1269134471, "S": 7.2911494157,
    }),
    "T07 taylor": (lambda: sd.linear(1.0, features="taylor", normalised="sum", eps=1e-6), QKV, None, {
        "o": 13.3495160391, "p": 0.1721630652,
    }),
    "T08 mLSTM": (
        lambda: sd.linear(log_decay=G, normalised="max1", eps=0.0, write=sd.input("i", "batch heads keys")),
        {**QKV, "g": torch.nn.functional.logsigmoid(R.gs + 1), "i": 3 * R.gs + 2}, None, {"o": 5.0521631954, "p": 0.7669847691},
    ),
    "T09 DeltaNet": (lambda: sd.linear(1.0, beta=BETA), {**NORMAL, "beta": R.beta}, R.state, {
        "o": 1.1965838723, "p": 0.3223973026, "S": 4.7792642793, "dq": 0.1750650452, "dk": -0.7486965989, "dv": -3.9491153229,
        "dbeta": 6.0985843728, "dS0": 1.5850043864,
    }),
    "T10 GDN": (lambda: GDN, {**NORMAL, "g": R.gs, "beta": R.beta}, R.state, {
        "o": 1.7843836693, "p": 0.2819943717, "S": -0.1771317381, "dq": 2.5476798792, "dk": -0.0699749431, "dv": -0.3139919815,
        "dg": 1.2254392435, "dbeta": 0.2741975088, "dS0": 0.0705132466,
    }),
    "T11 KDA": (lambda: KDA, {**NORMAL, "g": R.gv, "beta": R.beta}, R.state, {
        "o": 1.9269099725, "p": 0.3073878931, "S": -0.1059623083, "dq": 2.2668308795, "dk": 0.0620464008, "dv": -0.4558899470,
        "dg": 1.2120712038, "dbeta": 0.9108318411, "dS0": -0.1581461386,
    }),
    "T12 two betas": (lambda: KDA, {**NORMAL, "g": R.gv, "beta": 2 * R.beta}, R.state, {
        "o": 2.6749274966, "p": 0.5355880296, "S": -0.1536669911,
    }),
    "T17 documents": (
        lambda: sd.linear(log_decay=VECTOR, beta=BETA, documents=sd.input("ids", "batch keys")),
        {**NORMAL, "g": R.gv, "beta": R.beta, "ids": IDS}, None, {},
    ),
    "T19 RWKV-6": (
        lambda: sd.linear(log_decay=VECTOR, reads="before", bonus=sd.input("u", "heads head_dim"), scale=1.0),
        {**QKV, "g": R.gv, "u": torch.cos(torch.arange(4.0, dtype=torch.float64) + 0.3 * torch.arange(2).double()[:, None])}, R.state,
        {"o": 13.4658573085, "p": 1.6032488433, "S": -0.3157335830},
    ),
    "T20 RWKV-7": (
        lambda: sd.linear(log_decay=VECTOR, erase=sd.input("erase", KEYS), along=sd.input("along", KEYS), scale=1.0),
        {**QKV, "g": DECAY, "erase": KN / DECAY.exp(), "along": KN * R.q.sigmoid()}, R.state,
        {"o": 14.8394388946, "p": 2.4431362067, "S": -0.0275128335},
    ),
    "T22 l2": (lambda: sd.linear(log_decay=G, beta=BETA, features="l2"), {**QKV, "g": R.gs, "beta": R.beta}, None, {
        "o": 1.3283992902, "p": 0.2816089558, "dq": 0.7061818182, "dk": 0.0569115606,
    }),
}  # fmt: skip


@pytest.mark.parametrize("case", [name for name in CASES if name != "T17 documents"])
def test_golden_values(case: str, backend: str) -> None:
    program, given, state, wanted = CASES[case]
    assert_golden(measured(program(), backend, given, state=state), wanted)


@pytest.mark.parametrize("case", [name for name in CASES if name != "T17 documents"])
def test_golden_values_in_float32(case: str, backend: str) -> None:
    program, given, state, wanted = CASES[case]
    assert_golden(measured(program(), backend, given, state=state, dtype=torch.float32), wanted, 2e-5)


def test_T05_T06_gradients_of_features(backend: str) -> None:
    """Of the features as they are, which the program takes as its q and k."""
    q, k = (torch.nn.functional.elu(x) + 1 for x in (R.q, R.k))
    got = measured(sd.linear(1.0, normalised="sum", eps=1e-6), backend, {"q": q, "k": k, "v": R.v})
    assert_golden(got, {"dq": -0.2040918032, "dk": -0.7820525008, "dv": -1.7815065659})
    q, k = torch.relu(R.q), torch.relu(R.k)
    leaves = [x.clone().requires_grad_() for x in (q, k, R.v)]
    out = sd.compile(sd.linear(1.0, normalised="sum"), backend=backend)(*leaves)
    assert not out[1, 1, :2].any()
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad((R.w * out).sum(), leaves))


def test_T04_forms_that_say_the_same(backend: str, assert_close: Any) -> None:
    def out(program: Any, **more: Tensor) -> Tensor:
        found: Tensor = sd.compile(program, backend=backend)(R.q, R.k, R.v, **more)
        return found

    assert_close(out(GLA, g=R.gs[..., None].expand_as(R.gv)), out(SCALAR, g=R.gs), 1e-12)
    constants = torch.tensor([-0.25, -0.0625], dtype=torch.float64)
    assert_close(out(SCALAR, g=constants[None, :, None].expand_as(R.gs)), out(sd.linear(log_decay=constants.tolist())), 1e-12)
    assert_close(out(sd.linear(decay=G), g=R.gs.exp()), out(SCALAR, g=R.gs), 1e-12)
    dense = (R.q @ R.k.mT).tril() * 0.5 @ R.v
    assert_close(out(SCALAR, g=torch.zeros_like(R.gs)), dense, 1e-12)
    assert_close(out(sd.linear(1.0)), dense, 1e-12)


def test_T10_the_error_is_against_the_decayed_state(backend: str) -> None:
    got = measured(GDN, backend, {**NORMAL, "g": R.gs, "beta": R.beta}, state=R.state)
    assert abs(got["o"] - 1.4111300671) > 0.1


def test_T13_parity(backend: str) -> None:
    e0 = torch.eye(4, dtype=torch.float64)[0].expand(1, 1, 6, 4)
    program = sd.linear(1.0, beta=BETA, scale=1.0)
    attn = sd.compile(program, backend=backend)
    given = {"q": e0, "k": e0, "v": torch.zeros(1, 1, 6, 1).double(), "beta": torch.full((1, 1, 6), 2.0, dtype=torch.float64)}
    out = attn(**given, state=started(attn, torch.ones(1, 1, 4, 1).double(), given))
    assert out.flatten().tolist() == [-1, 1, -1, 1, -1, 1]


def test_T14_growth_is_foretold(backend: str) -> None:
    e0 = torch.eye(4, dtype=torch.float64)[0].expand(1, 1, 20, 4)
    program = sd.linear(1.0, beta=BETA, scale=1.0)
    attn = sd.compile(program, backend=backend)
    given = {
        "q": e0,
        "k": 2 * e0,
        "v": torch.zeros(1, 1, 20, 1).double(),
        "beta": torch.full((1, 1, 20), 0.8, dtype=torch.float64),
    }
    out = attn(**given, state=started(attn, torch.ones(1, 1, 4, 1).double(), given))
    assert float(out[0, 0, -1, 0]) == pytest.approx(7054294.98686405, rel=1e-12)
    (warning,) = sd.analyse(sd.Program(program), 64, heads=1).warnings
    assert "grows from token to token; features='l2'" in warning
    assert not sd.analyse(sd.Program(sd.linear(1.0, beta=BETA, features="l2")), 64, heads=1).warnings


def test_T15_values_with_more_heads_than_keys(backend: str, assert_close: Any) -> None:
    r = recipe(heads=4)
    q, k = l2(r.q[:, :1]), l2(r.k[:, :1])
    given = {"q": q, "k": k, "v": r.v, "g": r.gs, "beta": r.beta}
    assert_golden(measured(GDN, backend, given, w=r.w), {
        "o": -0.1937824765, "p": 0.1016573140, "S": 0.3502416110, "dq": 10.1498978987, "dk": -1.5475569647, "dv": 0.1698755132,
        "dg": 5.6014290819, "dbeta": 7.2520068275,
    })  # fmt: skip
    attn = sd.compile(GDN, backend=backend)
    assert_close(attn(**given), attn(**(given | {"q": q.expand(-1, 4, -1, -1), "k": k.expand(-1, 4, -1, -1)})), 1e-12)


def test_T16_query_heads_share_states(backend: str) -> None:
    r = recipe(heads=4)
    given = {"q": l2(r.q), "k": KN, "v": R.v, "g": R.gs, "beta": R.beta}
    attn = sd.compile(GDN, backend=backend)
    out, after = attn(**given, return_state=True)
    (last,) = after.recurrent.values()
    assert last.shape == (2, 2, 4, 3) and out.shape == (2, 4, 13, 3)
    assert_golden({"o": checksum(out), "p": float(out[1, 3, 7, 1])}, {"o": -0.1119726614, "p": 0.2659105007})


def test_T17_documents(backend: str, assert_close: Any) -> None:
    given = {**NORMAL, "g": R.gv, "beta": R.beta}
    out = sd.compile(CASES["T17 documents"][0](), backend=backend)(**given, ids=IDS)
    attn = sd.compile(KDA, backend=backend)
    for entry, ids in enumerate(IDS):
        for document in ids.unique():
            rows = (ids == document).nonzero()[:, 0]
            part = {name: x[entry : entry + 1, :, rows] for name, x in given.items()}
            assert_close(out[entry : entry + 1, :, rows], attn(**part), 1e-12)


def test_T18_pads_leave_the_state_as_it_was(backend: str) -> None:
    given = {**NORMAL, "g": R.gs, "beta": R.beta}
    padded = {name: x.clone() for name, x in given.items()}
    for name in ("k", "v", "g"):
        padded[name][0, :, 9:] = 0
    attn = sd.compile(GDN, backend=backend)
    _, after = attn(**padded, return_state=True, state=started(attn, R.state, given))
    _, short = attn(**{n: x[:, :, :9] for n, x in given.items()}, return_state=True, state=started(attn, R.state, given))
    (last,), (cut,) = after.recurrent.values(), short.recurrent.values()
    assert torch.equal(last[0], cut[0])
    assert_golden({"S": checksum(last)}, {"S": -0.4365371702})
    _, with_decays = attn(**(padded | {"g": R.gs}), return_state=True, state=started(attn, R.state, given))
    assert float((next(iter(with_decays.recurrent.values())) - last).abs().max()) == pytest.approx(0.3756, abs=1e-4)


def test_T21_mamba_2(backend: str) -> None:
    dt = torch.nn.functional.softplus(R.gs + 0.7)
    rate, skip = (torch.tensor(x, dtype=torch.float64)[None, :, None] for x in ((-0.5, -2.0), (0.3, -0.2)))
    attn = sd.compile(sd.linear(log_decay=G, scale=1.0), backend=backend)
    y, after = attn(R.q[:, :1], R.k[:, :1], R.v * dt[..., None], g=rate * dt, return_state=True)
    y = y + R.v * skip[..., None]
    (last,) = after.recurrent.values()
    assert_golden(
        {"y": checksum(y), "p": float(y[1, 1, 7, 1]), "S": checksum(last.mT)},
        {"y": 11.3789356641, "p": 0.9409065921, "S": -0.3556861226},
    )


def test_T23_a_decay_to_nothing_begins_a_document(backend: str, assert_close: Any) -> None:
    g = R.gs.clone()
    g[:, 1, 5] = -torch.inf
    given = {**NORMAL, "g": g, "beta": R.beta}
    got = measured(GDN, backend, given, state=R.state)
    assert_golden(got, {"o": 2.1384886049, "p": 0.2860762536, "S": -0.2234137641})
    assert all(x == x and abs(x) < 100 for x in got.values())
    out = sd.compile(GDN, backend=backend)(**given)
    later = sd.compile(GDN, backend=backend)(**{name: x[:, 1:, 5:] for name, x in (given | {"g": R.gs}).items()})
    assert_close(out[:, 1:, 5:], later, 1e-12)


def test_T27_the_state_of_fewer_tokens(backend: str) -> None:
    attn = sd.compile(KDA, backend=backend)
    given = {**NORMAL, "g": R.gv, "beta": R.beta}
    for tokens, wanted in ((7, 0.2464644113), (1, 4.1683030119)):
        few = {name: x[:, :, :tokens] for name, x in given.items()}
        _, after = attn(**few, state=started(attn, R.state, given), return_state=True)
        assert_golden({"S": checksum(next(iter(after.recurrent.values())))}, {"S": wanted})


def test_T29_in_one_softmax_with_a_window(backend: str, assert_close: Any) -> None:
    far = sd.linear(1.0, features="elu1", normalised="sum", eps=0.0)
    attn = sd.compile(sd.joint(far, sd.patterns.sliding_window(4)), backend=backend)
    out, lse = attn(QN, KN, R.v, return_lse=True)
    assert_golden({"o": checksum(out)}, {"o": 13.9044498523})
    q, k = (torch.nn.functional.elu(x) + 1 for x in (QN, KN))
    near = torch.where(torch.ones(13, 13).triu(-3).tril().bool(), (QN @ KN.mT * 0.5).exp(), 0.0)
    assert_close(lse, (near + (q @ k.mT * 0.5).tril()).sum(-1).log(), 1e-12)
