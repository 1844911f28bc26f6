"""Programs on the CPU: `cpp` and `tiled` in turns with dense causal SDPA, forward or with gradients, on random tensors.

8 query heads on 2 key heads, 64 wide, float32. `ideal`: the products of dense causal attention over those of attending and choosing, all
at one rate. A column holds SDPA's time over the backend's, medians of turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
import torch.nn.functional as F

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx

HEADS, KV_HEADS, DIM = 8, 2, 64
QUEST = sd.attend((kv_idx <= q_idx) & sd.top_k(sd.bound(sd.q, sd.k, 16), 32))


def programs(length: int) -> dict[str, tuple[Any, dict[str, torch.Tensor]]]:
    """Name -> declaration, inputs."""
    return {
        "HSA, 16 of 64": (sd.patterns.hsa(), {
            "retrieval_q": torch.randn(1, KV_HEADS, length, DIM), "landmarks": torch.randn(1, KV_HEADS, length // 64, DIM),
        }),
        "MoBA, 3 of 512": (sd.patterns.moba(), {}),
        "NSA": (sd.patterns.nsa(), {"gate": torch.rand(1, HEADS, length, 3)}),
        "Quest, 32 pages of 16": (QUEST, {}),
        "NHA, 64 slots": (sd.patterns.nha(), {"gate": torch.randn(1, KV_HEADS, length, 64)}),
        "Ring linear": (sd.patterns.ring_linear([0.9 + 0.01 * head for head in range(HEADS)]), {}),
    }  # fmt: skip


def action(run: Callable[..., torch.Tensor], tensors: list[torch.Tensor], train: bool) -> Callable[[], Any]:
    """One call, with the gradients of q, k and v if they are wanted."""
    if not train:

        def forward() -> Any:
            with torch.no_grad():
                return run(*tensors)

        return forward
    leaves = [t.requires_grad_() for t in tensors]
    return lambda: torch.autograd.grad(run(*leaves).square().sum(), leaves)


def main() -> None:
    """Print the table and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--backends", nargs="+", default=["cpp", "tiled"])
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    facts = measure.machine()
    q, k, v = (torch.randn(1, heads, options.length, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    dense = action(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), [q, k, v], options.train
    )
    records = []
    for name, (declared, inputs) in programs(options.length).items():
        found = sd.analyse(declared, options.length, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM)
        actions = {"sdpa": dense}
        for backend in options.backends:
            attn = sd.compile(declared, backend=backend)
            actions[backend] = action(lambda q, k, v, a=attn, x=inputs: a(q, k, v, **x), [q, k, v], options.train)
        for run in actions.values():
            run()  # compiles, and remembers
        times = {what: measure.median(taken) for what, taken in measure.alternate(actions, options.rounds).items()}
        records.append({"program": name, "ideal": found.flops_dense / 2 / found.flops, "load": measure.load(), **times})
    header = ["program", "SDPA", *(f"SDPA over {backend}" for backend in options.backends), "ideal"]
    rows = [
        [r["program"], measure.time_text(r["sdpa"]), *(f"{r['sdpa'] / r[b]:.2f}" for b in options.backends), f"{r['ideal']:.1f}"]
        for r in records
    ]
    what = "forward and backward" if options.train else "forward"
    print(f"{what}, {options.length} tokens, {options.threads} threads\n\n{measure.markdown(header, rows)}")
    settings = {"length": options.length, "threads": options.threads, "train": options.train, "rounds": options.rounds}
    name = f"programs_{'training_' if options.train else ''}{measure.length_text(options.length)}"
    measure.write_json(
        options.out or measure.result_path(name, facts), {"machine": facts, "settings": settings, "records": records}
    )


if __name__ == "__main__":
    main()
