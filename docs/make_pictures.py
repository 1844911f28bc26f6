"""Draws the gallery: docs/pictures/*.png and docs/patterns.md, from the library's own docstrings; and the tables of docs/programs.md.

python docs/make_pictures.py              the gallery, all of it
python docs/make_pictures.py causal ...   these pictures, and the pages
python docs/make_pictures.py --page       the pages only
python docs/make_pictures.py --figures    what README.md and the tutorial draw, into docs/figures
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / ".ci")]

import torch  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap, PowerNorm  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image  # noqa: E402

import pages  # noqa: E402
import sparsedsl as sd  # noqa: E402
from sparsedsl.lang.evaluation import evaluate  # noqa: E402
from sparsedsl.picture_style import LIGHT  # noqa: E402
from sparsedsl.program.kinds import kinds_table  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
PAGE = ROOT / "docs" / "patterns.md"
MANUAL = ROOT / "docs" / "programs.md"
KINDS_FROM, KINDS_TO = "<!-- kinds: made by docs/make_pictures.py -->\n", "<!-- end of kinds -->"
FIGURES = ROOT / "docs" / "figures"
DRAWN_BY_PAGES = {"first_pattern": ("README.md", "pattern.png"), "window_and_sinks": ("docs/tutorial.md", "window_and_sinks.png")}
P = sd.patterns
PAIR, NOTHING = LIGHT.pair, LIGHT.nothing


@dataclass(frozen=True)
class Entry:
    """One pattern of the gallery: the call as it stands on the page, and what the picture needs besides."""

    call: str
    length: int = 64
    block: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    draw: Callable[[], Figure] | None = None
    # Of a program: what a call is given beside q, k and v.
    inputs: Callable[[], dict[str, torch.Tensor]] | None = None

    def picture(self) -> Figure:
        """The figure, from evaluating the call that the page shows."""
        if self.draw is not None:
            return self.draw()
        pattern = eval(self.call, {"sd": sd} | vars(P))
        if self.inputs is not None:
            return draw_weights(pattern, self.length, **self.inputs())
        options = {name: value() if callable(value) else value for name, value in self.options.items()}
        return sd.plot(
            pattern,
            self.length,
            block_size=self.block,
            title=self.call.replace("sd.patterns.", ""),
            **options,
        )


def documents_of(*lengths: int) -> torch.Tensor:
    """``2, 3 -> [0, 0, 1, 1, 1]``."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def starts_of(*lengths: int) -> torch.Tensor:
    """``2, 3 -> [0, 2, 5]``."""
    return torch.tensor([0, *lengths]).cumsum(0)


def random(*shape: int) -> torch.Tensor:
    """Numbers for tables whose values are learned or chosen."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def draw_neighbours(call: str, shape: tuple[int, ...], query: Any, block: int, coordinates: Any = None) -> Figure:
    """A pattern of an image: pairs and tiles, and below what one patch, or some, attend to on the image."""
    pattern = eval(call, {"sd": sd} | vars(P))
    frames = shape[0] if len(shape) == 3 else len(query)
    figure = Figure(figsize=(8.6, 6.6 if frames < 4 else 6.2), dpi=110, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(5, 3.2))
    length = math.prod(shape)
    sd.plot(pattern, length, block_size=block, ax=above.subplots(1, 2), panels=("pairs", "tiles"))
    sd.plot(pattern, grid=shape, query=query, coordinates=coordinates, ax=below.subplots(1, frames))
    below.suptitle(
        "which patches the framed one attends to, on the image" + (", frame by frame" if len(shape) == 3 else ""), fontsize=9
    )
    figure.suptitle(call, fontsize=9, family="monospace")
    return figure


def draw_slopes() -> Figure:
    """The slopes of 8 and of 12 heads."""
    figure = Figure(figsize=(6.2, 3), dpi=110, layout="constrained")
    for place, heads in enumerate((8, 12)):
        axis = figure.add_subplot(1, 2, 1 + place)
        axis.bar(range(heads), evaluate(P.alibi_slope(heads).expr, {"h": torch.arange(heads)}).tolist(), color=PAIR)
        axis.set_title(f"alibi_slope({heads})", fontsize=10)
        axis.set_xlabel("h (head)", fontsize=9)
        axis.set_yscale("log", base=2)
    return figure


def draw_buckets() -> Figure:
    """The bucket over the distance."""
    figure = Figure(figsize=(6.2, 3), dpi=110, layout="constrained")
    axis = figure.add_subplot()
    apart = torch.arange(-160, 161)
    for bidirectional, colour in ((True, PAIR), (False, "#f0a23b")):
        bucket = P.t5_bucket(bidirectional=bidirectional)
        q, kv = apart.clamp(min=0), (-apart).clamp(min=0)
        values = evaluate(bucket.expr, {"q_idx": q, "kv_idx": kv}).tolist()
        axis.step(apart.tolist(), values, color=colour, label=f"{bidirectional=}", where="mid")
    axis.set_xlabel("q_idx - kv_idx", fontsize=9)
    axis.set_ylabel("bucket", fontsize=9)
    axis.grid(color="#eeeeee")
    axis.legend(fontsize=8, frameon=False)
    return figure


def draw_orders() -> Figure:
    """The path that the sequence takes through an 8 x 8 grid."""
    figure = Figure(figsize=(7.6, 3), dpi=110, layout="constrained")
    for panel, (order, tile) in enumerate((("raster", None), ("tiled", (4, 4)), ("morton", None))):
        axis = figure.add_subplot(1, 3, 1 + panel)
        row, column = P.grid_position(sd.q_idx, (8, 8), order=order, tile=tile)
        steps = {"q_idx": torch.arange(64)}
        axis.plot(
            evaluate(column.expr, steps).tolist(),
            evaluate(row.expr, steps).tolist(),
            color=PAIR,
            marker="o",
            markersize=3,
            linewidth=1,
        )
        axis.set_title(f'order="{order}"', fontsize=10)
        axis.set_aspect("equal")
        axis.invert_yaxis()
        axis.set_xlabel("column", fontsize=9)
        axis.set_ylabel("row", fontsize=9)
    return figure


def draw_weights(program: Any, length: int, **inputs: torch.Tensor) -> Figure:
    """How much of each value two heads of a call on random rows put into each query's result: what they give where values are one-hot."""
    figure = Figure(figsize=(7.2, 3.8), dpi=110, layout="constrained")
    smooth = [random(2, length + 7, 16)[:, shift : shift + length] for shift in range(8)]  # neighbours alike, as in text
    q = k = torch.stack(smooth).mean(0)[None] * 3
    values = torch.eye(length).expand(1, 2, length, length)
    with torch.no_grad():
        weights = sd.compile(program, backend="reference")(q, k, values, **inputs)[0]
    for head, seen in enumerate(weights):
        axis = figure.add_subplot(1, 2, 1 + head)
        shades = LinearSegmentedColormap.from_list("weight", [(0, NOTHING), (0.001, "#c9dcec"), (1, PAIR)])
        axis.imshow(seen.abs().numpy(), cmap=shades, norm=PowerNorm(0.4, 0, float(seen.abs().max())), interpolation="nearest")
        axis.set_title(f"weights, head {head}", fontsize=10)
        axis.set_xlabel("kv_idx (key)", fontsize=9)
        axis.set_ylabel("q_idx (query)", fontsize=9)
        axis.tick_params(labelsize=8)
    return figure


def subtree_ends() -> torch.Tensor:
    """A prompt of 16 tokens with two continuations of 24, each of which forks into two of 8 after its first 8 tokens."""
    end = torch.arange(64) + 1
    for first, last, size in (
        (0, 16, 64),
        (16, 24, 40),
        (24, 32, 32),
        (32, 40, 40),
        (40, 48, 64),
        (48, 56, 56),
        (56, 64, 64),
    ):
        end[first:last] = size
    return end


def fire_tables() -> dict[str, Callable[[], torch.Tensor]]:
    """A network with a bump."""
    values = {"c": [0.1], "length": [16.0], "hidden": [8.0, 8.0, 8.0, 0.0], "hidden_bias": [-1.0, -2.0, -3.0, 0.0],
              "out": [[1.0, -2.0, 0.5, 0.0]], "out_bias": [0.0]}  # fmt: skip
    return {f"fire_{name}": lambda numbers=numbers: torch.tensor(numbers) for name, numbers in values.items()}


def index() -> dict[str, torch.Tensor]:
    """What an indexer gives."""
    return {"index_q": random(1, 4, 64, 8), "index_k": random(1, 1, 64, 8), "index_weights": random(1, 4, 64)}


def draw_entries(call: str, block: int) -> Figure:
    """The keys of a window, and those that the entries which are attended to stand for."""
    given = {name: x for name, x in index().items() if name != "index_k"} if call.startswith("csa") else {}
    given |= {"index_entries": random(1, 1, 64 // block, 8)} if given else {}
    rows = random(1, 2, 64, 16)
    attn = sd.compile(eval(call, vars(P)), backend="reference")
    picked = list(attn.choices(rows, rows, rows, entries=rows[:, :, ::block], **given).values())
    t = torch.arange(64)
    over = (t // block + 1) * block <= t[:, None] + 1
    far = over & picked[0][0, 0].repeat_interleave(block, 1) if picked else over
    near = (t <= t[:, None]) & (t > t[:, None] - 8)
    figure = Figure(figsize=(4.4, 4), dpi=110, layout="constrained")
    axis = figure.add_subplot()
    shades = LinearSegmentedColormap.from_list("seen", [(0, NOTHING), (0.5, "#f0a23b"), (1, PAIR)])
    axis.imshow(torch.maximum(far * 1, near * 2).numpy(), cmap=shades, interpolation="nearest")
    axis.set_title("window, and keys of entries", fontsize=10)
    axis.set_xlabel("kv_idx (key)", fontsize=9)
    axis.set_ylabel("q_idx (query)", fontsize=9)
    axis.tick_params(labelsize=8)
    return figure


def on_image(call: str, shape: tuple[int, ...], query: Any, block: int, coordinates: Callable[[], Any] = lambda: None) -> Entry:
    """The entry of a pattern of images or videos."""
    return Entry(call, draw=lambda: draw_neighbours(call, shape, query, block, coordinates()))


GALLERY = {
    "full": Entry("full()"),
    "causal": Entry("causal()"),
    "sliding_window": Entry("sliding_window(16)"),
    "dilated": Entry("dilated(8, step=4)"),
    "strided": Entry("strided(8)"),
    "strided_fixed": Entry("strided_fixed(8, summary=2)"),
    "chunked": Entry("chunked(20)"),
    "sinks": Entry("sliding_window(16) | sinks(4)"),
    "prefix": Entry("prefix(20)"),
    "global_tokens": Entry("global_tokens(4)"),
    "documents": Entry("documents()", options={"doc": lambda: documents_of(24, 10, 30)}),
    "packed": Entry("packed(window=12)", options={"doc": lambda: documents_of(24, 10, 30)}),
    "document_prefix": Entry(
        "document_prefix()",
        options={
            "doc": lambda: documents_of(24, 10, 30),
            "start": lambda: starts_of(24, 10, 30),
            "prefix": lambda: torch.tensor([8, 5, 16]),
        },
    ),
    "shared_prefix": Entry("shared_prefix()", options={"branch": lambda: documents_of(20, 14, 10, 20)}),
    "tree": Entry("tree()", options={"subtree_end": subtree_ends}),
    "blocks": Entry('blocks("chosen", 8)', options={"chosen": lambda: random(8, 8) > 0.4}),
    "block_causal": Entry("block_causal(16)"),
    "random_blocks": Entry("random_blocks(8, 2, seed=0)", length=128),
    "block_diffusion": Entry("block_diffusion(8)"),
    "neighbourhood_2d": on_image("neighbourhood_2d(12, 12, kernel=5)", (12, 12), [(0, 0), (5, 0), (5, 5)], 12),
    "neighbourhood_3d": on_image("neighbourhood_3d(4, 6, 6, kernel=3, causal=(True, False, False))", (4, 6, 6), (2, 2, 3), 12),
    "sliding_tile": on_image(
        "sliding_tile((12, 12), kernel=(9, 9), tile=(3, 3))",
        (12, 12),
        [(0, 0), (7, 5), (11, 11)],
        9,
        lambda: P.grid_position(sd.q_idx, (12, 12), order="tiled", tile=(3, 3)),
    ),
    "grid_position": Entry('grid_position(sd.q_idx, (8, 8), order="morton")', draw=draw_orders),
    "softcap": Entry("softcap(50)"),
    "alibi": Entry("sd.attend(causal(), score=alibi(8))", options={"head": range(8)}),
    "alibi_slope": Entry("alibi_slope(8)", draw=draw_slopes),
    "relative_bias": Entry("relative_bias(12)", options={"relative_bias": lambda: random(25, 1).cumsum(0)}),
    "t5_bias": Entry("t5_bias(buckets=16, max_distance=48)", options={"t5_bias": lambda: random(16, 1)}),
    "t5_bucket": Entry("t5_bucket()", draw=draw_buckets),
    "sigmoid": Entry("sigmoid(sliding_window(24), length=4096)"),
    "relu_squared": Entry("relu_squared(sliding_window(24))"),
    "hstu": Entry("hstu(causal(), divisor=4096)"),
    "softpick": Entry("softpick(causal())"),
    "stick_breaking": Entry("stick_breaking()"),
    "kerple": Entry("kerple()", options={"kerple_1": lambda: torch.ones(1), "kerple_2": lambda: torch.ones(1)}),
    "fire": Entry("fire(4)", options=fire_tables()),
    "ssmax": Entry("ssmax()", options={"ssmax": lambda: torch.ones(1)}),
    "fox": Entry("fox()", options={"forget": lambda: -random(1, 1, 64).abs().cumsum(-1)}),
    "longformer": Entry("longformer(window=16, global_count=3)"),
    "bigbird": Entry("bigbird(block=8, random_count=2)", length=128),
    "streaming_llm": Entry("streaming_llm(window=16, sink_count=4)"),
    "alibi_window": Entry("alibi_window(heads=8, window=24)", options={"head": 2}),
    "t5": Entry("t5(decoder=True)", options={"t5_bias": lambda: random(32, 1).cumsum(0)}),
    "mistral": Entry("mistral(window=16)"),
    "gemma2": Entry("gemma2(layer=0, window=16)"),
    "gemma3": Entry("gemma3(layer=0, window=16)"),
    "gpt_oss": Entry("gpt_oss(layer=0, window=16)"),
    "llama4": Entry("llama4(layer=0, chunk=24)"),
    "hsa": Entry("hsa(chunk=8, top_k=2)", inputs=lambda: {"retrieval_q": random(1, 2, 64, 8), "landmarks": random(1, 2, 8, 8)}),
    "nha": Entry("nha(slots=4, window=8)", inputs=lambda: {"gate": random(1, 2, 64, 4)}),
    "pbs": Entry("pbs(block=8, segment=16, mass=0.5)", inputs=dict),
    "token_sparse": Entry("token_sparse(coverage=0.3, probe=8, pool=3, min_tokens=8)", inputs=dict),
    "minference": Entry("minference(vertical=6, slash=10, probe=8, columns=2, diagonals=4)", inputs=dict),
    "ring_linear": Entry("ring_linear([0.8, 0.98])", inputs=dict),
    "gated_delta": Entry("gated_delta()", inputs=lambda: {"g": -random(1, 2, 64).abs() / 8, "beta": random(1, 2, 64).sigmoid()}),
    "kda": Entry("kda()", inputs=lambda: {"g": -random(1, 2, 64, 16).abs() / 8, "beta": random(1, 2, 64).sigmoid()}),
    "delta_net": Entry("delta_net()", inputs=lambda: {"beta": random(1, 2, 64).sigmoid()}),
    "gla": Entry("gla()", inputs=lambda: {"g": -random(1, 2, 64, 16).abs() / 8}),
    "rwkv6": Entry("rwkv6()", inputs=lambda: {"g": -random(1, 2, 64, 16).abs() / 8, "bonus": random(2, 16)}),
    "rwkv7": Entry(
        "rwkv7()",
        inputs=lambda: {
            "g": -random(1, 2, 64, 16).sigmoid() / 4,
            **dict.fromkeys(("erase", "along"), random(1, 2, 64, 16) / 8),
        },
    ),
    "ssd": Entry("ssd()", inputs=lambda: {"g": -random(1, 2, 64).abs() / 8}),
    "based": Entry("based()", inputs=dict),
    "retnet": Entry("retnet(heads=2)", inputs=dict),
    "lightning": Entry("lightning(heads=2, layer=15, layers=20)", inputs=dict),
    "moba": Entry("moba(chunk=8, top_k=3)", inputs=dict),
    "nsa": Entry("nsa(block=4, select=8, top_k=3, window=8)", inputs=lambda: {"gate": random(1, 2, 64, 3).sigmoid()}),
    "dsa": Entry("dsa(top_k=8)", inputs=index),
    "hisa": Entry("hisa(block=8, blocks=3, top_k=8)", inputs=index),
    "csa": Entry("csa(block=4, top_k=3, window=8)", draw=lambda: draw_entries("csa(block=4, top_k=3, window=8)", 4)),
    "hca": Entry("hca(block=8, window=8)", draw=lambda: draw_entries("hca(block=8, window=8)", 8)),
    "qsa": Entry("qsa(unit=4)", inputs=lambda: {"blocks": random(1, 1, 64, 16).argsort(-1)[..., :3]}),
    "nsa_published": Entry(
        "nsa_published(length=8, stride=4, select=8, top_k=3, window=8)", inputs=lambda: {"gate": random(1, 2, 64, 3).sigmoid()}
    ),
    "infllm_v2": Entry("infllm_v2(length=8, stride=4, select=8, top_k=3, local=0)", inputs=dict),
    "quest": Entry("quest(page=4, pages=3)", inputs=dict),
    "landmark": Entry("landmark(block=8, top_k=2)", inputs=lambda: {"landmarks": random(1, 2, 8, 16)}),
    "hsa_ultralong": Entry(
        "hsa_ultralong(chunk=8, top_k=2, window=8)",
        inputs=lambda: {"retrieval_q": random(1, 2, 64, 8), "landmarks": random(1, 2, 8, 8)},
    ),
    "hils": Entry(
        "hils(chunk=8, top_k=2, window=8)", inputs=lambda: {"retrieval_q": random(1, 2, 64, 8), "landmarks": random(1, 2, 8, 8)}
    ),
    "xattention": Entry("xattention(stride=4, block=8, mass=0.6)", inputs=dict),
    "seer_attention": Entry(
        "seer_attention(block=8, least=0.15)", inputs=lambda: {"gate_q": random(1, 2, 8, 4), "gate_k": random(1, 2, 8, 4)}
    ),
    "flexprefill": Entry("flexprefill(block=8, mass=0.6, tau=0.06)", inputs=dict),
    "vsa": Entry("vsa(cube=8, top_k=2)", inputs=lambda: {"gate": torch.tensor([0.3, 1.0]).expand(1, 2, 64, 2)}),
    "snapkv": Entry("snapkv(capacity=20, window=8)", inputs=dict),
    "h2o": Entry("h2o(heavy=8, recent=8)", inputs=dict),
    "mosa": Entry(
        "mosa(count=20)", inputs=lambda: {"router": random(1, 2, 64).sigmoid(), "weights": random(1, 2, 64, 1).sigmoid()}
    ),
    "duo_attention": Entry("duo_attention(window=8, sink_count=2)", options={"retrieval": lambda: torch.tensor([False])}),
    "retained": Entry("retained(32, recent=8)", options={"stays": lambda: random(1, 1, 32) > 0.5}),
    "mla": Entry("mla()"),
    "differential": Entry(
        "differential()",
        inputs=lambda: {
            "q_2": random(1, 2, 64, 16),
            "k_2": random(1, 2, 64, 16),
            "gate": torch.tensor([1.0, -0.8]).expand(1, 2, 64, 2),
        },
    ),
}

CHAPTERS = {
    "local": "Around the diagonal",
    "anchors": "Anchors",
    "packing": "Packed sequences",
    "blockwise": "Blocks",
    "grids": "Grids",
    "scores": "Score functions",
    "normalisers": "Other weights than a softmax's",
    "models": "Published systems",
    "systems": "Programs",
    "indexed": "Programs that follow an index, or lists",
    "far_chunks": "Programs with a window, and chunks far back",
    "prompts": "Programs that choose for a prompt",
    "head_forms": "Heads of other forms",
    "recurrent": "Recurrences",
}


def page() -> str:
    """The text of docs/patterns.md."""
    out = [
        "# The pattern library",
        "",
        "`sparsedsl.patterns`, function by function; `python docs/make_pictures.py` makes page and pictures from the docstrings.",
        "`help(sd.patterns.causal)` shows the same with arguments and errors. Masks compose with `& | ~ ^`, scores nest:",
        "`softcap(50, alibi(8))`. In the pictures queries run down, keys to the right. Of programs ([programs.md](programs.md)), which",
        "choose by their inputs, they show how much of each value goes into each query's result, for two heads of a call on random rows.",
    ]
    for module, title in CHAPTERS.items():
        names = importlib.import_module(f"sparsedsl.patterns.{module}").__all__
        source = f"[patterns/{module}.py](../patterns/{module}.py)"
        out += ["", f"## {title}", "", f"Source: {source}", ""]
        out += [", ".join(f"[{name}](#{name})" for name in GALLERY if name in names)]
        for name in (name for name in GALLERY if name in names):
            out += ["", *_section(name)]
    return "\n".join(out) + "\n"


def _section(name: str) -> list[str]:
    function, entry = getattr(P, name), GALLERY[name]
    signature = str(inspect.signature(function, eval_str=False)).replace("'", "")
    text = inspect.getdoc(function) or ""
    about = text.split("\n\nArgs:")[0].split("\n\nRaises:")[0].split("\n\nSource:")[0].split("\n\n>>>")[0]
    parts = [f"### {name}", "", "```py", f"{name}{signature}", "```", "", *_markdown(about)]
    if "\n\nSource: " in text:
        reference = text.split("\n\nSource: ")[1].split("\n\n")[0]
        parts += ["", "Source: " + " ".join(reference.split()).replace("``", "`").rstrip(".") + "."]
    return [*parts, "", f"![{entry.call}](pictures/{name}.png)"]


def _markdown(text: str) -> list[str]:
    """A docstring's text as Markdown: roles and double backquotes as code, blocks after ``::`` fenced."""
    out: list[str] = []
    fenced = False
    for line in text.replace(":func:`", "`").replace("``", "`").splitlines():
        if fenced and line and not line.startswith("    "):
            out, fenced = [*out[:-1], "```", "", line], False
        elif line.endswith("::"):
            out, fenced = [*out, line[:-1], "", "```text"], True
        elif not (fenced and not line and out[-1] == "```text"):
            out.append(line[4:] if fenced else line)
    return [*out, "```"] if fenced else out


def write(name: str) -> Path:
    """Draw one picture, in few colours so that the file stays small."""
    path = PICTURES / f"{name}.png"
    GALLERY[name].picture().savefig(path, dpi=80)
    return _shrunk(path, path)


def write_figure(name: str) -> Path:
    """What a page's own blocks draw, for the page to show: they are run up to the one that does."""
    page, drawn = DRAWN_BY_PAGES[name]
    found = pages.blocks(page, (ROOT / page).read_text(encoding="utf-8"))
    (last,) = (number for number, block in enumerate(found) if f'savefig("{drawn}")' in block.source)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        pages.run(found[: last + 1])
        return _shrunk(Path(drawn), FIGURES / f"{name}.png")


def _shrunk(path: Path, to: Path) -> Path:
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(to, optimize=True)
    return to


def main() -> None:
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", help="pictures to draw; default all")
    parser.add_argument("--page", action="store_true", help="write docs/patterns.md and the tables of docs/programs.md only")
    parser.add_argument("--figures", action="store_true", help="write what README.md and the tutorial draw, and nothing else")
    options = parser.parse_args()
    if options.figures:
        for name in DRAWN_BY_PAGES:
            print(write_figure(name).relative_to(ROOT))
        return
    unknown = sorted(set(options.names) - set(GALLERY))
    if unknown:
        parser.error(f"no picture is called {', '.join(unknown)}; there are {', '.join(GALLERY)}")
    PICTURES.mkdir(exist_ok=True)
    for name in [] if options.page else options.names or GALLERY:
        start = time.perf_counter()
        path = write(name)
        print(
            f"{path.relative_to(ROOT)}  {path.stat().st_size / 1024:.0f} KiB  {time.perf_counter() - start:.1f} s",
            flush=True,
        )
    before, _, rest = MANUAL.read_text(encoding="utf-8").partition(KINDS_FROM)
    manual = before + KINDS_FROM + kinds_table() + KINDS_TO + rest.partition(KINDS_TO)[2]
    for path, text in ((PAGE, page()), (MANUAL, manual)):
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
