"""The part of ``attention_cpu.py --backend tiled``: `tiled` against compiled FlexAttention by hand and against dense causal SDPA.

Batch 1, 4 heads, float32, no gradients. One process a pattern; for each head dimension and length, in turns:

- *tiled*: ``attn(q, k, v)`` of ``sd.compile(pattern, backend="tiled")`` with the schedule remembered, checks included.
- *flex*: ``torch.compile(flex_attention, dynamic=False)`` with a mask written by hand, made before: one kernel for each length
  and head dimension, the best torch can do. Its cache is emptied before each, and a kernel that is not compiled would be an
  error.
- *SDPA*: ``scaled_dot_product_attention(is_causal=True)``, dense, whatever the pattern.

Times are medians; ``flex / tiled`` and the ratio of rates are medians of the ratios within one round. A *rate* is the work
scheduled, 4 floating-point operations for each pair computed and each entry of a head, in a second: pairs in the strips of the
schedule, masked ones included; for SDPA half the square. So the ratio of rates says how near sparse attention comes to what a
dense kernel gets out of this machine, and ``computed / allowed`` what the schedule computes in vain.

*First calls*: a fresh process with tensors at hand and sparsedsl imported makes one call, compilation included. ``empty``:
nothing in the caches of sparsedsl (it then measures the machine) and of torch; ``filled``: the same command again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
from measure import length_text, median, time_text
from tqdm import tqdm

PATTERNS = (
    "window256", "window", "window4096", "sinks", "dilated", "causal_documents", "chunked", "prefix", "alibi", "softcap",
    "blocks5", "blocks10", "blocks25",
)  # fmt: skip
QUICK_PATTERNS = ("window", "blocks10")
LENGTHS, QUICK_LENGTHS = (8192, 16384), (4096,)
DIMS, QUICK_DIMS = (64, 128), (64,)
ROUNDS = 5
BATCH, HEADS, BLOCK = 1, 4, 128
FIRST_PATTERN = "window"
# Targets of issue 3.
SPEEDUP, LEAST_SPEEDUP, RATE_RATIO, SCATTERED_RATE_RATIO = 2.0, 1.0, 0.7, 0.5


# ---- one pattern, in a process of its own --------------------------------------------------------------------


def child(name: str, lengths: list[int], dims: list[int], rounds: int) -> None:
    """Measure, and print one JSON object for each head dimension and length."""
    import torch
    from cases import CASES
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    import sparsedsl as sd
    from sparsedsl.runtime.call import check_call

    # What does not fit into the compile cache would run uncompiled, silently: twenty times slower.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    case = CASES[name]
    pattern = case.declare()
    for length in lengths:
        tables: dict[str, Any] = dict(case.tables(length))
        mask_mod = case.mask_mod(tables)
        torch._dynamo.reset()
        mask: Any = create_block_mask(mask_mod, None, None, length, length, device="cpu", BLOCK_SIZE=BLOCK, _compile=True)
        allowed = sd.analyse(pattern, length, **tables).density * length * length
        for dim in dims:
            torch._dynamo.reset()
            flex = torch.compile(flex_attention, dynamic=False)
            attn = sd.compile(pattern, backend="tiled")
            generator = torch.Generator().manual_seed(0)
            q, k, v = (torch.randn(BATCH, HEADS, length, dim, generator=generator) for _ in range(3))

            def tiled(attn: Any = attn, q: Any = q, k: Any = k, v: Any = v, tables: Any = tables) -> Any:
                return attn(q, k, v, **tables)

            def by_hand(flex: Any = flex, q: Any = q, k: Any = k, v: Any = v, mask: Any = mask) -> Any:
                return flex(q, k, v, score_mod=case.score_mod, block_mask=mask)

            def dense(q: Any = q, k: Any = k, v: Any = v) -> Any:
                return scaled_dot_product_attention(q, k, v, is_causal=True)

            with torch.no_grad():
                first = {"tiled": measure.seconds(tiled), "flex": measure.seconds(by_hand), "sdpa": measure.seconds(dense)}
                difference = float((tiled() - by_hand()).abs().max())
                actions: dict[str, Callable[[], Any]] = {"tiled": tiled, "flex": by_hand, "sdpa": dense}
                found = measure.alternate(actions, rounds, limit_s=12)
            call = check_call(attn.pattern, q, k, v, tables)
            kernel: Any = attn.static.runner("tiled")
            schedule = kernel.schedule(call)
            # Pairs are counted for one head of each group of heads that the mask tells apart.
            pairs = schedule.pairs * BATCH * HEADS // (schedule.groups[0] * schedule.groups[1])
            operations = {"tiled": 4 * dim * pairs, "sdpa": 4 * dim * BATCH * HEADS * length * length // 2}
            rates = {key: [operations[key] / s for s in found[key]] for key in operations}
            record = {
                "length": length,
                "head_dim": dim,
                "seconds": {key: median(values) for key, values in found.items()},
                "best_seconds": {key: min(values) for key, values in found.items()},
                "first_seconds": first,
                "rounds": len(found["tiled"]),
                "flex_over_tiled": median(b / a for a, b in zip(found["tiled"], found["flex"], strict=True)),
                "pairs_computed": pairs,
                "computed_over_allowed": pairs / (allowed * BATCH * HEADS),
                "gflops": {key: median(values) / 1e9 for key, values in rates.items()},
                "rate_ratio": median(a / b for a, b in zip(rates["tiled"], rates["sdpa"], strict=True)),
                "expected_s": schedule.seconds,
                "largest_difference": difference,
                "load_average": measure.load(),
            }
            print(json.dumps({f"{dim}/{length}": record}), flush=True)


# ---- first calls, each in a process of its own ---------------------------------------------------------------


def first_call(method: str, length: int) -> None:
    """Seconds from a pattern to the first result, as one JSON object."""
    import torch
    from cases import CASES

    import sparsedsl as sd

    case = CASES[FIRST_PATTERN]
    q, k, v = (torch.randn(BATCH, HEADS, length, 64) for _ in range(3))

    def tiled() -> Any:
        return sd.compile(case.declare(), backend="tiled")(q, k, v)

    def flex() -> Any:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(case.mask_mod({}), None, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)
        return torch.compile(flex_attention, dynamic=False)(q, k, v, block_mask=mask)

    with torch.no_grad():
        print(json.dumps({"s": measure.seconds({"tiled": tiled, "flex": flex}[method])}))


def first_calls(length: int) -> dict[str, Any]:
    """First calls of both methods with empty caches, and with what those left in them."""
    found: dict[str, Any] = {"pattern": FIRST_PATTERN, "length": length}
    with tempfile.TemporaryDirectory(prefix="first-call-") as cache:
        env = {"SPARSEDSL_CACHE": f"{cache}/sparsedsl", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch", "SPARSEDSL_TUNE": "cached"}
        for state in ("empty", "filled"):
            for method in ("tiled", "flex"):
                got, death = measure.run_child([str(Path(__file__)), "first", method, str(length)], env)
                if death is not None:
                    raise RuntimeError(f"first call of {method}: {death}")
                found[f"{method}_{state}_s"] = got["s"]
    return found


# ---- all patterns --------------------------------------------------------------------------------------------


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """One record for each pattern, head dimension and length; first calls; what the machine is taken for; the targets."""
    rates, records = measure.rates(), []
    first = None if options.no_first_calls else first_calls(min(8192, max(options.lengths)))
    lengths, dims = (",".join(map(str, values)) for values in (options.lengths, options.dims))
    for name in tqdm(options.patterns, desc="attention", unit="pattern"):
        with tempfile.TemporaryDirectory(prefix="attention-cpu-") as cache:
            arguments = [str(Path(__file__)), "pattern", name, lengths, dims, str(options.rounds)]
            env = {} if options.keep_cache else {"TORCHINDUCTOR_CACHE_DIR": cache}
            found, death = measure.run_child(arguments, env)
        if death is not None:
            raise RuntimeError(f"{name}: {death}")
        records += [{"pattern": name} | found[f"{dim}/{length}"] for dim in options.dims for length in options.lengths]
    return {"records": records, "first_calls": first, "rates": rates, "targets": checks(records)}


def checks(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets with what was measured for them."""
    from cases import CASES

    def lowest(key: str, among: list[dict[str, Any]]) -> tuple[float, str]:
        worst = min(among, key=lambda record: float(record[key]))
        return worst[key], f"{CASES[worst['pattern']].title}, D {worst['head_dim']}, {length_text(worst['length'])}"

    mean = measure.geometric_mean(record["flex_over_tiled"] for record in records)
    least, where = lowest("flex_over_tiled", records)
    found = [
        measure.target("flex / tiled, geometric mean", mean, at_least=SPEEDUP),
        measure.target(f"flex / tiled, lowest ({where})", least, at_least=LEAST_SPEEDUP),
    ]
    for scattered, limit in ((False, RATE_RATIO), (True, SCATTERED_RATE_RATIO)):
        among = [record for record in records if CASES[record["pattern"]].scattered == scattered]
        if among:
            least, where = lowest("rate_ratio", among)
            kind = "block-sparse" if scattered else "other patterns"
            found.append(measure.target(f"rate of tiled / rate of SDPA, {kind}, lowest ({where})", least, at_least=limit))
    return found


def text(result: dict[str, Any]) -> str:
    """The tables, and how the targets were met."""
    parts = [table(result["records"])]
    if result["first_calls"] is not None:
        parts.append(first_table(result["first_calls"]))
    return "\n\n".join([*parts, measure.verdicts(result["targets"])])


def table(records: list[dict[str, Any]]) -> str:
    """The Markdown table of times and rates."""
    from cases import CASES

    header = ["pattern", "D", "tokens", "tiled", "flex", "flex / tiled", "SDPA causal", "computed / allowed"]
    header += ["tiled GFLOP/s", "SDPA GFLOP/s", "ratio"]
    rows = []
    for record in records:
        steady, rates = record["seconds"], record["gflops"]
        row = [CASES[record["pattern"]].title, str(record["head_dim"]), length_text(record["length"])]
        row += [
            time_text(steady["tiled"]),
            time_text(steady["flex"]),
            f"{record['flex_over_tiled']:.2f}",
            time_text(steady["sdpa"]),
        ]
        row += [f"{record['computed_over_allowed']:.2f}", f"{rates['tiled']:.0f}", f"{rates['sdpa']:.0f}"]
        rows.append([*row, f"{record['rate_ratio']:.2f}"])
    return measure.markdown(header, rows)


def first_table(found: dict[str, Any]) -> str:
    """The Markdown table of first calls."""
    from cases import CASES

    rows = [
        (method, *(time_text(found[f"{key}_{state}_s"]) for state in ("empty", "filled")))
        for key, method in (("tiled", "tiled"), ("flex", "flex by hand: mask and kernel"))
    ]
    about = f"First call in a new process, {CASES[found['pattern']].title}, {length_text(found['length'])}, D 64:"
    return f"{about}\n\n" + measure.markdown(("method", "caches empty", "caches filled"), rows)


if __name__ == "__main__":
    if sys.argv[1] == "first":
        first_call(sys.argv[2], int(sys.argv[3]))
    else:
        all_lengths, all_dims = ([int(n) for n in part.split(",")] for part in sys.argv[3:5])
        child(sys.argv[2], all_lengths, all_dims, int(sys.argv[5]))
