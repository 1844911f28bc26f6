"""The page in a real browser without a screen: it loads, sliders change the map, refusals are said, and a million tokens are fluid."""

from __future__ import annotations

import time

import pytest

from sparsedsl.view.page import standalone
from sparsedsl.view.setting import Setting
from sparsedsl.view.subject import Subject
from tests.view.browser import missing_browser, open_browser, served

pytestmark = pytest.mark.skipif(bool(missing_browser()), reason=f"the page is tested in a browser: {missing_browser()}")

MINE = """
import sparsedsl as sd

def make(window: int = 16, sinks: int = 2, causal: bool = True):
    near = sd.patterns.sliding_window(window) if causal else sd.q_idx - sd.kv_idx < window
    mask = near | (sd.kv_idx < sinks)
    return mask & sd.patterns.causal() if causal else mask

leaky = sd.kv_idx <= sd.q_idx + 1
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("view") / "shown.py"
    path.write_text(MINE)
    return str(path)


@pytest.fixture(scope="module")
def browser():
    with open_browser(1300, 850) as driver:
        yield driver


def wait(browser, script, seconds=60):
    """The first true value of an expression of the page."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := browser.execute_script(f"return {script}"):
            return value
        time.sleep(0.03)
    raise AssertionError(f"the page never came to {script}; its log: {browser.get_log('browser')}")


def look(browser, script=""):
    """Do something, and wait until the map shows what is then asked for; the counts of its cells."""
    browser.execute_script(script)
    wait(browser, "document.body.dataset.shown === JSON.stringify(seen())")
    return browser.execute_script("return JSON.parse(document.body.dataset.cells)")


def open_page(browser, address):
    browser.get(address)
    wait(browser, "document.body.dataset.ready")
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


def slide(name, value):
    return f"const box = document.getElementById('set-{name}'); box.value = {value}; box.dispatchEvent(new Event('input'))"


def colour_at(browser, q_idx, kv_idx):
    """What the canvas shows of a pair."""
    return browser.execute_script(
        "const f = frame(), v = state.view, r = window.devicePixelRatio || 1;"
        "const x = xOf(arguments[1] + .5, v, f) * r, y = yOf(arguments[0] + .5, v, f) * r;"
        "return [...$('map').getContext('2d').getImageData(x, y, 1, 1).data]",
        q_idx, kv_idx,
    )  # fmt: skip


def test_it_loads_and_a_slider_changes_the_map(browser, mine):
    with served(f"{mine}:make", q_len=256, q_block=16, kv_block=16) as address:
        open_page(browser, address + "?theme=light")
        assert "make" in browser.title
        before = look(browser)
        blue, grey = colour_at(browser, 200, 195), colour_at(browser, 200, 100)
        assert blue != grey and colour_at(browser, 100, 200) == grey and colour_at(browser, 200, 1) == blue
        after = look(browser, slide("window", 128))
        assert after["full"] > before["full"] and colour_at(browser, 200, 100) == blue
        look(browser, "const box = $('set-causal'); box.checked = false; box.dispatchEvent(new Event('input'))")
        assert "no: there is a pair" in wait(
            browser, "$('fact-causal').textContent.includes('no: there') && $('fact-causal').textContent"
        )
        wait(browser, "$('fact-cost').textContent.includes('tiles') && document.body.dataset.proofs > 0")


def test_hovering_says_why(browser, mine):
    with served(f"{mine}:make", q_len=64) as address:
        open_page(browser, address)
        for pair, verdict in (((40, 30), "allowed"), ((40, 10), "masked")):
            browser.execute_script("tell({ q_idx: arguments[0], kv_idx: arguments[1] })", *pair)
            said = wait(browser, f"$('pair').textContent.includes('q_idx {pair[0]}, kv_idx {pair[1]}') && $('pair').textContent")
            assert verdict in said and "one of" in said and "kv_idx <= q_idx" in said


def test_what_is_refused_is_said_and_passes(browser, mine, tmp_path):
    with served(f"{mine}:make", q_len=64) as address:
        open_page(browser, address)
        browser.execute_script(slide("window", 0))
        assert "must be at least 1" in wait(browser, "!$('refused').hidden && $('refused').textContent")
        browser.execute_script(slide("window", 3))
        wait(browser, "$('refused').hidden && state.layers.length")
    broken = tmp_path / "broken.py"
    broken.write_text("import sparsedsl as sd\nmine = (sd.kv_idx <= sd.q_idx) and (sd.kv_idx > 3)\n")
    with served(f"{broken}:mine") as address:
        open_page(browser, address)
        said = wait(browser, "!$('refused').hidden && $('refused').textContent")
        assert "while importing" in said and "Traceback" not in said
        broken.write_text("import sparsedsl as sd\nmine = (sd.kv_idx <= sd.q_idx) & (sd.kv_idx > 3)\n")
        open_page(browser, address)
        wait(browser, "$('refused').hidden && state.layers.length")


def test_a_witness_is_shown_on_the_map(browser, mine):
    with served(f"{mine}:leaky", q_len=4096) as address:
        open_page(browser, address)
        wait(browser, "document.querySelector('#fact-causal button')")
        browser.execute_script("document.querySelector('#fact-causal button').click()")
        pair = browser.execute_script("return state.pinned")
        assert pair["kv_idx"] == pair["q_idx"] + 1
        wait(browser, "state.layers.some(([layer, fine]) => fine && layer.cell[0] === 1)")


def test_a_million_tokens_are_fluid(browser, mine):
    """From the hand to the picture; the quickest of some, as others may compute beside."""
    with served(f"{mine}:make", q_len=1 << 20) as address:
        open_page(browser, address)
        look(browser)
        times = []
        for hand in ("zoom(0.5)", "zoom(0.5)", "move(0.2, 0.2)", "DO.end()", "zoom(2)", "DO.whole()", slide("window", 1024)):
            look(browser, hand)
            times.append(float(browser.execute_script("return document.body.dataset.ms")))
        assert sorted(times)[len(times) // 2] < 500, times
        assert (
            browser.execute_script("return state.layers.reduce((n, [layer]) => n + layer.rows * layer.columns, 0)")
            <= 2 * 514 * 514
        )


def test_a_file_needs_no_server(browser, mine, tmp_path):
    path = tmp_path / "kept.html"
    path.write_text(standalone(Subject(f"{mine}:make"), Setting(q_len=300, q_block=32, kv_block=32), {}))
    open_page(browser, path.as_uri())
    wait(browser, "state.layers.length")
    look(browser, "zoom(0.25, { q_idx: 200, kv_idx: 195 })")
    assert browser.execute_script("return state.layers.at(-1)[0].cell[0]") == 1
    assert colour_at(browser, 200, 195) != colour_at(browser, 200, 203)
    # masked pairs, in a partial tile and in an empty one: the tint tells them apart
    assert colour_at(browser, 200, 203) != colour_at(browser, 180, 210)
    browser.execute_script("tell({ q_idx: 200, kv_idx: 195 })")
    assert "allowed" in wait(browser, "$('pair').textContent.includes('q_idx 200') && $('pair').textContent")
    assert "PROVED" in wait(browser, "$('fact-causal').textContent")
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_a_program_shows_its_call_and_its_graph(browser):
    with served("sparsedsl.patterns:moba", q_len=128, values={"chunk": 16, "top_k": 2}) as address:
        open_page(browser, address)
        wait(browser, "document.body.dataset.graph && document.querySelector('#graph svg')")
        names = wait(browser, "state.program && state.program.layers.map((layer) => layer.name)")
        assert names == ["weights", "top_k"]
        assert "blocks chosen" in wait(browser, "$('pair').textContent")
        browser.execute_script("[...$('layers').children].find((button) => button.textContent === 'top_k').click()")
        assert browser.execute_script("return state.layers[0][0].columns") == 8
