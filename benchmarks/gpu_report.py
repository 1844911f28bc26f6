"""What ``gpu.py`` says about its numbers: goals, Markdown tables, the roofline picture. From the JSON alone; loads no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import measure
from measure import length_text
from systems_claims import claims_text

__all__ = ["METHODS", "picture", "tables", "targets", "write_beside"]

METHODS = ("ours", "flex", "flex_tma", "sdpa_flash", "sdpa_cudnn")
TITLES = {"ours": "ours", "flex": "flex", "flex_tma": "flex TMA", "sdpa_flash": "SDPA flash", "sdpa_cudnn": "SDPA cuDNN"}
DENSE = ("sdpa_flash", "sdpa_cudnn")
PASSES = ("forward", "backward")
# Floating-point operations for each pair and entry of a head.
OPERATIONS = {"forward": 4, "backward": 10}
# Goals.
SPEEDUP, DENSE_RATE, BLOCKS_RATE = 1.3, 0.85, 0.85

Record = Mapping[str, Any]


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _right(record: Record, method: str, which: str) -> Mapping[str, Any] | None:
    """Times of a method in a pass, if it was measured and its results were right."""
    found = record["methods"].get(method, {})
    return found.get(which) if found.get("right") else None


def rate(record: Record, method: str, which: str, pairs: str = "allowed_pairs") -> float | None:
    """FLOP/s on the allowed pairs, or on those of the listed tiles (``"tile_pairs"``)."""
    times = _right(record, method, which)
    return None if times is None else OPERATIONS[which] * record["job"]["head_dim"] * record[pairs] / times["s"]


def _over_ours(record: Record, which: str, methods: Sequence[str]) -> float | None:
    """How many times as long as ours the fastest right one of these took."""
    if _right(record, "ours", which) is None:
        return None
    ratios = record.get(f"{which}_over_ours", {})
    found = [ratios[method] for method in methods if method in ratios and _right(record, method, which) is not None]
    return min(found) if found else None


def _of_kind(content: Mapping[str, Any], kind: str) -> Iterator[Record]:
    return (record for record in content["records"] if record["job"]["kind"] == kind)


# ---- goals -----------------------------------------------------------------------------------------------------------


def targets(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The goals with what was measured for them; a goal without a measurement is not there."""
    attention, found = list(_of_kind(content, "attention")), []
    for which in PASSES:
        for methods, words in ((("flex", "flex_tma"), "the better of flex and flex TMA"), (("flex",), "flex")):
            ratios = [ratio for record in attention if (ratio := _over_ours(record, which, methods)) is not None]
            if ratios:
                what = f"{which}, {words} / ours, geometric mean of {len(ratios)}"
                found.append(measure.target(what, measure.geometric_mean(ratios), at_least=SPEEDUP))
    for record in attention:
        ratio = _over_ours(record, "forward", DENSE)
        if record["job"]["pattern"] == "causal" and ratio is not None:
            found.append(measure.target(f"forward, our rate / the best dense rate, {_where(record)}", ratio, at_least=DENSE_RATE))
    for record in attention:
        dense = _same_size(attention, record["job"], "full")
        ours = rate(record, "ours", "forward")
        our_dense = None if dense is None else rate(dense, "ours", "forward")
        if record["job"]["pattern"] == "blocks10" and ours is not None and our_dense is not None:
            what = f"forward, our rate on 128-blocks at 10 % / our dense rate, {_where(record)}"
            found.append(measure.target(what, ours / our_dense, at_least=BLOCKS_RATE))
    for record in _of_kind(content, "decode"):
        ratio = _over_ours(record, "forward", ("flex", *DENSE))
        if ratio is not None:
            what = f"decode, the best other / ours, {record['job']['pattern']}, {_where(record)}"
            found.append(measure.target(what, ratio, at_least=1.0))
    return found


def _same_size(records: Sequence[Record], job: Mapping[str, Any], pattern: str) -> Record | None:
    wanted = {**job, "pattern": pattern, "tma": None}
    return next((record for record in records if {**record["job"], "tma": None} == wanted), None)


def _where(record: Record) -> str:
    job = record["job"]
    return f"D {job['head_dim']}, {length_text(job['length'])}, {job['heads']}:{job['kv_heads']} heads"


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(content: Mapping[str, Any]) -> str:
    """Everything in Markdown."""
    facts, ceilings = content["machine"], content["ceilings"]
    parts = [f"# Attention on {facts.get('device', 'an unknown device')}", _about(facts, content)]
    if ceilings is not None:
        product, copy = ceilings["product_flop_s"] / 1e12, ceilings["copy_bytes_s"] / 1e12
        size = ceilings["product_size"]
        parts.append(f"Measured ceilings: bf16 product of {size} cubed {product:.3g} TFLOP/s, copy {copy:.3g} TB/s.")
    for which in PASSES:
        parts += [f"## {which.capitalize()}", _pass_table(content, which)]
    parts += [
        "## Decode",
        _decode_table(content),
        "## Systems",
        _systems_table(content),
        "## Goals",
        _goals(content),
        "## Not measured",
        _absent(content),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(facts: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    names = ("date", "commit", "driver", "cuda", "cudnn", "torch", "triton", "python", "cpu", "cores")
    said = ", ".join(f"{name} {facts[name]}" for name in names if name in facts)
    settings = content["settings"]
    tuned = "measured choices" if settings["tune"] else "built-in choices"
    return (
        f"{said}. Ours: `{settings['ours']}`, {tuned}. Times in ms, medians, forward of training; `x / ours` above 1 is in our favour. "
        "TFLOP/s on allowed pairs (in listed tiles of 128 x 128)."
    )


def _pass_table(content: Mapping[str, Any], which: str) -> str:
    header = ["pattern", "D", "tokens", "heads", *(TITLES[method] for method in METHODS)]
    header += ["flex / ours", "dense / ours", "ours TFLOP/s", "flex TFLOP/s", "largest error ours", "of allowed"]
    rows = []
    for record in _of_kind(content, "attention"):
        job = record["job"]
        row = [job["pattern"], str(job["head_dim"]), length_text(job["length"]), f"{job['heads']}:{job['kv_heads']}"]
        row += [_time(record, method, which) for method in METHODS]
        row += [_ratio(_over_ours(record, which, methods)) for methods in (("flex", "flex_tma"), DENSE)]
        row += [_rates(record, method, which) for method in ("ours", "flex")]
        rows.append([*row, *_error(record, "ours", which)])
    return measure.markdown(header, rows) if rows else ""


def _decode_table(content: Mapping[str, Any]) -> str:
    header = ["pattern", "keys", "batch", "heads", *(TITLES[method] for method in METHODS), "best other / ours"]
    header += ["ours TB/s", "host ours", "host flex", "largest error ours", "of allowed"]
    rows = []
    for record in _of_kind(content, "decode"):
        job, ours, flex = record["job"], _right(record, "ours", "forward"), _right(record, "flex", "forward")
        row = [job["pattern"], length_text(job["length"]), str(job["batch"]), f"{job['heads']}:{job['kv_heads']}"]
        row += [_time(record, method, "forward") for method in METHODS]
        row.append(_ratio(_over_ours(record, "forward", METHODS[1:])))
        # What must be read: the keys and values that some query may see.
        read = record["least_bytes"]["forward"] * record["density"]
        row.append("" if ours is None else f"{read / ours['s'] / 1e12:.2f}")
        row += ["" if times is None else f"{times['host_s'] * 1e3:.3g}" for times in (ours, flex)]
        rows.append([*row, *_error(record, "ours", "forward")])
    return measure.markdown(header, rows) if rows else ""


def _systems_table(content: Mapping[str, Any]) -> str:
    """Systems against dense attention, and what their papers say."""
    header = [
        "system",
        "tokens",
        "heads",
        "density",
        "choosing",
        "moving",
        "attending",
        "ours",
        "flex",
        "SDPA flash",
        "SDPA cuDNN",
    ]
    header += ["flex / ours", "dense / ours", "fwd + bwd ours", "dense / ours, fwd + bwd", "largest error", "of allowed"]
    rows, seen = [], []
    for record in _of_kind(content, "system"):
        job, total = record["job"], sum(record["parts"].values())
        row = [job["pattern"], length_text(job["length"]), f"{job['heads']}:{job['kv_heads']}"]
        row.append("" if record["density"] is None else f"{record['density']:.3f}")
        row += [f"{record['parts'][kind] / total:.0%}" for kind in ("choosing", "moving", "attending")]
        row += [_time(record, method, "forward") for method in METHODS if method != "flex_tma"]
        row += [_ratio(_over_ours(record, "forward", methods)) for methods in (("flex",), DENSE)]
        both, dense = _both_passes(record, ("ours",)), _both_passes(record, DENSE)
        row += ["" if both is None else f"{both * 1e3:.3g}", _ratio(None if both is None or dense is None else dense / both)]
        rows.append([*row, *_error(record, "ours", "forward")])
        times, dense_forward = _right(record, "ours", "forward"), _over_ours(record, "forward", DENSE)
        if times is not None and dense_forward is not None:
            seconds = {"ours": times["s"], "sdpa": times["s"] * dense_forward}
            seen.append(
                {**record, "system": job["pattern"], "length": job["length"], "seconds": seconds, "sdpa_over_ours": dense_forward}
            )
    return "\n\n".join([measure.markdown(header, rows), claims_text(seen)]) if rows else ""


def _both_passes(record: Record, methods: Sequence[str]) -> float | None:
    """Seconds of forward and backward, of the fastest of these."""
    found = []
    for method in methods:
        passes = [_right(record, method, which) for which in PASSES]
        found += [sum(one["s"] for one in passes if one)] if all(passes) else []
    return min(found) if found else None


def _time(record: Record, method: str, which: str) -> str:
    found = record["methods"].get(method, {"status": "not tried"})
    if which not in found:
        return "-" if found["status"] in ("not available", "measured") else str(found["status"])
    return f"{found[which]['s'] * 1e3:.3g}" + ("" if found["right"] else " WRONG")


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _rates(record: Record, method: str, which: str) -> str:
    allowed, listed = (rate(record, method, which, pairs) for pairs in ("allowed_pairs", "tile_pairs"))
    return "" if allowed is None or listed is None else f"{allowed / 1e12:.3g} ({listed / 1e12:.3g})"


def _error(record: Record, method: str, which: str) -> list[str]:
    """The largest error of a pass, and the share of what is allowed in the worst row."""
    names = ("out",) if which == "forward" else ("dq", "dk", "dv")
    errors = record["methods"].get(method, {}).get("errors", {})
    found = [errors[name] for name in names if name in errors]
    if not found:
        return ["", ""]
    worst = max(found, key=lambda error: float(error["of_allowed"]))
    return [f"{max(error['largest'] for error in found):.1e}", f"{float(worst['of_allowed']):.2f}"]


def _goals(content: Mapping[str, Any]) -> str:
    return "\n".join(f"- {line}" for line in measure.verdicts(content["targets"]).splitlines()) or "None could be judged."


def _absent(content: Mapping[str, Any]) -> str:
    """Every method and job without numbers, and why; jobs with the same reason on one line."""
    reasons: dict[str, list[str]] = {}
    for record in content["records"]:
        job = record["job"]
        name = f"{job['kind']} {job['pattern']} {length_text(job['length'])} D{job['head_dim']} {job['heads']}:{job['kv_heads']}"
        for method, found in record["methods"].items():
            if found["status"] != "measured":
                reasons.setdefault(f"{TITLES[method]}: {found['status']}: {found['why']}", []).append(name)
            elif not found["right"]:
                reasons.setdefault(f"{TITLES[method]}: WRONG results, times not used", []).append(name)
            if "no_backward" in found:
                reasons.setdefault(f"{TITLES[method]}, backward: {found['no_backward']}", []).append(name)
    for entry in content["lost"]:
        reasons.setdefault(f"lost: {entry['why']}", []).append(_job_name(entry["job"]))
    for key, reason in (("dropped", "left out for lack of time"), ("waiting", "not reached: the run was ended")):
        for job in content[key]:
            reasons.setdefault(reason, []).append(_job_name(job))
    lines = [
        f"- {reason} ({len(names)}: {', '.join(names[:4])}{', ...' * (len(names) > 4)})" for reason, names in reasons.items()
    ]
    return "\n".join(lines) or "Everything was."


def _job_name(job: Mapping[str, Any]) -> str:
    return f"{job['kind']} {job['pattern']} {length_text(job['length'])} D{job['head_dim']} {job['heads']}:{job['kv_heads']}"


# ---- picture ---------------------------------------------------------------------------------------------------------

MARKS = {"ours": ("o", "tab:blue"), "flex": ("s", "tab:orange"), "flex_tma": ("D", "tab:brown"), "sdpa_flash": ("^", "tab:green"),
         "sdpa_cudnn": ("v", "tab:red")}  # fmt: skip


def picture(content: Mapping[str, Any], path: Path) -> None:
    """The roofline: useful FLOP/s over FLOP for each byte that must move, under the measured ceilings."""
    from matplotlib.figure import Figure

    ceilings = content["ceilings"]
    top, slope = ceilings["product_flop_s"] / 1e12, ceilings["copy_bytes_s"] / 1e12
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    for axes, which in zip(figure.subplots(1, 2, sharey=True), PASSES, strict=True):
        counted = (record for record in content["records"] if record["job"]["kind"] != "system")
        spots = [spot for record in counted for spot in _spots(record, which)]
        reach = [x for x, _, _, _ in spots] or [1.0]
        low, high = min([*reach, top / slope]) / 3, max([*reach, top / slope]) * 3
        axes.plot([low, top / slope, high], [low * slope, top, top], color="black", linewidth=1)
        axes.text(high, top * 1.04, f"bf16 product {top:.3g} TFLOP/s", ha="right", va="bottom", fontsize=8)
        axes.text(low * 1.05, low * slope * 1.6, f"copy {slope:.3g} TB/s", fontsize=8)
        for method, (marker, colour) in MARKS.items():
            own = [(x, y) for x, y, name, _ in spots if name == method]
            if own:
                axes.scatter(*zip(*own, strict=True), marker=marker, s=22, alpha=0.6, color=colour, label=TITLES[method])
        named = set()
        for x, y, method, label in spots:
            if method == "ours" and label not in named:
                named.add(label)
                axes.annotate(label, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axes.set(xscale="log", yscale="log", xlabel="useful FLOP for each byte that must move", title=which)
        axes.grid(True, which="major", alpha=0.3)
        if spots:
            axes.legend(fontsize=8, loc="lower right")
    figure.axes[0].set_ylabel("TFLOP/s on allowed pairs")
    figure.suptitle(f"{content['machine'].get('device', 'unknown device')}, bf16, {content['machine'].get('date', '')}")
    figure.savefig(path, dpi=130)


def _spots(record: Record, which: str) -> Iterator[tuple[float, float, str, str]]:
    """FLOP a byte, TFLOP/s, method and a label of every right measurement of a pass."""
    job = record["job"]
    flop = OPERATIONS[which] * job["head_dim"] * record["allowed_pairs"]
    read = record["least_bytes"][which] * (record["density"] if job["kind"] == "decode" else 1)
    for method in METHODS:
        found = rate(record, method, which)
        if found is not None and found > 0:
            yield flop / read, found / 1e12, method, f"{'decode ' * (job['kind'] == 'decode')}{job['pattern']}"


def write_beside(path: Path) -> str:
    """Write table and picture beside a JSON file of ``gpu.py``; the table, and what was written."""
    content = json.loads(path.read_text())
    text = tables(content)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    said = f"{text}\nwritten to {path} and {path.with_suffix('.md').name}"
    if content["ceilings"] is None:
        return said + "; no picture: the ceilings were not measured"
    try:
        picture(content, path.with_suffix(".png"))
    except ImportError as error:
        return f"{said}; no picture: {error}; python benchmarks/gpu.py --picture {path} makes it where matplotlib is installed"
    return f"{said} and {path.with_suffix('.png').name}"
