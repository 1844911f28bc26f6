"""What the GPU tests share. ``pytest -m gpu tests/gpu_device`` on a machine with a GPU; ``--rehearse`` without one.

A rehearsal runs the same tests on CPU at toy sizes, with Triton's interpreter if ``TRITON_INTERPRET=1``, so that nothing but what
only a device has (graphs, streams, its sanitizer) is run there for the first time. Those tests skip and say so.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx
from sparsedsl.testing import tensor

causal = kv_idx <= q_idx
near = causal & (q_idx - kv_idx < 200)
doc, start = sd.table("doc", monotone=True), sd.table("start")
chosen = sd.table("chosen", dtype=bool)
slopes = sd.table("slopes", dtype=float)
bias, sink = sd.table("bias", learned=True), sd.table("sink", learned=True)

PATTERNS = {
    "full": sd.attend(sd.patterns.full()),
    "causal": sd.attend(causal),
    "window and sinks": sd.attend(causal & ((q_idx - kv_idx < 200) | (kv_idx < 4))),
    "documents": sd.attend(causal & (doc[q_idx] == doc[kv_idx])),
    "dilated": sd.attend(near & ((q_idx - kv_idx) % 4 == 0)),
    "blocks": sd.attend(sd.patterns.blocks("chosen", 64)),
    "alibi": sd.attend(causal, score=sd.score - slopes[h] * (q_idx - kv_idx)),
    "soft cap": sd.attend(near, score=sd.tanh(sd.score / 5) * 5),
    "learned bias": sd.attend(near, score=sd.score + bias[h, q_idx - kv_idx]),
    "learned sink": sd.attend(near, sink=sink[h]),
    "windows by head": sd.attend(causal & (q_idx - kv_idx < 50 * (h + 1))),
    "empty rows": sd.attend(causal & (q_idx - kv_idx > 100)),
}
BACKENDS = ("triton", "flex", "tiled")
# Tests whose parameters are declarations of their own, each of which is rehearsed; and one that says itself what it rehearses.
WHOLE = ("test_patterns", "test_systems", "test_head_dims")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--rehearse``."""
    parser.addoption("--rehearse", action="store_true", help="run the GPU tests on CPU, at toy sizes")


def _rehearsing(config: pytest.Config) -> bool:
    return bool(config.getoption("--rehearse", False))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A rehearsal needs no GPU, and of tests that differ in a parameter alone the first and the last; the others are a campaign."""
    if not _rehearsing(config):
        return
    for node in {node for item in items for node in item.listchain()}:
        node.own_markers[:] = [mark for mark in node.own_markers if mark.name != "gpu"]
    alike: dict[tuple[str, str], list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.originalname not in WHOLE:
            backend = item.callspec.params.get("backend", "") if hasattr(item, "callspec") else ""
            alike.setdefault((item.originalname, backend), []).append(item)
    for found in alike.values():
        for item in found[1:-1]:
            item.add_marker(pytest.mark.campaign)


@dataclass(frozen=True)
class Kit:
    """Where the tests run, and tensors for them."""

    rehearsing: bool
    patterns: dict[str, Any] = field(default_factory=lambda: PATTERNS)

    @property
    def device(self) -> str:
        """Type of the device."""
        return "cpu" if self.rehearsing else "cuda"

    def length(self, tokens: int) -> int:
        """A length; in a rehearsal a few tiles of an interpreter, which has some milliseconds for each."""
        return min(40, -(-tokens // 16)) if self.rehearsing else tokens

    def some(self, values: Sequence[Any]) -> Sequence[Any]:
        """All of them; in a rehearsal the first and the last, as the code of a test is the same for each."""
        return [values[0], values[-1]] if self.rehearsing else values

    def inputs(
        self,
        heads: tuple[int, int] = (4, 2),
        length: int = 500,
        kv_length: int | None = None,
        dims: tuple[int, int] = (64, 64),
        *,
        dtype: torch.dtype = torch.bfloat16,
        batch: int = 2,
        layout: str = "contiguous",
        seed: int = 0,
    ) -> list[torch.Tensor]:
        """q, k, v of these heads, lengths (already cut down, if they should be) and widths; bf16 where it can be multiplied."""
        if self.rehearsing:  # Triton's interpreter takes bf16 for integers
            dims, batch = (max(8, dims[0] // 4), max(8, dims[1] // 4)), -(-batch // 2)
            dtype = torch.float16 if dtype == torch.bfloat16 else dtype
        heads = self.heads(heads)
        kv_length = length if kv_length is None else kv_length
        shapes = (heads[0], length, dims[0]), (heads[1], kv_length, dims[0]), (heads[1], kv_length, dims[1])
        return [
            tensor(batch, *shape, seed=seed + i, dtype=dtype, layout=layout).to(self.device) for i, shape in enumerate(shapes)
        ]

    def heads(self, heads: tuple[int, int]) -> tuple[int, int]:
        """How many query and key heads there are, cut down in a rehearsal."""
        kv_heads = max(1, heads[1] // 2) if self.rehearsing else heads[1]
        return kv_heads * heads[0] // heads[1], kv_heads

    def tables(self, pattern: Any, length: int, heads: tuple[int, int] = (4, 2)) -> dict[str, torch.Tensor]:
        """The tables of a pattern, for up to ``length`` positions and inputs of these heads."""
        blocks, rows = -(-length // 64), self.heads(heads)[0]
        made: dict[str, Callable[[], torch.Tensor]] = {
            "doc": lambda: torch.arange(length) // 130,
            "chosen": lambda: (torch.arange(blocks)[:, None] * 3 + torch.arange(blocks)) % 4 < 2,
            "slopes": lambda: torch.exp2(-torch.arange(1.0, rows + 1)),
            "bias": lambda: tensor(rows, 200, seed=11),
            "sink": lambda: tensor(rows, seed=12),
        }
        return {name: made[name]().to(self.device) for name in pattern.tables}

    # ---- what only a device has: in a rehearsal the nearest thing ----

    def captured(self, action: Callable[[], Any]) -> Callable[[], Any]:
        """A CUDA graph of the action, warmed up; calling it replays it and gives the tensors of the capture."""
        if self.rehearsing:
            return action
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            for _ in range(3):
                action()
        torch.cuda.current_stream().wait_stream(other)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = action()

        def replay() -> Any:
            graph.replay()
            return kept

        return replay

    @contextlib.contextmanager
    def no_synchronisation(self) -> Iterator[None]:
        """The host may not wait for the device."""
        if self.rehearsing:
            yield
            return
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @contextlib.contextmanager
    def late_stream(self) -> Iterator[None]:
        """A stream that is not the default one and has something to do for a while."""
        if self.rehearsing:
            yield
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            yield
        torch.cuda.current_stream().wait_stream(stream)

    @contextlib.contextmanager
    def compiles(self) -> Iterator[list[str]]:
        """What is compiled within: names of Triton kernels, and graphs of torch.compile."""
        from torch._dynamo.utils import counters

        found: list[str] = []
        graphs = counters["stats"]["unique_graphs"]
        with _triton_hook(found):
            yield found
        found += ["torch.compile"] * (counters["stats"]["unique_graphs"] - graphs)


@contextlib.contextmanager
def _triton_hook(found: list[str]) -> Iterator[None]:
    try:
        from triton import knobs
    except ImportError:  # only in a rehearsal: backends that need it are skipped
        yield
        return

    def note(**facts: Any) -> None:
        found.append(str(facts["fn"].name))

    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = note
    try:
        yield
    finally:
        knobs.runtime.jit_post_compile_hook = before


@pytest.fixture
def kit(request: pytest.FixtureRequest) -> Kit:
    """See :class:`Kit`."""
    return Kit(_rehearsing(request.config))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, kit: Kit) -> str:
    """Each of our backends for GPUs in turn, as far as there is one here."""
    name: str = request.param
    check_backend(name, kit)
    return name


@pytest.fixture
def triton_backend(kit: Kit) -> str:
    """``"triton"``, if it can run here."""
    check_backend("triton", kit)
    return "triton"


def check_backend(name: str, kit: Kit) -> None:
    """Skip what cannot be rehearsed."""
    if kit.rehearsing and name == "flex":
        pytest.skip("rehearsal: FlexAttention on CPU has neither LSE nor backward")
    if kit.rehearsing and name == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("rehearsal: generated kernels run on CPU under TRITON_INTERPRET=1 only")


@pytest.fixture(params=PATTERNS)
def named_pattern(request: pytest.FixtureRequest) -> str:
    """The name of each pattern in turn."""
    return str(request.param)
