"""Takes the pictures of the playground and of long patterns: docs/pictures/view_*.png, for docs/playground.md. Needs Chromium.

python docs/make_screenshots.py              all
python docs/make_screenshots.py light ...    these
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402

import sparsedsl as sd  # noqa: E402
from tests.view.browser import missing_browser, open_browser, served  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
P = sd.patterns
LONGFORMER = {"spec": "sparsedsl.patterns:longformer", "q_len": 4096, "values": {"window": 512, "global_count": 16}}

# Name -> the page: what is shown, the theme, and what is done before the picture is taken.
PAGES: dict[str, tuple[dict[str, Any], str, str]] = {
    "light": (LONGFORMER, "light", "tell(state.pinned = { q_idx: 2600, kv_idx: 2400 }); draw();"),
    "dark": (LONGFORMER, "dark", "goTo({ q_idx: 500, kv_idx: 256 });"),
    "million": (
        {"spec": "sparsedsl.patterns:streaming_llm", "q_len": 1 << 20, "values": {"window": 65536, "sink_count": 4}},
        "light",
        "tell(state.pinned = { q_idx: 900000, kv_idx: 840000 }); draw();",
    ),
    "refused": ({"spec": "sparsedsl.patterns:sliding_window", "q_len": 4096, "values": {"w": 0}}, "light", ""),
    "program": (
        {"spec": "sparsedsl.patterns:nsa", "q_len": 192, "values": {"block": 8, "select": 16, "top_k": 4, "window": 16}},
        "light",
        "",
    ),
}


def head_windows() -> Any:
    """A window for each head, as layers with heads of several reaches have them."""
    return sd.plot(P.alibi_window(heads=8, window=48), 96, head=range(8), title="alibi_window(heads=8, window=48), head=range(8)")


DRAWN: dict[str, Callable[[], Any]] = {
    "64k": lambda: sd.plot(
        P.causal() & (P.sliding_window(1024) | (sd.kv_idx == 20_000)),
        65_536,
        title="causal() & (sliding_window(1024) | (kv_idx == 20_000)): one global token at 64K",
    ),
    "heads": head_windows,
    "dark_plot": lambda: sd.plot(P.bigbird(block=8, random_count=2), 128, block_size=8, theme="dark", title="theme='dark'"),
}


def save(image: Image.Image, name: str) -> None:
    """In few colours, so that the file stays small, but the rarest among them: a square of a legend says what is what."""
    path = PICTURES / f"view_{name}.png"
    image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1024:.0f} KiB", flush=True)


def shoot(driver: Any, name: str) -> None:
    """One page, after everything on it has come."""
    words, theme, then = PAGES[name]
    setting = {key: value for key, value in words.items() if key != "spec"}
    with served(words["spec"], **setting) as address:
        driver.get(f"{address}?theme={theme}")
        wait(driver, "document.body.dataset.ready && document.body.dataset.proofs")
        wait(driver, "document.body.dataset.graph" if name == "program" else "true")
        if then:
            driver.execute_script(then)
            wait(driver, "document.getElementById('pair').textContent.includes('tile')")
            time.sleep(1)
        # how long the last answer took says something of the machine, and changes with every picture
        driver.execute_script("document.getElementById('time').hidden = true")
        save(Image.open(io.BytesIO(driver.get_screenshot_as_png())), name)


def wait(driver: Any, script: str) -> None:
    """Until an expression of the page is true, two minutes at most."""
    end = time.monotonic() + 120
    while not driver.execute_script(f"return Boolean({script})"):
        if time.monotonic() > end:
            raise SystemExit(f"the page never came to {script}")
        time.sleep(0.1)


def main() -> None:
    """Take what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"default all: {', '.join([*PAGES, *DRAWN])}")
    names = parser.parse_args().names or [*PAGES, *DRAWN]
    unknown = sorted(set(names) - {*PAGES, *DRAWN})
    if unknown:
        parser.error(f"no picture is called {', '.join(unknown)}; there are {', '.join([*PAGES, *DRAWN])}")
    for name in names:
        if name in DRAWN:
            written = io.BytesIO()
            DRAWN[name]().savefig(written, dpi=80)
            save(Image.open(written), name)
    pages = [name for name in names if name in PAGES]
    if pages and missing_browser():
        raise SystemExit(f"pages are taken with a browser: {missing_browser()}")
    if pages:
        with open_browser(1300, 860) as driver:
            for name in pages:
                shoot(driver, name)


if __name__ == "__main__":
    main()
