"""Calls on DTensors: every device's shard of the batch or the heads gets its part of the whole. Nothing is sent, so the other devices are
not there: torch's fake process group stands for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import sparsedsl as sd

CAUSAL = sd.kv_idx <= sd.q_idx
DOC, BIAS = sd.table("doc"), sd.table("bias", learned=True)
LANDMARKS = sd.input("landmarks", "batch kv_heads keys/4 head_dim")
PROGRAM = sd.attend(CAUSAL & sd.top_k(sd.dot(sd.q, LANDMARKS), 2))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CASES: list[tuple[Any, dict[str, torch.Tensor]]] = [
    (sd.attend(CAUSAL, score=sd.patterns.alibi(4)), {}),
    (
        CAUSAL & (DOC[sd.b, sd.q_idx] == DOC[sd.b, sd.kv_idx]),
        {"doc": torch.stack([torch.arange(12) // 3, torch.arange(12) // 5])},
    ),
    (sd.attend(CAUSAL, score=sd.score + BIAS[sd.h, sd.q_idx - sd.kv_idx]), {"bias": numbers(4, 12, seed=5)}),
    (PROGRAM, {"landmarks": numbers(2, 2, 3, 8, seed=6)}),
]


@pytest.fixture(params=[0, 1])
def mesh(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Of two devices by two, of which this process is one."""
    dist.init_process_group("fake", store=FakeStore(), rank=3 * request.param, world_size=4)
    # With names, since torch remembers by equal meshes what it works out, and with it where a process is.
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=(f"first{request.param}", "second"))
    dist.destroy_process_group()


def part(x: torch.Tensor, mesh: Any, placements: list[Any]) -> torch.Tensor:
    for i, placement in enumerate(placements):
        if isinstance(placement, Shard):
            x = x.chunk(2, placement.dim)[mesh.get_coordinate()[i]]
    return x


def cut(x: torch.Tensor, mesh: Any, placements: list[Any]) -> DTensor:
    return DTensor.from_local(part(x, mesh, placements).contiguous(), mesh, placements, run_check=False)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_shard_gets_its_part_of_the_whole(case: int, mesh: Any) -> None:
    pattern, tables = CASES[case]
    q, k, v = numbers(2, 4, 12, 8), numbers(2, 2, 12, 8, seed=1), numbers(2, 2, 12, 8, seed=2)
    attn = sd.compile(pattern)
    whole = attn(q, k, v, return_lse=True, **tables)
    for placements in ([Shard(0), Shard(1)], [Replicate(), Shard(1)], [Shard(1), Replicate()]):
        mine = [cut(x, mesh, placements) for x in (q, k, v)]
        given = {name: cut(x, mesh, placements) if name == "landmarks" else x for name, x in tables.items()}
        for result, want in zip(attn(*mine, return_lse=True, **given), whole, strict=True):
            assert (result.shape, result.placements) == (want.shape, tuple(placements))
            torch.testing.assert_close(result.to_local(), part(want, mesh, placements), rtol=1e-12, atol=1e-12)


def test_one_key_head_for_all_serves_every_shard(mesh: Any) -> None:
    pattern, placements, everywhere = CASES[0][0], [Replicate(), Shard(1)], [Replicate(), Replicate()]
    q, k, v = numbers(2, 4, 12, 8), numbers(2, 1, 12, 8, seed=1), numbers(2, 1, 12, 8, seed=2)
    mine = [cut(q, mesh, placements), *(cut(x, mesh, everywhere) for x in (k, v))]
    mine = [x.requires_grad_() for x in mine]
    out = sd.attention(mine[0].transpose(1, 2), mine[1].transpose(1, 2), mine[2].transpose(1, 2), pattern, layout="bshd")
    torch.testing.assert_close(
        out.transpose(1, 2).to_local(), part(sd.attention(q, k, v, pattern), mesh, placements), rtol=1e-12, atol=1e-12
    )
    # The devices along the second dimension have each a part of the gradient of the keys.
    assert torch.autograd.grad(out.sum(), mine)[1].placements == (Replicate(), Partial())


@pytest.mark.parametrize(("placements", "error", "message"), [
    ([Shard(2)] * 3, sd.UnsupportedError, r"rows of q S\(2\).*cut along dimension 1 of the mesh.*cp=plan\.on\(mesh\)"),
    ([Shard(1), Replicate(), Replicate()], sd.UnsupportedError, r"placed as q S\(1\), k R, v R.*wanted Shard\(0\), the batch, or Shard"),
    ([Partial()] * 3, sd.UnsupportedError, "placed as q P"),
    ([None, Shard(1), Shard(1)], sd.UnsupportedError, "DTensors on one mesh, or plain tensors all three; got q plain, k a DTensor"),
])  # fmt: skip
def test_what_would_need_other_devices_is_refused(placements: list[Any], error: type[Exception], message: str, mesh: Any) -> None:
    x = numbers(2, 4, 12, 8)
    mine = [x if p is None else cut(x, mesh, [Replicate(), p]) for p in placements]
    with pytest.raises(error, match=message):
        sd.attention(*mine, CAUSAL)
    with pytest.raises(sd.ShapeError, match="head_offset is known of DTensors"):
        sd.attention(*(cut(x, mesh, [Replicate(), Shard(1)]) for _ in range(3)), CAUSAL, head_offset=2)
    with pytest.raises(sd.UnsupportedError, match=r"input 'landmarks' is a plain tensor.*cut along the heads"):
        sd.attention(*(cut(x, mesh, [Replicate(), Shard(1)]) for _ in range(3)), PROGRAM, landmarks=numbers(2, 4, 3, 8))
