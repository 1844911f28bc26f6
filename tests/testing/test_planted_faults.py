"""The kit by mutation: a fault planted in a right implementation is seen, in float32 and in bfloat16, and the right one is not accused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.errors import UnsupportedError
from sparsedsl.execute.compiled import Attention
from sparsedsl.testing import battery, program_battery

CAUSAL = sd.kv_idx <= sd.q_idx
Tensor = torch.Tensor


def online(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep: Callable[[Tensor], None] = lambda allowed: None,
    scale: float = 1.0,
    rescaled: bool = True,
    lse_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last rows, two tiles of keys one after the other, as kernels compute it."""  # fmt: skip
    dtype, rows, keys = q.dtype, q.shape[2], k.shape[2]
    q, k, v = q.float(), k.float(), v.float()
    logits = q @ k.transpose(-1, -2) * q.shape[3] ** -0.5 * scale
    allowed = (torch.arange(keys) <= torch.arange(keys - rows, keys)[:, None]).expand(logits.shape).clone()
    keep(allowed)
    logits = torch.where(allowed, logits, -1e30)
    peak, total, acc = torch.full(q.shape[:3], -1e30), torch.zeros(q.shape[:3]), torch.zeros(*q.shape[:3], v.shape[3])
    for part in torch.arange(keys).split(keys // 2):
        higher = torch.maximum(peak, logits[..., part].amax(-1))
        weights, factor = torch.exp(logits[..., part] - higher[..., None]), torch.exp(peak - higher)
        total = total * factor + weights.sum(-1)
        acc = acc * (factor[..., None] if rescaled else 1) + weights.to(dtype).float() @ v[:, :, part]
        peak = higher
    return (acc / total[..., None]).to(dtype), (peak + torch.log(total)) * lse_factor


class Planted(Attention):
    """``online`` with a fault, as a lowering without gradients; ``lse``: whether it gives one."""

    def __init__(self, fault: dict[str, Any], lse: bool):
        super().__init__(sd.attend(CAUSAL), "reference")
        self.fault, self.lse = fault, lse

    def __call__(self, q: Any, k: Any, v: Any, *, return_lse: bool = False, **words: Any) -> Any:
        if (return_lse and not self.lse) or q.requires_grad:
            raise UnsupportedError("none")
        out, lse = online(q, k, v, **self.fault)
        return (out, lse) if return_lse else out


def _first_key(allowed: Tensor) -> None:
    allowed[..., 0] = False


def _first_key_of_a_head(allowed: Tensor) -> None:
    allowed[:, 1, :, 0] = False


def _own_key(allowed: Tensor) -> None:
    allowed.diagonal(allowed.shape[3] - allowed.shape[2], 2, 3).fill_(False)


def _own_key_of_the_last_row(allowed: Tensor) -> None:
    allowed[..., -1, -1] = False


FAULTS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "first key dropped": ({"keep": _first_key}, (8, 256)),
    "own key missing": ({"keep": _own_key}, (8, 256)),
    "scale off by 2 %": ({"scale": 1.02}, (8, 256)),
    "sums not rescaled": ({"rescaled": False}, (8, 256)),
    "first key dropped in one head, behind an outlier": ({"keep": _first_key_of_a_head}, (8, 256)),
    "last row misses its key": ({"keep": _own_key_of_the_last_row}, (128, 128)),
}


def planted_inputs(rows: int, keys: int, seed: int, dtype: torch.dtype, outlier: bool) -> list[Tensor]:
    q, k, v = (kit.tensor(1, 2, n, 64, seed=10 * seed + i, dtype=dtype) for i, n in enumerate((rows, keys, keys)))
    if outlier:
        v = v.clone()
        v[0, 0, 5] *= 1000
    return [q, k, v]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen_in_the_output_alone(name: str, dtype: torch.dtype) -> None:
    fault, (rows, keys) = FAULTS[name]
    for seed in range(3):
        q, k, v = planted_inputs(rows, keys, seed, dtype, "outlier" in name)
        offset = keys - rows
        assert kit.assert_matches_reference(Planted({}, lse=True), q, k, v, q_offset=offset) == ("out", "lse")
        with pytest.raises(kit.Counterexample, match=r"out\["):
            kit.assert_matches_reference(Planted(fault, lse=False), q, k, v, q_offset=offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_a_percent_is_seen_in_the_lse(dtype: torch.dtype) -> None:
    q, k, v = planted_inputs(8, 256, 0, dtype, outlier=False)
    with pytest.raises(kit.Counterexample, match=r"(out|lse)\["):
        kit.assert_matches_reference(Planted({"scale": 1.005}, lse=True), q, k, v, q_offset=248)
    with pytest.raises(kit.Counterexample, match=r"lse\["):
        kit.assert_matches_reference(Planted({"lse_factor": 1.0002}, lse=True), q, k, v, q_offset=248)


def test_a_gradient_wrong_in_one_head_is_seen_behind_another() -> None:
    class OneHead(Attention):
        def __call__(self, q: Any, k: Any, v: Any, **words: Any) -> Any:
            factor = torch.tensor([1.0, 0.98])[:, None, None]
            return super().__call__(q, k.detach() + factor * (k - k.detach()), v, **words)

    q, k, v = planted_inputs(16, 16, 0, torch.float32, outlier=True)
    with pytest.raises(kit.Counterexample, match=r"dk\[0, 1"):
        kit.assert_matches_reference(OneHead(sd.attend(CAUSAL), "reference"), q, k, v)


# ---- programs ---------------------------------------------------------------------------------------------------------------

CASE = kit.AttentionCase(batch=1, heads=4, kv_heads=2, q_len=24, kv_len=24, head_dim=16)
NEAR, FAR = CAUSAL & (sd.q_idx - sd.kv_idx < 5), CAUSAL & (sd.q_idx - sd.kv_idx >= 5)
GATE = sd.input("gate", "batch heads queries 2")


class Instead(Attention):
    """A program that is declared, and another that is run in its place."""

    def __init__(self, declared: Any, run: Any, backend: str):
        super().__init__(sd.Program(declared), backend)
        self.run = sd.compile(run, backend=backend)

    def __call__(self, *tensors: Any, **words: Any) -> Any:
        return self.run(*tensors, **words)


MIXED = sd.mix(sd.attend(NEAR), sd.attend(CAUSAL), weights=GATE)
SWAPPED = sd.mix(sd.attend(CAUSAL), sd.attend(NEAR), weights=GATE)
NARROW, WIDE = sd.attend(FAR, scale=0.25), sd.attend(FAR, scale=0.255)
PROGRAMS = {
    "gates of mix reversed": (MIXED, SWAPPED),
    "joint halved": (sd.joint(NEAR, FAR), sd.joint(NEAR, False)),
    "scale off by 2 % in a branch": (sd.joint(NEAR, NARROW), sd.joint(NEAR, WIDE)),
}


def program_tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    sizes = zip("qkv", (CASE.q_shape, CASE.k_shape, CASE.v_shape), strict=True)
    return {name: kit.tensor(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(sizes)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_fault_of_a_program_is_seen(name: str, backend: str, dtype: torch.dtype) -> None:
    right, wrong = PROGRAMS[name]
    t = program_tensors(dtype)
    t |= {"gate": kit.tensor(1, 4, 24, 2, seed=4, dtype=dtype)} if "mix" in name else {}
    kit.assert_matches_reference(sd.compile(right, backend=backend), **t)
    with pytest.raises(kit.Counterexample, match=r"dense meaning: out\["):
        kit.assert_matches_reference(Instead(right, wrong, backend), **t)
    with pytest.raises(kit.Counterexample, match=r"one call: rows 0 to 23: out\["):
        kit.assert_prefill_equals_decode(Instead(right, wrong, backend), CASE)


def test_a_top_k_off_by_one_is_seen() -> None:
    class OneMore(Attention):
        """Runs, and reports, a choice of one chunk more."""

        more = sd.compile(sd.patterns.hsa(4, 3), backend="tiled")

        def __call__(self, *tensors: Any, **words: Any) -> Any:
            return self.more(*tensors, **words)

        def choices(self, *tensors: Any, **words: Any) -> Any:
            (found,) = self.more.choices(*tensors, **words).values()
            return dict.fromkeys(super().choices(*tensors, **words), found)

    marks = {
        "retrieval_q": kit.tensor(1, 2, 24, 8, seed=5, dtype=torch.float64),
        "landmarks": kit.tensor(1, 2, 6, 8, seed=6, dtype=torch.float64),
    }
    with pytest.raises(kit.Counterexample, match="chooses otherwise"):
        kit.assert_matches_reference(
            OneMore(sd.Program(sd.patterns.hsa(4, 2)), "tiled"), **program_tensors(torch.float64), **marks
        )


class Subject(program_battery.ProgramSubject):
    """A program under test whose backend runs another."""

    wrong: Any = None

    def attention(self) -> Any:
        return Instead(self.program.root, type(self).wrong, self.backend)


@pytest.mark.parametrize(("name", "backend"), list(zip(PROGRAMS, ("tiled", "reference", "tiled"), strict=True)))
def test_check_sees_a_fault_of_a_program(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = PROGRAMS[name]
    monkeypatch.setattr(Subject, "wrong", wrong)
    properties = {"numbers": program_battery.PROGRAM_PROPERTIES["numbers"]}
    (found,) = battery._run(properties, {}, Subject(sd.Program(right), backend, None), 8, False, 0)
    assert found.status == "FAILS", found


@pytest.mark.parametrize("name", ["first key dropped", "own key missing", "scale off by 2 %", "last row misses its key"])
def test_check_sees_a_fault_of_a_lowering(name: str) -> None:
    fault, _ = FAULTS[name]

    class Wrong(Attention):
        """The reference, but for problems that ``online`` computes."""

        def __call__(self, q: Any, k: Any, v: Any, *, return_lse: bool = False, q_offset: int = 0, **words: Any) -> Any:
            if q_offset + q.shape[2] != k.shape[2] or k.shape[2] < 4 or q.shape[1] != k.shape[1] or q.requires_grad:
                return super().__call__(q, k, v, return_lse=return_lse, q_offset=q_offset, **words)
            out, lse = online(q, k, v, **fault)
            return (out, lse) if return_lse else out

    class Lowering(battery._Subject):
        def attention(self) -> Any:
            return Wrong(self.bound, self.backend)

    subject = Lowering(sd.attend(CAUSAL), "reference", {}, True)
    (found,) = battery._run({"numbers": battery.PROPERTIES["numbers"]}, {}, subject, 60, False, 0)
    assert found.status == "FAILS", found
