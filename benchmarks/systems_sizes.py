"""Questions of size that ``systems_cpu.py`` answers one at a time, each in a process of its own: what a step over 16 million tokens takes,
what choosing takes of memory, how cost grows with the length, what a state costs beside a cache."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
from measure import MIB, bytes_text, length_text, median, time_text

__all__ = ["QUESTIONS", "Question", "child", "ring_state_bytes"]

CHUNK, TOP_K, DIM = 64, 16, 64
SELECTION_LIMIT = 256 * MIB  # issue 5
DENSE_TO = 16384  # beyond, dense attention takes minutes
STEPS = 9


def _asked(name: str, size: int) -> dict[str, Any]:
    found, death = measure.run_child([str(Path(__file__).parent / "systems_cpu.py"), "--question-child", name, str(size)])
    if death is not None:
        raise SystemExit(f"--{name} ended: {death}")
    return found


# ---- one step over 16 million tokens ---------------------------------------------------------------------------------------


def _decode_child(chunks: int) -> dict[str, Any]:
    import torch

    import sparsedsl as sd

    length, generator = chunks * CHUNK, torch.Generator().manual_seed(0)
    k, v = (torch.empty(1, 1, length, DIM, dtype=torch.bfloat16) for _ in range(2))
    marks = torch.empty(1, 1, chunks, DIM, dtype=torch.bfloat16)
    for start in range(0, length, 1 << 20):
        some = slice(start, min(start + (1 << 20), length))
        for x in (k, v):
            x[:, :, some].normal_(generator=generator)
        means = k[:, :, some].float().unflatten(2, (-1, CHUNK)).mean(3) * CHUNK**0.5
        marks[:, :, some.start // CHUNK : some.stop // CHUNK] = means
    q, asked = (torch.randn(1, heads, 1, DIM, generator=generator).bfloat16() for heads in (16, 1))
    attn = sd.compile(sd.patterns.hsa(CHUNK, TOP_K), backend="tiled")

    def step() -> Any:
        return attn(q, k, v, q_offset=length, retrieval_q=asked, landmarks=marks)

    def dense() -> Any:  # heads that share their keys as rows, which is what they are to one that sees every key
        return torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v)

    with torch.no_grad():
        few = 4 * TOP_K
        attn(
            q,
            k[:, :, : few * CHUNK],
            v[:, :, : few * CHUNK],
            q_offset=few * CHUNK,
            retrieval_q=asked,
            landmarks=marks[:, :, :few],
        )
        first = measure.seconds(step)
        found = [measure.seconds(step) for _ in range(STEPS)]
        peak = measure.peak_bytes(step)
        error = float((step().double() - _decode_exactly(q, k, v, asked, marks)).abs().max())
        dense_s = [measure.seconds(dense) for _ in range(3)]
    inputs = sum(x.nbytes for x in (q, k, v, asked, marks))
    return {
        "tokens": length, "chunks": chunks, "query_heads": q.shape[1], "first_step_s": first, "step_s": median(found),
        "best_step_s": min(found), "peak_bytes": peak, "input_bytes": inputs, "dense_step_s": median(dense_s),
        "largest_error_against_float64": error, "load_average": measure.load(),
    }  # fmt: skip


def _decode_exactly(q: Any, k: Any, v: Any, asked: Any, marks: Any) -> Any:
    """The step in float64, chunk by chunk."""
    import torch

    parts = [part.double() @ asked[0, 0, 0].double() for part in marks[0, 0].split(1 << 16)]
    scores, chosen = (torch.cat(parts) * DIM**-0.5).topk(TOP_K)
    out = 0
    for share, chunk in zip(scores.softmax(0), chosen.tolist(), strict=True):
        keys, values = (x[0, 0, chunk * CHUNK : (chunk + 1) * CHUNK].double() for x in (k, v))
        out = out + share * ((q[0, :, 0].double() @ keys.T * DIM**-0.5).softmax(-1) @ values)
    return torch.as_tensor(out)[None, :, None]


def _decode_text(found: Mapping[str, Any]) -> str:
    rows = [
        (
            "tokens (chunks of 64), heads of q : of k, D",
            f"{found['tokens']:,} ({found['chunks']:,}), {found['query_heads']}:1, {DIM}",
        ),
        (f"a step, median of {STEPS} (the best)", f"{time_text(found['step_s'])} ({time_text(found['best_step_s'])})"),
        ("the first step", time_text(found["first_step_s"])),
        ("peak memory over the inputs (the inputs)", f"{bytes_text(found['peak_bytes'])} ({bytes_text(found['input_bytes'])})"),
        ("dense SDPA over all keys, the same step", time_text(found["dense_step_s"])),
        ("largest error against float64", f"{found['largest_error_against_float64']:.1e}"),
    ]
    return measure.markdown(("HSA, one step, bf16", "measured"), rows)


# ---- memory of choosing ------------------------------------------------------------------------------------------------


def _selection(queries: int) -> dict[str, Any]:
    """The choice by itself and its gradients (``selection_memory.py``), and through a program."""
    chunks = max(TOP_K, queries // 4)
    script = str(Path(__file__).parent / "selection_memory.py")
    parts, death = measure.run_child([script, "--child", str(queries), str(chunks), str(TOP_K), "0"])
    if death is not None:
        raise SystemExit(f"{script} ended: {death}")
    return {"queries": queries, "chunks": chunks, **parts, "program": _asked("selection-memory", queries)}


def _selection_child(queries: int) -> dict[str, Any]:
    import torch

    import sparsedsl as sd

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    chunks = max(TOP_K, queries // 4)
    block = queries // chunks
    q, k, v, asked = (torch.randn(1, 1, queries, DIM, generator=generator) for _ in range(4))
    marks = torch.randn(1, 1, chunks, DIM, generator=generator)
    attn = sd.compile(sd.patterns.hsa(block, TOP_K), backend="tiled")
    few = 64 * block
    attn.choices(*(x[:, :, :few] for x in (q, k, v)), retrieval_q=asked[:, :, :few], landmarks=marks[:, :, :64])
    kept: dict[str, Any] = {}

    def choose() -> None:
        kept.update(attn.choices(q, k, v, retrieval_q=asked, landmarks=marks))

    timed: list[float] = []
    peak = measure.peak_bytes(lambda: timed.append(measure.seconds(choose)))
    (selected,) = kept.values()
    return {
        "seconds": timed[0],
        "peak_bytes": peak,
        "over_bytes": max(0, peak - selected.indices.nbytes - selected.counts.nbytes),
    }


def _selection_text(found: Mapping[str, Any]) -> str:
    steps = {**found["steps"], "choices of hsa()": found["program"]}
    rows = [
        [name, time_text(step["seconds"]), bytes_text(step["peak_bytes"]), bytes_text(step["over_bytes"])]
        for name, step in steps.items()
    ]
    most = max(step["over_bytes"] for step in steps.values())
    verdict = measure.target("memory over inputs and outputs, MiB", most / MIB, at_most=SELECTION_LIMIT / MIB)
    return (
        f"Top-{TOP_K} of {found['chunks']:,} chunks for {found['queries']:,} queries, one thread; all scores at once: "
        f"{bytes_text(found['dense_bytes'])}.\n\n"
        + measure.markdown(["step", "time", "peak", "over inputs and outputs"], rows)
        + f"\n\n{measure.verdicts([verdict])}"
    )


# ---- cost by length ----------------------------------------------------------------------------------------------------


def _scaling_child(longest: int) -> dict[str, Any]:
    import torch
    from systems_cases import SYSTEMS, random_qkv
    from systems_split import split_call

    import sparsedsl as sd

    system, records = SYSTEMS["hsa"], []
    attn = sd.compile(system.declare(system.shape.heads, 1), backend="tiled")
    length = max(128, longest // 16)
    while length <= longest:
        q, k, v = random_qkv(system.shape, length)
        named, parts = system.named(q, k, 1), list[dict[str, float]]()

        def ours(q: Any = q, k: Any = k, v: Any = v, named: Any = named, parts: list[dict[str, float]] = parts) -> None:
            parts.append(split_call(attn, q, k, v, named)[1])

        actions: dict[str, Callable[[], Any]] = {"ours": ours}
        if length <= DENSE_TO:
            wide_k, wide_v = (x.expand(-1, q.shape[1], -1, -1).contiguous() for x in (k, v))
            dense = torch.nn.functional.scaled_dot_product_attention
            actions["sdpa"] = functools.partial(dense, q, wide_k, wide_v, is_causal=True)
        with torch.no_grad():
            ours()
            parts.clear()
            found = measure.alternate(actions, 5, limit_s=30)
        records.append(
            {
                "length": length, "seconds": {name: median(times) for name, times in found.items()},
                "parts": {kind: median(part[kind] for part in parts) for kind in parts[0]}, "load_average": measure.load(),
            }
        )  # fmt: skip
        length *= 2
    return {"records": records, "heads": system.shape.heads}


def _scaling_text(found: Mapping[str, Any]) -> str:
    rows, before = [], None
    for record in found["records"]:
        length, seconds, parts = record["length"], record["seconds"], record["parts"]
        row = [length_text(length), time_text(seconds["ours"])]
        row += [f"{parts['attending'] / length * 1e6:.2f}", f"{parts['choosing'] / length / (length / CHUNK / 2) * 1e9:.2f}"]
        for kind in ("attending", "choosing"):
            row.append("" if before is None else f"{math.log2(parts[kind] / before['parts'][kind]):.2f}")
        row.append(f"{seconds['sdpa'] / seconds['ours']:.2f}" if "sdpa" in seconds else "")
        rows.append(row)
        before = record
    header = ["tokens", "HSA", "attending, us a query", "choosing, ns a query and candidate"]
    header += ["attending grows as length to", "choosing grows as length to", "SDPA / HSA"]
    about = f"HSA, {TOP_K} chunks of {CHUNK} a query, {found['heads']} heads of queries on one of keys, D {DIM}."
    return f"{about}\n\n{measure.markdown(header, rows)}"


# ---- a state beside a cache ---------------------------------------------------------------------------------------------


RING_HEADS, RING_DIM = 16, 128  # Ring-mini-linear-2.0


def _ring_state(q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """The program, and its state after these tokens."""
    import sparsedsl as sd

    attn = sd.compile(sd.patterns.ring_linear(sd.decay_table(heads=RING_HEADS, layer=0, layers=20)), backend="tiled")
    return attn, attn(q, k, v, return_state=True)[1]


def ring_state_bytes() -> int:
    """What Ring-linear remembers of one layer."""
    import torch

    x = torch.zeros(1, RING_HEADS, 2, RING_DIM)
    return int(_ring_state(x, x, x)[1].nbytes)


def _ring_child(longest: int) -> dict[str, Any]:
    import torch

    heads, kv_heads, dim = RING_HEADS, 4, RING_DIM
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 257, dim, generator=generator) for _ in range(3))
    with torch.no_grad():
        attn, state = _ring_state(*(x[:, :, :256] for x in (q, k, v)))
        last = [x[:, :, 256:] for x in (q, k, v)]
        rows = q[:, :, 256:].view(1, kv_heads, heads // kv_heads, dim)
        records = []
        for length in sorted({max(64, longest >> shift) for shift in (7, 5, 3, 1, 0)}):
            keys, values = (torch.randn(1, kv_heads, length, dim, generator=generator) for _ in range(2))
            actions: dict[str, Callable[[], Any]] = {
                "ring": lambda: attn(*last, state=state, return_state=True),
                "cache": functools.partial(torch.nn.functional.scaled_dot_product_attention, rows, keys, values),
            }
            for action in actions.values():
                action()
            found = measure.alternate(actions, 25, limit_s=5)
            records.append(
                {
                    "length": length, "seconds": {name: median(times) for name, times in found.items()},
                    "cache_bytes": keys.nbytes + values.nbytes, "load_average": measure.load(),
                }
            )  # fmt: skip
    return {"records": records, "state_bytes": state.nbytes, "heads": heads, "kv_heads": kv_heads, "dim": dim}


def _ring_text(found: Mapping[str, Any]) -> str:
    rows = [
        [length_text(r["length"]), time_text(r["seconds"]["ring"]), time_text(r["seconds"]["cache"]), bytes_text(r["cache_bytes"]),
         f"{r['seconds']['cache'] / r['seconds']['ring']:.2f}"]
        for r in found["records"]
    ]  # fmt: skip
    heads, dim, state = found["heads"], found["dim"], bytes_text(found["state_bytes"])
    about = (
        f"State of one layer, {heads} heads of {dim} x {dim} in float32: {state} at any length (Ring-linear: 1 MiB). The cache has "
        f"{found['kv_heads']} heads of keys and values in float32, for {heads} heads of queries.\n\n"
    )
    return about + measure.markdown(["tokens read", "a step, state", "a step, SDPA over a cache", "cache", "cache / state"], rows)


# ---- all of them --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """``help`` in words; ``measure(size or None)`` -> what is written down; ``text`` of it."""

    help: str
    measure: Callable[[int | None], dict[str, Any]]
    text: Callable[[Mapping[str, Any]], str]


QUESTIONS = {
    "decode-16m": Question("HSA: a step over 262,144 chunks", lambda n: _asked("decode-16m", n or 262144), _decode_text),
    "selection-memory": Question("memory of top-16 of 16,384 chunks", lambda n: _selection(n or 65536), _selection_text),
    "scaling": Question("HSA: cost by length to 64K", lambda n: _asked("scaling", n or 65536), _scaling_text),
    "ring-decode": Question("Ring-linear: a step to 128K tokens", lambda n: _asked("ring-decode", n or 131072), _ring_text),
}
_CHILDREN = {
    "decode-16m": _decode_child, "selection-memory": _selection_child, "scaling": _scaling_child, "ring-decode": _ring_child,
}  # fmt: skip


def child(name: str, words: Sequence[str]) -> None:
    """Measure in this process, and print one JSON object."""
    print(json.dumps(_CHILDREN[name](int(words[0]))))
