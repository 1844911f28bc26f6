"""Writes the table of docs/gallery.md: what the library has by name, and what it says of each itself.

python docs/make_gallery.py            the page
python docs/make_gallery.py quest ...  rows, on the screen

Nothing in the table is claimed: lines are counted, backends and gradients are those that no backend refuses, caches are
what ``sd.cache_bound`` proves, and verdicts are the prover's. What is said by hand is which test compares a system with what, and
that file must name it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import sparsedsl as sd  # noqa: E402
from sparsedsl.backends.registry import BACKENDS  # noqa: E402
from sparsedsl.execute.requests import requests_of  # noqa: E402
from sparsedsl.program.effect_rules import LATER_QUERIES  # noqa: E402
from sparsedsl.runtime.request import CallFacts  # noqa: E402

PAGE = ROOT / "docs" / "gallery.md"
FROM, TO = "<!-- systems: made by docs/make_gallery.py -->\n", "<!-- end of systems -->"
LENGTH = 256
HEADS = 4
# Axes of inputs that only a call knows.
SIZES = {"index_heads": 4, "index_dim": 32, "retrieval_heads": 4, "retrieval_dim": 64, "gate_dim": 32, "width": 8}


@dataclass(frozen=True)
class Row:
    """A system: its title, the call of the library, the test that compares it and with what."""

    title: str
    call: str
    test: str
    beside: str

    @property
    def name(self) -> str:
        """The function of the library that the row is about."""
        return self.call.partition("(")[0]

    @functools.cached_property
    def pattern(self) -> Any:
        """What the call gives; scores as causal attention under them."""
        made = eval(self.call, {"sd": sd} | vars(sd.patterns))
        return sd.attend(sd.patterns.causal(), score=made) if isinstance(made, sd.Score) else made


def _row(title: str, call: str, test: str, beside: str) -> Row:
    return Row(title, call, f"tests/{test}.py", beside)


LOOPS, PAIRS, CODE = "a loop over queries", "a loop over pairs", "the published code"
DENSE, TOKENS = "a dense formula", "token by token"

ROWS = (
    _row("Sliding window", "sliding_window(512)", "patterns/test_local", PAIRS),
    _row("Dilated window", "dilated(64, 4)", "patterns/test_local", PAIRS),
    _row("Sparse Transformer, strided", "strided(64)", "patterns/test_local", PAIRS),
    _row("Sparse Transformer, fixed", "strided_fixed(64, summary=4)", "patterns/test_local", PAIRS),
    _row("Longformer", "longformer()", "patterns/test_models", PAIRS),
    _row("BigBird", "bigbird(causal=True)", "patterns/test_models", PAIRS),
    _row("StreamingLLM", "streaming_llm()", "patterns/test_models", PAIRS),
    _row("DuoAttention", "duo_attention()", "patterns/test_models", PAIRS),
    _row("Mistral", "mistral()", "patterns/test_models", PAIRS),
    _row("Gemma 2", "gemma2(0)", "patterns/test_models", PAIRS),
    _row("Gemma 3", "gemma3(0)", "patterns/test_models", PAIRS),
    _row("GPT-OSS", "gpt_oss(0)", "patterns/test_models", PAIRS),
    _row("Llama 4", "llama4(0)", "patterns/test_models", PAIRS),
    _row("T5", "t5(decoder=True)", "patterns/test_models", CODE),
    _row("Block diffusion", "block_diffusion(32)", "patterns/test_blocks", PAIRS),
    _row("Packed documents", "documents()", "patterns/test_documents", PAIRS),
    _row("Tree attention for drafts", "tree()", "patterns/test_documents", PAIRS),
    _row("Neighbourhood attention", "neighbourhood_2d(16, 16, 7)", "patterns/test_grids", PAIRS),
    _row("STA", "sliding_tile((16, 16), (12, 12), (4, 4))", "patterns/test_grids", PAIRS),
    _row("ALiBi", "alibi(4)", "patterns/test_scores", CODE),
    _row("KERPLE", "kerple()", "patterns/test_scores", PAIRS),
    _row("FIRE", "fire(8)", "patterns/test_scores", PAIRS),
    _row("SSMax", "ssmax()", "patterns/test_scores", PAIRS),
    _row("Forgetting attention (FoX)", "fox()", "patterns/test_scores", PAIRS),
    _row("MLA, absorbed", "mla()", "programs/test_named_systems", "the expanded form"),
    _row("Differential attention", "differential()", "programs/test_named_systems", LOOPS),
    _row("MoBA", "moba()", "programs/test_policies", LOOPS),
    _row("NSA over means", "nsa()", "programs/test_policies", LOOPS),
    _row("NSA as published", "nsa_published()", "patterns/test_indexed", LOOPS),
    _row("InfLLM v2", "infllm_v2()", "patterns/test_indexed", LOOPS),
    _row("DSA", "dsa(256)", "patterns/test_indexed", LOOPS),
    _row("HISA", "hisa(64, 8, 256)", "patterns/test_indexed", LOOPS),
    _row("CSA", "csa(4, 128)", "patterns/test_indexed", LOOPS),
    _row("HCA", "hca()", "patterns/test_indexed", LOOPS),
    _row("QSA", "qsa()", "patterns/test_indexed", LOOPS),
    _row("Quest", "quest()", "programs/test_named_systems", "golden values"),
    _row("HSA", "hsa()", "programs/test_hsa", LOOPS),
    _row("HSA-UltraLong", "hsa_ultralong()", "programs/test_named_systems", LOOPS),
    _row("Landmark attention", "landmark()", "programs/test_named_systems", LOOPS),
    _row("HiLS", "hils()", "programs/test_named_systems", LOOPS),
    _row("XAttention", "xattention()", "programs/test_named_systems", "golden values"),
    _row("SeerAttention", "seer_attention()", "programs/test_named_systems", "golden values"),
    _row("FlexPrefill", "flexprefill()", "programs/test_flexprefill", "golden values"),
    _row("MInference", "minference(100, 200)", "programs/test_key_choices", "golden values"),
    _row("PBS", "pbs()", "programs/test_pbs", LOOPS),
    _row("Token sparse attention", "token_sparse()", "programs/test_token_sparse", LOOPS),
    _row("MoSA", "mosa()", "programs/test_named_systems", LOOPS),
    _row("VSA", "vsa()", "programs/test_named_systems", "golden values"),
    _row("SnapKV", "snapkv(256)", "programs/test_named_systems", "golden values"),
    _row("H2O, once the prompt is over", "h2o()", "programs/test_named_systems", "golden values"),
    _row("What SnapKV and H2O attend to later", "retained(256)", "patterns/test_models", PAIRS),
    _row("Stick-breaking", "stick_breaking()", "patterns/test_normalisers", LOOPS),
    _row("Sigmoid attention", "sigmoid(causal(), 4096)", "patterns/test_normalisers", LOOPS),
    _row("HSTU", "hstu(causal(), 4096)", "patterns/test_normalisers", LOOPS),
    _row("Softpick", "softpick(causal())", "patterns/test_normalisers", LOOPS),
    _row("FLASH, squared ReLU", "relu_squared(causal())", "patterns/test_normalisers", LOOPS),
    _row("NHA", "nha()", "programs/test_nha", TOKENS),
    _row("Ring-linear", "ring_linear(sd.decay_table(4, layer=0, layers=20))", "programs/test_ring", TOKENS),
    _row("Lightning attention", "lightning(4, 0, 20)", "programs/test_named_systems", DENSE),
    _row("RetNet", "retnet(4)", "programs/test_named_systems", DENSE),
    _row("BASED", "based()", "programs/test_named_systems", DENSE),
    _row("GLA", "gla()", "programs/test_named_systems", TOKENS),
    _row("RWKV-6", "rwkv6()", "programs/test_published_formulas", PAIRS),
    _row("RWKV-7", "rwkv7()", "programs/test_published_formulas", TOKENS),
    _row("Mamba-2 (SSD)", "ssd()", "programs/test_named_systems", TOKENS),
    _row("DeltaNet", "delta_net()", "programs/test_named_systems", TOKENS),
    _row("Gated DeltaNet", "gated_delta()", "programs/test_named_systems", TOKENS),
    _row("KDA", "kda()", "programs/test_named_systems", TOKENS),
)

HEADER = ("system", "call", "lines", "backends", "trains", "decodes with", "causal", "compared with", "source")


def code_lines(function: FunctionType) -> int:
    """Lines of a function, and of the private ones of its module that it calls, without docstrings, blank lines and comments."""
    seen = {function}
    for other in seen:
        seen = seen | {
            found
            for name in other.__code__.co_names
            if name.startswith("_")
            and isinstance(found := other.__globals__.get(name), FunctionType)
            and found.__module__ == other.__module__
        }
    return sum(map(_own_lines, seen))


def _own_lines(function: FunctionType) -> int:
    source = inspect.getsource(inspect.unwrap(function))
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.FunctionDef)
    first = tree.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    inside = range(first.lineno, (first.end_lineno or first.lineno) + 1) if documented else ()
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and n not in inside for n, line in lines)


def runs_on(row: Row) -> list[str]:
    """Backends that find no reason against a call of it, on the device that each is for; ``reference``, which runs all, left out."""
    assert _runs(row, "reference", False), row.title
    return [name for name in BACKENDS if name != "reference" and _runs(row, name, False)]


def _runs(row: Row, backend: str, grad: bool) -> bool:
    """Whether it finds no reason against any piece of work of a call; nothing is compiled for it."""
    facts = CallFacts("cuda" if backend == "triton" else "cpu", "float32", 1, HEADS, HEADS, LENGTH, LENGTH, 64, 64, grad)
    does = BACKENDS[backend]
    asked = requests_of(sd.Program(row.pattern), facts, whole_tables=does.reads_whole_tables, sizes=SIZES)
    return all(does.refusal(request) is None for requests in asked.values() for request in requests)


def trains(row: Row, backends: list[str]) -> str:
    """Whether gradients may be asked for; on all of the backends but ``flex``, which has none on a CPU."""
    if LATER_QUERIES in sd.compile(row.pattern).effects:
        return "if meant"
    able = [name for name in backends if name != "flex" and _runs(row, name, True)]
    return "yes" if able == [name for name in backends if name != "flex"] else f"on {', '.join(able)}"


def cache(row: Row) -> str:
    """What later tokens need of earlier ones."""
    bound = sd.cache_bound(row.pattern)
    if bound.kind in ("state", "nothing"):
        return bound.kind
    if bound.kind == "grows":
        return f"all keys; a step reads {bound.step}" if bound.step else "all keys"
    said = str(bound).partition("; ")[0]
    return said.partition(": ")[2] or said


def source(row: Row) -> str:
    """Where it was published, as the docstring says."""
    found = re.search(r"(?:arXiv |arxiv\.org/abs/)(\d{4}\.\d{5})", inspect.getdoc(getattr(sd.patterns, row.name)) or "")
    if found:
        return f"[{found[1]}](https://arxiv.org/abs/{found[1]})"
    said = re.search(r"Source: (.+?)(?:\n\n|$)", inspect.getdoc(getattr(sd.patterns, row.name)) or "", re.S)
    return " ".join(said[1].split()).rstrip(".") if said else ""


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    backends = runs_on(row)
    return (
        row.title, f"`{row.call}`", str(code_lines(getattr(sd.patterns, row.name))), ", ".join(backends), trains(row, backends), cache(row),
        sd.cache_bound(row.pattern).causal.status, f"[{row.beside}](../{row.test})", source(row),
    )  # fmt: skip


def table() -> str:
    """The table as Markdown."""
    rows = [HEADER, ("---",) * len(HEADER), *map(cells, ROWS)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    """Write the page, or print some rows."""
    if sys.argv[1:]:
        for row in ROWS:
            if row.name in sys.argv[1:]:
                print(*cells(row), sep=" | ", flush=True)
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(FROM)
    PAGE.write_text(before + FROM + table() + TO + rest.partition(TO)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
