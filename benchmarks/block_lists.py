"""Block lists: sparsedsl against torch's ``create_block_mask``, eager and compiled; time and memory by pattern and length.

    python benchmarks/block_lists.py                 # everything, about 15 minutes on two cores
    python benchmarks/block_lists.py --quick         # about a minute

Every pattern and length runs in a process of its own, so that "first" means what it says. What is measured:

- *first*: declare the pattern and make its lists once, nothing remembered; imports are done.
- *lists*: make the lists again (:func:`sparsedsl.analysis.tiles.classify`, which remembers the symbolic analysis and no lists).
- *BlockMask*: ``sd.compile(pattern).block_mask(...)`` with a new ``Attention`` every time: lists, padded and by key as well, as
  gradients need them; the same object that ``create_block_mask`` makes.
- *compiled*, *eager*: ``torch.compile(create_block_mask)(...)`` after its first call, and ``create_block_mask(...)``.
- *peak*: growth of resident memory at its highest during one call, what is returned included. *held*: bytes of the lists.

Medians; the methods take turns within a process. ``create_block_mask`` is run under a memory limit and given up where the
length before was out of memory, or where it would take more than ``--limit-s``, as its time grows with the square of the length.
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
from measure import MIB, bytes_text, length_text, median, time_text
from tqdm import tqdm

PATTERNS = ("window", "sinks", "dilated", "documents", "chunked", "per_head", "documents_window")
LENGTHS = tuple(2**n for n in (12, 14, 15, 16, 18, 20, 22, 24))
BLOCK = 128
METHODS = ("compiled", "eager")
# Targets: length -> seconds once analysed, seconds the first time, bytes held.
TARGETS: dict[int, tuple[float, float | None, int]] = {
    2**20: (0.020, 1.0, 4 * MIB),
    2**24: (0.5, None, 64 * MIB),
}


# ---- one pattern at one length, in a process of its own ----------------------------------------------------


def child(name: str, length: int, methods: list[str], rounds: int, memory_gib: float) -> None:
    """Measure, and print what was found as one JSON object a line, so that a violent end loses only what came after."""
    import torch
    from cases import CASES
    from torch.nn.attention.flex_attention import create_block_mask

    import sparsedsl as sd
    from sparsedsl.analysis.domain import Domain
    from sparsedsl.analysis.tiles import classify
    from sparsedsl.lang.pattern import as_pattern

    case = CASES[name]
    tables: dict[str, Any] = dict(case.tables(length))
    domain = Domain(length, length, 0, 1, case.heads, tables)
    limit = measure.limit_memory(int(memory_gib * 2**30))

    def first() -> Any:
        return classify(as_pattern(case.declare()).mask.expr, domain, (BLOCK, BLOCK))

    ours: dict[str, Any] = {"first_s": measure.seconds(first)}
    expr = as_pattern(case.declare()).mask.expr

    def lists() -> Any:
        return classify(expr, domain, (BLOCK, BLOCK))

    def block_mask() -> Any:
        return sd.compile(case.declare()).block_mask(length, length, heads=case.heads, block_size=BLOCK, **tables)

    made = lists()
    ours |= {"held_bytes": made.nbytes, "full": made.full.total, "partial": made.partial.total}
    ours["lists_peak_bytes"] = measure.peak_bytes(lists)
    actions: dict[str, Callable[[], Any]] = {"lists": lists}
    ours["block_mask"] = _first_and_peak("block_mask", block_mask, actions, limit)
    found = measure.alternate(actions, rounds)
    ours["lists_s"], ours["lists_best_s"] = median(found["lists"]), min(found["lists"])
    if "block_mask" in found:
        ours["block_mask"] |= {"again_s": median(found["block_mask"])}
    _say(memory_limit_bytes=limit, ours=ours)

    mask_mod = case.mask_mod(tables)
    heads = case.heads if case.heads > 1 else None
    makers = {"eager": create_block_mask, "compiled": torch.compile(create_block_mask)}
    theirs: dict[str, dict[str, Any]] = {}
    for method in methods:

        def make(maker: Any = makers[method]) -> Any:
            return maker(mask_mod, None, heads, length, length, device="cpu", BLOCK_SIZE=BLOCK)

        theirs[method] = _first_and_peak(method, make, actions, limit)
    if not any(method in actions for method in methods):
        _say(**theirs)
        return
    found = measure.alternate(actions, rounds, limit_s=20)
    for method in methods:
        if method in found:
            theirs[method] |= {"again_s": median(found[method]), "rounds": len(found[method])}
    _say(
        **theirs,
        paired={key: median(found[key]) for key in ("lists", "block_mask") if key in found},
        same_tiles={method: _same_tiles(actions[method](), made) for method in methods if method in actions},
    )


def _first_and_peak(name: str, make: Callable[[], Any], actions: dict[str, Callable[[], Any]], limit: int) -> dict[str, Any]:
    """First call and peak memory; a method that lives through both joins the actions that are repeated."""
    try:
        result = {"status": "measured", "first_s": measure.seconds(make), "peak_bytes": measure.peak_bytes(make)}
    except Exception as error:
        if not measure.is_out_of_memory(error):
            raise
        return {"status": f"out of memory (limit {bytes_text(limit)})"}
    actions[name] = make
    return result


def _same_tiles(mask: Any, lists: Any) -> bool:
    """Whether a BlockMask of torch lists exactly our tiles, each as what it is.

    True is expected where blocks divide the length: torch calls ragged last tiles partial even if nothing in them is masked.
    """
    import torch

    theirs = torch.zeros(lists.shape, dtype=torch.int8)
    for value, counts, columns in (
        (1, mask.kv_num_blocks, mask.kv_indices),
        (2, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        listed = torch.arange(columns.shape[-1]) < counts[..., None]
        batch, head, row, place = listed.nonzero(as_tuple=True)
        theirs[batch, head, row, columns[batch, head, row, place].long()] = value
    return bool(torch.equal(theirs, lists.classes()))


def _say(**found: Any) -> None:
    print(json.dumps(found), flush=True)


# ---- all of them -------------------------------------------------------------------------------------------


def why_not(before: dict[str, Any] | None, times: float, limit_s: float) -> str | None:
    """Why a method is not tried at ``times`` the tokens of the run ``before``, or None if it is."""
    if before is None:
        return None
    if before["status"] != "measured":
        return "not measured: " + before["status"].removeprefix("not measured: ")
    expected = before["again_s"] * times**2
    if expected > limit_s:
        return f"not measured: too slow (about {time_text(expected)} by S²)"
    return None


def measure_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record a pattern and length."""
    records = []
    progress = tqdm(total=len(options.patterns) * len(options.lengths), desc="block lists", unit="case")
    with tempfile.TemporaryDirectory(prefix="block-lists-") as cache:
        for name in options.patterns:
            before: dict[str, tuple[int, dict[str, Any]]] = {}
            for length in options.lengths:
                progress.set_postfix_str(f"{name} {length_text(length)}")
                record: dict[str, Any] = {"pattern": name, "length": length, "block": BLOCK, "load_average": measure.load()}
                reasons = {}
                for method in METHODS:
                    last = before.get(method)
                    reasons[method] = last and why_not(last[1], length / last[0], options.limit_s)
                    if options.no_torch:
                        reasons[method] = "not measured: --no-torch"
                wanted = [method for method in METHODS if not reasons[method]]
                arguments = [__file__, "--child", name, str(length), ",".join(wanted), str(options.rounds)]
                # Compiled code of earlier runs of this benchmark must not make the first call look quick.
                env = {} if options.keep_cache else {"TORCHINDUCTOR_CACHE_DIR": cache}
                found, death = measure.run_child([*arguments, str(options.memory_gib)], env)
                if "ours" not in found:
                    raise RuntimeError(f"{name} at {length} tokens: {death}")
                record |= found
                for method in METHODS:
                    if reasons[method]:
                        record[method] = {"status": reasons[method]}
                    elif found.get(method, {}).get("status") is None:
                        record[method] = {"status": f"not measured: {death}"}
                    if not reasons[method]:
                        before[method] = (length, record[method])
                records.append(record)
                progress.update()
    progress.close()
    return records


def checks(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every target with what was measured for it."""
    found = []
    for record in records:
        if record["length"] not in TARGETS:
            continue
        again, first, held = TARGETS[record["length"]]
        ours = record["ours"]
        for what, got, limit in (
            ("seconds once analysed", ours["lists_s"], again),
            ("seconds the first time", ours["first_s"], first),
            ("bytes held by the lists", ours["held_bytes"], held),
            ("bytes at the peak", ours["lists_peak_bytes"], held),
        ):
            if limit is not None:
                target = {"pattern": record["pattern"], "length": record["length"], "what": what}
                found.append(target | {"got": got, "limit": limit, "pass": got < limit})
    return found


def table(records: list[dict[str, Any]]) -> str:
    """The Markdown table of times and peaks."""
    from cases import CASES

    header = ["pattern", "tokens", "first", "lists", "peak", "held", "BlockMask", "peak"]
    header += ["torch compiled", "peak", "torch eager", "peak", "compiled / BlockMask"]
    rows = []
    for record in records:
        ours = record["ours"]
        row = [CASES[record["pattern"]].title, length_text(record["length"])]
        row += [time_text(ours["first_s"]), time_text(ours["lists_s"])]
        row += [bytes_text(ours["lists_peak_bytes"]), bytes_text(ours["held_bytes"])]
        for result in (ours["block_mask"], record["compiled"], record["eager"]):
            row += _cells(result)
        paired = record.get("paired", {}).get("block_mask")
        compiled = record["compiled"].get("again_s")
        row.append(f"{compiled / paired:.3g}x" if paired and compiled else "")
        rows.append(row)
    return measure.markdown(header, rows)


def _cells(result: dict[str, Any]) -> list[str]:
    """Time and peak of one maker of BlockMasks, or in short why there are none."""
    if "again_s" in result:
        return [time_text(result["again_s"]), bytes_text(result["peak_bytes"])]
    return ["out of memory" if result["status"].startswith("out of memory") else "not measured", ""]


def options_from(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="three patterns, four lengths, few rounds: a minute or two")
    add("--patterns", nargs="+", choices=PATTERNS, help="default: all")
    add("--lengths", nargs="+", type=int, metavar="TOKENS", help="default: 4K to 16M")
    add("--rounds", type=int, help="repetitions behind each median (default 9, quick 5)")
    add("--limit-s", type=float, help="torch is given up where it would take longer (default 10, quick 2)")
    add("--memory-gib", type=float, default=12, help="memory that a process may take (default 12)")
    add("--keep-cache", action="store_true", help="use torch's compile cache: its first calls say nothing then")
    add("--no-torch", action="store_true", help="measure ours alone")
    add("--out", type=Path, help="JSON file (default: benchmarks/results/block_lists_<machine>.json)")
    options = parser.parse_args(arguments)
    options.patterns = options.patterns or (("window", "sinks", "documents_window") if options.quick else PATTERNS)
    options.lengths = sorted(options.lengths or ((2**12, 2**15, 2**20, 2**24) if options.quick else LENGTHS))
    options.rounds = options.rounds or (5 if options.quick else 9)
    options.limit_s = options.limit_s or (2 if options.quick else 10)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the results, print the table and how the targets were met; 0 however they were met."""
    options = options_from(arguments)
    facts = measure.machine()
    records = measure_all(options)
    targets = checks(records)
    facts["load_average_end"] = measure.load()
    path = options.out or measure.result_path("block_lists", facts)
    settings = {key: getattr(options, key) for key in ("quick", "rounds", "limit_s", "memory_gib", "no_torch", "keep_cache")}
    content = {"benchmark": "block_lists", "machine": facts, "settings": settings}
    measure.write_json(path, content | {"records": records, "targets": targets})
    print(f"Block lists, blocks of {BLOCK}. {measure.describe(facts)}\n")
    print(table(records))
    print()
    for target in targets:
        text = time_text if target["what"].startswith("seconds") else bytes_text
        verdict = "pass" if target["pass"] else "MISS"
        where = f"{target['pattern']}, {length_text(target['length'])}: {target['what']}"
        print(f"{verdict}: {where}: {text(target['got'])}, target below {text(target['limit'])}")
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        name, length, methods, rounds, memory = sys.argv[2:]
        child(name, int(length), [m for m in methods.split(",") if m], int(rounds), float(memory))
    else:
        sys.exit(main())
