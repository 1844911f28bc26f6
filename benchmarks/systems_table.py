"""The table of ``systems_cpu.py``: one group of systems on the same inputs, at one length, in a process of its own; and what is printed."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import measure
from measure import length_text, median, time_text

__all__ = ["child", "table"]

LIMIT_S = 40.0  # of the rounds of a group, after three


# ---- one group at one length, in a process of its own ------------------------------------------------------------------


def child(names: Sequence[str], length: int, rounds: int, trains: int, made_up: int, with_flex: int) -> None:
    """Measure systems that share their inputs, and print one JSON object for each. ``made_up``: no activations of a model."""
    import torch
    from systems_cases import SYSTEMS, random_qkv, topics

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    first = SYSTEMS[names[0]]
    if not first.captured:
        inputs, (q, k, v) = "random", random_qkv(first.shape, length)
    elif made_up:
        inputs, (q, k, v) = "made up", topics(first.shape, length)
    else:
        from activations import captured

        inputs, (q, k, v) = "captured", captured(length)
    group = _Group(names, q, k, v, bool(with_flex))
    found = group.forward(rounds)
    for name, record in found.items():
        system = SYSTEMS[name]
        record |= {"system": name, "length": length, "inputs": inputs, "load_average": measure.load()}
        record |= {"heads": q.shape[1], "kv_heads": k.shape[1], "head_dim": q.shape[3]}
        if trains and system.trains:
            record["training"] = group.training(name, rounds)
        print(json.dumps({f"{name}/{length}": record}), flush=True)


class _Group:
    """Systems with the tensors they share."""

    def __init__(self, names: Sequence[str], q: Any, k: Any, v: Any, with_flex: bool) -> None:
        from systems_cases import SYSTEMS

        import sparsedsl as sd

        self.systems = {name: SYSTEMS[name] for name in names}
        self.q, self.k, self.v = q, k, v
        # Heads repeated beforehand, as dense attention of torch wants them on CPU; it is not timed.
        self.dense_kv = [x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v)]
        self.named: dict[str, dict[str, Any]] = {name: system.inputs(q, k) for name, system in self.systems.items()}
        self.programs = {name: system.program(q.shape[1], q.shape[2]) for name, system in self.systems.items()}
        self.ours = {name: sd.compile(program, backend="tiled") for name, program in self.programs.items()}
        length = q.shape[2]
        flex = [name for name, system in self.systems.items() if with_flex and length <= system.flex]
        self.flex = {name: sd.compile(self.programs[name], backend="flex") for name in flex}

    def dense(self, q: Any, k: Any = None, v: Any = None) -> Any:
        """Dense causal attention of torch; k and v are the group's unless given."""
        import torch

        k, v = self.dense_kv if k is None else (k, v)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, rounds: int) -> dict[str, dict[str, Any]]:
        """Every system, what FlexAttention can say, and dense attention, in turns."""
        import torch
        from systems_cases import density
        from systems_split import KINDS, split_call

        splits: dict[str, list[dict[str, float]]] = {name: [] for name in self.systems}
        # Processor seconds of all threads, which other programs on the machine change less.
        processor: dict[str, list[float]] = {name: [] for name in (*self.systems, "sdpa")}
        qkv = self.q, self.k, self.v

        def ours(name: str) -> Any:
            start = time.process_time()
            out, seconds = split_call(self.ours[name], *qkv, self.named[name])
            processor[name].append(time.process_time() - start)
            splits[name].append(seconds)
            return out

        def dense() -> Any:
            start = time.process_time()
            out = self.dense(self.q)
            processor["sdpa"].append(time.process_time() - start)
            return out

        actions: dict[str, Callable[[], Any]] = {"sdpa": dense}
        for name in self.systems:
            actions[name] = functools.partial(ours, name)
            if name in self.flex:
                actions[f"{name} flex"] = functools.partial(self.flex[name], *qkv, **self.named[name])
        with torch.no_grad():
            first, results = {}, {}
            for key, action in actions.items():
                start = time.perf_counter()
                results[key] = action()
                first[key] = time.perf_counter() - start
            for name in self.systems:
                splits[name].clear()
            for samples in processor.values():
                samples.clear()
            times = measure.alternate(actions, rounds, limit_s=LIMIT_S)
            found = {}
            for name in self.systems:
                compared = {"ours": times[name], "sdpa": times["sdpa"]}
                if name in self.flex:
                    compared["flex"] = times[f"{name} flex"]
                own, flex = compared["ours"], compared.get("flex")
                found[name] = {
                    "seconds": {key: median(values) for key, values in compared.items()},
                    "best_seconds": {key: min(values) for key, values in compared.items()},
                    "processor_seconds": {"ours": median(processor[name]), "sdpa": median(processor["sdpa"])},
                    "first_seconds": {"ours": first[name]} | ({"flex": first[f"{name} flex"]} if flex else {}),
                    "rounds": len(own),
                    "parts": {kind: median(parts[kind] for parts in splits[name]) for kind in KINDS},
                    "sdpa_over_ours": median(b / a for a, b in zip(own, compared["sdpa"], strict=True)),
                    "density": density(self.programs[name], *qkv, self.named[name]),
                }
                if flex:
                    difference = float((results[name] - results[f"{name} flex"]).abs().max())
                    found[name] |= {
                        "flex_over_ours": median(b / a for a, b in zip(own, flex, strict=True)),
                        "largest_difference_to_flex": difference,
                    }
        return found

    def training(self, name: str, rounds: int) -> dict[str, Any]:
        """Forward and backward of one system and of dense attention, in turns; gradients go to q, k, v and what else learns."""
        import torch

        d_out = torch.randn(self.q.shape, generator=torch.Generator().manual_seed(2))
        attn, named = self.ours[name], self.named[name]

        def ours() -> Any:
            leaves = [x.detach().requires_grad_() for x in (self.q, self.k, self.v, *named.values())]
            out = attn(*leaves[:3], **dict(zip(named, leaves[3:], strict=True)))
            return torch.autograd.grad(out, leaves, d_out, allow_unused=True)

        def dense() -> Any:
            leaves = [x.detach().requires_grad_() for x in (self.q, *self.dense_kv)]
            return torch.autograd.grad(self.dense(*leaves), leaves, d_out)

        actions: dict[str, Callable[[], Any]] = {"ours": ours, "sdpa": dense}
        finite = all(grad is None or bool(grad.isfinite().all()) for grad in ours())
        dense()
        found = measure.alternate(actions, rounds, limit_s=LIMIT_S / 2)
        return {
            "seconds": {key: median(values) for key, values in found.items()},
            "rounds": len(found["ours"]),
            "sdpa_over_ours": median(b / a for a, b in zip(found["ours"], found["sdpa"], strict=True)),
            "all_finite": finite,
        }


# ---- what is printed ---------------------------------------------------------------------------------------------------


def table(records: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """One row a system and length."""
    header = ["system", "tokens", "heads, dim", "inputs", "density", "ours", "choosing", "moving", "attending", "SDPA / ours"]
    header += ["flex / ours", "fwd + bwd", "SDPA / ours, fwd + bwd"]
    rows = []
    for record in records:
        seconds, parts, training = record["seconds"], record["parts"], record.get("training")
        total = sum(parts.values())
        row = [titles[record["system"]], length_text(record["length"])]
        row += [f"{record['heads']}:{record['kv_heads']}, {record['head_dim']}", record["inputs"]]
        row += ["" if record["density"] is None else f"{record['density']:.3f}", time_text(seconds["ours"])]
        row += [f"{parts[kind] / total:.0%}" for kind in ("choosing", "moving", "attending")]
        row += [f"{record['sdpa_over_ours']:.2f}", f"{record['flex_over_ours']:.2f}" if "flex_over_ours" in record else ""]
        row += ["", ""] if training is None else [time_text(training["seconds"]["ours"]), f"{training['sdpa_over_ours']:.2f}"]
        rows.append(row)
    return measure.markdown(header, rows)
