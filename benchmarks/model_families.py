"""What works with which family of transformers: native patterns in tiny random models against the models themselves.

    python benchmarks/model_families.py [names ..] [--columns greedy ..]   # results/model_families.json; takes minutes
    python benchmarks/model_families.py --page                     # the table of docs/models.md, from that file

Each cell compares the same call without and with patterns: logits of real tokens, or the tokens of a generation.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from measure import write_json  # noqa: E402

import sparsedsl as sd  # noqa: E402
from sparsedsl.models.layers import attention_layers, closed_layers, is_told_causal, text_config  # noqa: E402
from sparsedsl.models.native import native_pattern  # noqa: E402

# The tiny models are those of the tests, which are no package that others import.
families, more_families = (importlib.import_module(f"tests.models.{name}") for name in ("families", "more_families"))
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "model_families.json", ROOT / "docs" / "models.md"
LENGTH, NEW, SECONDS = 13, 8, 150  # of CPU time, for each family
SAME, NO_SUCH = "same", "none"
BUILDERS: dict[str, Callable[[], Any]] = {
    **{name: functools.partial(more_families.build, name) for name in more_families.NAMES},
    **{name: functools.partial(families.build, name) for name in families.FAMILIES},
}
ENCODERS = {*families.ENCODERS, *more_families.ENCODERS}


def ids() -> torch.Tensor:
    """Token ids whose end repeats their start, so that prompt lookup finds something."""
    return torch.cat([families.tokens(length=LENGTH - 4), families.tokens(length=4)], dim=1)


def padded(side: str) -> dict[str, torch.Tensor]:
    """A batch whose first row has four tokens of padding."""
    given, mask = ids(), torch.ones(2, LENGTH, dtype=torch.long)
    part = slice(0, 4) if side == "left" else slice(-4, None)
    given[0, part], mask[0, part] = 0, 0
    return {"input_ids": given, "attention_mask": mask}


def logits(model: Any, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**given).logits
    mask = given.get("attention_mask")
    return out if mask is None else out[mask.bool()]


def generated(model: Any, batch: int = 2, **how: Any) -> torch.Tensor:
    given = {name: value[:batch] for name, value in padded("left").items()} if batch == 2 else {"input_ids": ids()[:1]}
    out: torch.Tensor = model.generate(**given, max_new_tokens=NEW, do_sample=False, **how)
    return out


def chunks(model: Any) -> torch.Tensor:
    cache, start, parts = DynamicCache(config=model.config), 0, []
    for part in ids().split([9, 1, 3], dim=1):
        place = torch.arange(start, start + part.shape[1])[None].expand(2, -1)
        parts.append(logits(model, input_ids=part, position_ids=place, past_key_values=cache))
        start += part.shape[1]
    return torch.cat(parts, dim=1)


def graph(model: Any) -> torch.Tensor:
    torch._dynamo.reset()
    try:
        return logits(torch.compile(model, backend="eager", fullgraph=True), **padded("left"))
    finally:
        torch._dynamo.reset()


POSITIONS = torch.tensor([[*range(8), *range(LENGTH - 8)], [*range(3), *range(LENGTH - 3)]])
COLUMNS: dict[str, Callable[[Any], torch.Tensor]] = {
    "forward": lambda model: logits(model, input_ids=ids()),
    "left padding": lambda model: logits(model, **padded("left")),
    "right padding": lambda model: logits(model, **padded("right")),
    "packed": lambda model: logits(model, input_ids=ids(), position_ids=POSITIONS, use_cache=False),
    "greedy": generated,
    "static cache": lambda model: generated(model, cache_implementation="static"),
    "beams": lambda model: generated(model, num_beams=2),
    "prompt lookup": lambda model: generated(model, batch=1, prompt_lookup_num_tokens=3),
    "chunks": chunks,
    "graph": graph,
}
ENCODER_COLUMNS = ("forward", "left padding", "right padding", "graph")
SHOWN = (*list(COLUMNS)[:-1], "one layer", "restore", "graph")


def patterns_of(model: Any) -> tuple[dict[int, Any], str]:
    """The native patterns of those layers that have one, and why others have none."""
    config, found, why = text_config(model), {}, ""
    layers, told = attention_layers(model), is_told_causal(model, config)
    for index, module in layers.items():
        try:
            found[index] = native_pattern(module, index, config, told)
        except sd.UnsupportedError as error:
            why = str(error)
    return found, why or ("its own forward does not call the attention interface" if closed_layers(model) else "")


def differs(got: torch.Tensor, wanted: torch.Tensor) -> str:
    """SAME, or by how much."""
    if got.dtype == torch.long:
        return SAME if torch.equal(got, wanted) else "other tokens"
    error = float((got - wanted).abs().max())
    return SAME if error <= 1e-4 * max(1.0, float(wanted.abs().max())) else f"off by {error:.1g}"


def attempt(call: Callable[[Any], torch.Tensor], model: Any) -> torch.Tensor | str:
    """What a call gives, or the first words of its error."""
    try:
        return call(model)
    except Exception as error:  # a family fails in whatever way it does
        found = re.search(r"UnsupportedError\(\[?.*?[\"'](.+)", str(error), re.DOTALL)
        text = re.split(r"[\"']\)", found[1])[0] if found else str(error)  # (dynamo's message holds the repr of ours)
        kind = "refused" if isinstance(error, sd.UnsupportedError) or found else type(error).__name__
        return f"{kind}: {' '.join(text.split())[:160]}"


def row_of(name: str, chosen: list[str]) -> dict[str, str]:
    """One family: column -> SAME, NO_SUCH where transformers itself does not do it, a refusal or a difference."""
    model = BUILDERS[name]()
    try:
        patterns, why = patterns_of(model)
    except sd.UnsupportedError as error:
        return {"layers": "none", "why": str(error)}
    if not patterns:
        return {"layers": "none", "why": why}
    possible = ENCODER_COLUMNS if name in ENCODERS else tuple(COLUMNS)
    columns = {column: call for column, call in COLUMNS.items() if column in possible and column in chosen}
    wanted = {name: attempt(call, model) for name, call in columns.items()}
    row = {"layers": "all" if not why else ", ".join(map(str, patterns)), **({"why": why} if why else {})}
    with sd.models.apply(model, patterns, backend="reference"):
        for column, call in columns.items():
            right = wanted[column]
            got = NO_SUCH if isinstance(right, str) else attempt(call, model)
            row[column] = got if isinstance(got, str) else differs(got, right)  # type: ignore[arg-type]
    forward = wanted.get("forward")
    if isinstance(forward, torch.Tensor):
        index = max(patterns)
        with sd.models.apply(model, {index: patterns[index]}, backend="reference"):
            one = attempt(COLUMNS["forward"], model)
        row["one layer"] = one if isinstance(one, str) else differs(one, forward)
        row["restore"] = SAME if torch.equal(COLUMNS["forward"](model), forward) else "other bits"
    return row


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside what takes more CPU time than this; what other programs take meanwhile does not count."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds:g} s of CPU time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def measure(names: list[str], columns: list[str], results: Path = RESULTS) -> None:
    """Add rows to the file; a family that this transformers or these sizes do not make is left out."""
    rows = {row["family"]: row for row in read(results)["records"]} if results.exists() else {}
    for name in names:
        try:
            with at_most(SECONDS):
                row = row_of(name, columns)
        except Exception as error:
            print(f"{name}: left out, {type(error).__name__}: {str(error)[:100]}", flush=True)
            continue
        rows[name] = {"family": name, **rows.get(name, {}), **row}
        print(name, {column: value for column, value in row.items() if value != SAME}, flush=True)
        records = [rows[family] for family in sorted(rows)]
        write_json(results, {"transformers": transformers.__version__, "torch": torch.__version__, "records": records})


def read(results: Path) -> dict[str, Any]:
    """What was measured."""
    known: dict[str, Any] = json.loads(results.read_text())
    return known


def table(rows: list[dict[str, str]]) -> str:
    """The table and the reasons below it, in Markdown."""
    reasons: dict[str, int] = {}

    def cell(value: str | None) -> str:
        if value in (None, NO_SUCH):
            return "" if value is None else "-"
        if value == SAME:
            return "yes"
        text = re.sub(r" \(\d+(, \d+)+\)", "", re.sub(r"^refused: ", "", str(value)))
        text = re.sub(r"\blayers? \d[\d, ]*(?<=\d)( \(\w+\))?", "a layer", re.split(r"(?<=[a-z])[.;:] ", text)[0])
        number = reasons.setdefault(text, len(reasons) + 1)
        return f"[{number}]" if str(value).startswith("refused") else f"**{number}**"

    lines = [f"| family | layers | {' | '.join(SHOWN)} |", f"|---|---|{'---|' * len(SHOWN)}"]
    for row in rows:
        if row["layers"] != "none":
            why = f" {cell('refused: ' + row['why'])}" if "why" in row else ""
            lines.append(f"| {row['family']} | {row['layers']}{why} | {' | '.join(cell(row.get(column)) for column in SHOWN)} |")
    none: dict[str, list[str]] = {}
    for row in rows:
        if row["layers"] == "none":
            none.setdefault(cell("refused: " + re.sub(r"^\w+ (is|has) ", r"it \1 ", row["why"])), []).append(row["family"])
    refused = [f"- {number}: {', '.join(names)}" for number, names in none.items()]
    notes = [f"{number}. {text}" for text, number in reasons.items()]
    return "\n".join(
        [
            *lines,
            "",
            "No layer has a native pattern (a pattern of your own may run, where the layer calls the interface):",
            "",
            *refused,
            "",
            *notes,
        ]
    )


def write_page(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Put the table between the two marks of the page."""
    known, text = read(results), page.read_text()
    before, _, rest = text.partition("<!-- families -->\n")
    after = rest.partition("<!-- /families -->")[2]
    count = sum(row["layers"] != "none" for row in known["records"])
    head = f"{count} families of transformers {known['transformers']}, torch {known['torch']} (`model_families.json`).\n\n"
    page.write_text(f"{before}<!-- families -->\n{head}{table(known['records'])}\n<!-- /families -->{after}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families; all where none is named")
    parser.add_argument(
        "--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS), help="only these; others are kept as they are"
    )
    parser.add_argument("--page", action="store_true", help="write the table of docs/models.md")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if given.page:
        write_page()
    else:
        measure(given.names or sorted(BUILDERS), given.columns)
