"""What the page is told, without a page: cells and reasons against brute force, parameters, refusals, and the file that needs no server."""

from __future__ import annotations

import base64
import json
import re
import time
import urllib.error
import urllib.request
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl.cli import main
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.specs import CannotLoad
from sparsedsl.view.facts import FACTS
from sparsedsl.view.page import standalone
from sparsedsl.view.random_call import random_call
from sparsedsl.view.scene import MOST, Scene
from sparsedsl.view.server import Playground, serve
from sparsedsl.view.setting import Setting
from sparsedsl.view.subject import Subject

P = sd.patterns
EMPTY, PARTIAL, FULL = 0, 1, 2
MINE = """
import sparsedsl as sd

def make(window: int = 16, sinks: int = 2, causal: bool = True, slope: float = 0.5, name="x"):
    mask = sd.patterns.sliding_window(window) | sd.patterns.sinks(sinks)
    return sd.attend(mask & sd.patterns.causal() if causal else mask, score=sd.score - slope * (sd.q_idx - sd.kv_idx))

def needs(window: int, name):
    return sd.patterns.causal()

def raising(window: int = 3):
    return [][window]

def mask_mod(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx

leaky = sd.kv_idx <= sd.q_idx + 1
tabled = sd.table("doc")[sd.q_idx] == sd.table("doc")[sd.kv_idx]
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "viewed.py"
    path.write_text(MINE)
    return str(path)


def codes(layer):
    data = base64.b64decode(layer["data"])
    data = zlib.decompress(data) if layer["packed"] else data
    return np.frombuffer(data, dtype=np.uint8).reshape(layer["rows"], layer["columns"])


def assert_layer_is_what_pairs_say(layer, pairs, q_offset):
    """``pairs``: all of them, from the first query and key."""
    q_cell, kv_cell = layer["cell"]
    for (i, j), kind in np.ndenumerate(codes(layer)):
        top, left = layer["q"] - q_offset + i * q_cell, layer["kv"] + j * kv_cell
        part = pairs[top : top + q_cell, left : left + kv_cell]
        assert kind == (FULL if part.all() else PARTIAL if part.any() else EMPTY)


MASKS = {
    "streaming": P.streaming_llm(20, 3),
    "dilated": P.dilated(6, step=5),
    "2-D": P.neighbourhood_2d(12, 20, kernel=5),
    "heads": sd.q_idx - sd.kv_idx <= 3 * sd.h,
    "documents": sd.table("doc")[sd.q_idx] == sd.table("doc")[sd.kv_idx],
}
TABLES = {"doc": (torch.arange(400) * 7 // 50) % 5}


@pytest.mark.parametrize("name", MASKS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_views_and_pairs_are_what_the_mask_says(name, data):
    mask, q_offset, head = MASKS[name], data.draw(st.integers(0, 60)), data.draw(st.integers(0, 5))
    rows, keys = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 180))
    setting = Setting(
        rows, keys, q_offset, head=head, q_block=data.draw(st.integers(1, 20)), kv_block=data.draw(st.integers(1, 20))
    )
    scene = Scene(sd.attend(mask), setting, {n: TABLES[n] for n in mask.tables})
    env = {"q_idx": torch.arange(q_offset, q_offset + rows)[:, None], "kv_idx": torch.arange(keys)[None], "h": head, "b": 0}
    env |= {"q_len": q_offset + rows, "kv_len": keys, **TABLES}
    pairs = evaluate(mask.expr, env).expand(rows, keys).numpy()
    q0, kv0 = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, keys - 1))
    q1, kv1 = data.draw(st.integers(q0 + 1, rows)), data.draw(st.integers(kv0 + 1, keys))
    view = scene.view(range(q_offset + q0, q_offset + q1), range(kv0, kv1), data.draw(st.integers(1, 64)))
    for layer in filter(None, view.values()):
        assert_layer_is_what_pairs_say(layer, pairs, q_offset)
        assert layer["q"] <= q_offset + q0 and layer["kv"] <= kv0
        assert layer["q"] + layer["queries"] >= q_offset + q1 and layer["kv"] + layer["keys"] >= kv1
    told = scene.pair(q_offset + q0, kv0)
    assert told["allowed"] == told["reason"]["holds"] == pairs[q0, kv0]
    tile = pairs[q0 // setting.q_block * setting.q_block :][: setting.q_block, kv0 // setting.kv_block * setting.kv_block :]
    tile = tile[:, : setting.kv_block]
    assert told["tile"]["class"] == ("full" if tile.all() else "partial" if tile.any() else "empty")


def test_what_is_close_is_shown_pair_by_pair_and_what_is_far_in_whole_tiles():
    scene = Scene(sd.attend(P.sliding_window(512)), Setting(q_len=1 << 20), {})
    close = scene.view(range(5000, 5100), range(4900, 5000))
    assert close["fine"]["cell"] == [1, 1] and close["tiles"]["cell"] == [128, 128]
    assert scene.view(range(0, 8192), range(0, 8192), 256)["fine"]["cell"] == [32, 32]
    far = scene.view(range(0, 1 << 20), range(0, 1 << 20), 4000)
    assert far["fine"] is None and far["tiles"]["rows"] <= MOST + 1 and far["tiles"]["cell"][0] % 128 == 0


@pytest.mark.parametrize(
    "mask", [P.streaming_llm(1024, 4), P.causal() & (sd.kv_idx % 4096 == 17), P.bigbird(64), P.dilated(64, step=512)]
)
def test_a_million_tokens_stay_fluid(mask):
    scene = Scene(sd.attend(mask), Setting(q_len=1 << 20), {})
    scene.view(range(1 << 20), range(1 << 20), 400)
    for queries, keys in ((range(1 << 20), range(1 << 20)), (range(700_000, 708_000), range(699_000, 707_000))):
        start = time.process_time()
        scene.view(queries, keys, 400)
        assert time.process_time() - start < 4  # a tenth of that on a machine of its own


def test_reasons_say_which_conditions_hold():
    scene = Scene(
        sd.attend(P.causal() & (P.sliding_window(4) | (sd.table("doc")[sd.q_idx] == 3))), Setting(16), {"doc": torch.arange(16)}
    )
    told = scene.pair(10, 2)
    assert not told["allowed"] and told["reads"] == ["doc[q_idx] = 10"]
    assert told["reason"]["word"] == "all of"
    leaves = {part["text"]: part["holds"] for part in told["reason"]["parts"] if part["text"]}
    assert leaves == {"kv_idx <= q_idx": True}
    (either,) = (part for part in told["reason"]["parts"] if not part["text"])
    assert either["word"] == "one of" and not either["holds"]


def test_parameters_of_functions(mine):
    subject = Subject(f"{mine}:make")
    assert [(p.name, p.kind, p.default) for p in subject.parameters] == [
        ("window", "int", 16), ("sinks", "int", 2), ("causal", "bool", True), ("slope", "float", 0.5),
    ]  # fmt: skip
    assert sd.equivalent(subject.make({"window": 5, "causal": False}).mask, P.sliding_window(5) | P.sinks(2)) == sd.PROVED
    assert Subject("sparsedsl.patterns:sliding_window").make({"w": 5}) is not None
    assert Subject(f"{mine}:mask_mod").parameters == () and Subject(f"{mine}:leaky").parameters == ()
    assert isinstance(Subject("sparsedsl.patterns:moba").make({"top_k": 2}), sd.Program)


@pytest.mark.parametrize(
    ("name", "values", "error", "message"),
    [
        ("make", {"windo": 3}, sd.PatternError, "has no parameter windo; it has window, sinks, causal, slope. Did you mean"),
        ("make", {"window": 2.5}, sd.PatternError, "parameter window is a int; got 2.5"),
        ("make", {"causal": 1}, sd.PatternError, "parameter causal is a bool; got 1"),
        ("make", {"slope": True}, sd.PatternError, "parameter slope is a float; got True"),
        ("make", {"window": 0}, sd.PatternError, "must be at least 1"),
        ("raising", {}, CannotLoad, "raises IndexError"),
        ("needs", {}, CannotLoad, "wants name, which is no number with a slider"),
        ("nothing", {}, CannotLoad, "has no 'nothing'"),
    ],
)
def test_what_cannot_be_made(mine, name, values, error, message):
    with pytest.raises(error, match=message):
        Subject(f"{mine}:{name}").make(values)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"q_len": 0}, "q_len must be a whole number of at least 1"),
        ({"q_len": True}, "q_len must be"),
        ({"head": -1}, "head must be"),
        ({"qlen": 3}, "there is no setting qlen"),
        ({"values": 3}, "values of parameters are a mapping"),
        (3, "a setting is a mapping"),
    ],
)
def test_wrong_settings(words, message):
    with pytest.raises(sd.SparseDSLError, match=message):
        Setting.read(words)


def test_answers_and_refusals(mine):
    playground = Playground(f"{mine}:make", {}, Setting(64))
    start = playground.answer("start", {})
    assert start["setting"]["values"] == {"window": 16, "sinks": 2, "causal": True, "slope": 0.5} and not start["program"]
    asked = {"setting": {**start["setting"], "values": {"window": 4}}}
    assert playground.answer("view", asked)["fine"]["counts"]["full"] == 64 * 4 - 6 + sum(
        max(0, min(2, q - 3)) for q in range(64)
    )
    assert "must be at least 1" in playground.answer("view", {"setting": {"q_len": 64, "values": {"window": 0}}})["refused"]
    assert "lies outside" in playground.answer("pair", {**asked, "q_idx": 64})["refused"]
    assert "q_idx must be a whole number; got 'x'" in playground.answer("pair", {**asked, "q_idx": "x"})["refused"]
    assert "chooses nothing" in playground.answer("program", asked)["refused"]
    for name in FACTS:
        assert playground.answer(name, asked)["text"]
    assert playground.answer("causal", asked)["status"] == "PROVED"
    leaky = Playground(f"{mine}:leaky", {}, Setting(64))
    assert leaky.answer("causal", {"setting": {"q_len": 64}})["witness"]["kv_idx"] == 1
    tabled = Playground(f"{mine}:tabled", {}, Setting(64))
    assert "doc" in tabled.answer("view", {"setting": {"q_len": 64}})["refused"]
    assert "refused" not in Playground(f"{mine}:tabled", {"doc": torch.arange(64)}, Setting(64)).answer(
        "view", {"setting": {"q_len": 64}}
    )


def test_a_file_is_read_again(mine, tmp_path):
    playground = Playground(f"{mine}:leaky", {}, Setting(64))
    playground.answer("start", {})
    (tmp_path / "viewed.py").write_text("import sparsedsl as sd\nleaky = (sd.kv_idx <= sd.q_idx) and (sd.kv_idx > 3)\n")
    refused = playground.answer("start", {})["refused"]
    assert "while importing" in refused and "&" in refused


def test_a_call_of_a_program_shows_what_it_chose():
    program = sd.Program(P.moba(chunk=8, top_k=2))
    found = random_call(program, Setting(q_len=64, head=1), {})
    weights, chosen = (codes(layer) for layer in found["layers"])
    assert weights.shape == (64, 64) and chosen.shape == (64, 8)
    for q in range(64):
        blocks = {kv // 8 for kv in np.flatnonzero(weights[q])}
        assert blocks <= {q // 8, *np.flatnonzero(chosen[q])} and len(blocks) <= 2
        assert not weights[q, q + 1 :].any()
    assert found == random_call(program, Setting(q_len=64, head=1), {})
    assert found != random_call(program, Setting(q_len=64, head=1, seed=1), {})


@pytest.mark.parametrize(
    "program", [P.hsa(chunk=8, top_k=2), P.nha(slots=4, window=8), P.token_sparse(), P.ring_linear([0.8, 0.98]), P.nsa()]
)
def test_every_kind_of_program_has_a_call(program):
    found = random_call(sd.Program(program), Setting(q_len=64), {})
    assert found["layers"] and found["notes"]


def kept_data(text):
    return json.loads(re.search(r"const DATA = (.*?);</script>", text)[1])


def test_a_file_without_a_server(mine):
    setting = Setting(q_len=300, q_block=16, kv_block=16, values=(("window", 7),))
    text = standalone(Subject(f"{mine}:make"), setting, {})
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "</script" not in kept_data(text)["kept"]["facts"]["source"]["text"]
    kept = kept_data(text)["kept"]
    assert [level["cell"][0] for level in kept["levels"]] == [2, 1]
    pairs = np.array([[kv <= q and (q - kv < 7 or kv < 2) for kv in range(300)] for q in range(300)])
    assert kept["tiles"]["cell"] == [16, 16]
    for level in (*kept["levels"], kept["tiles"]):
        assert_layer_is_what_pairs_say(level, pairs, 0)
    assert kept["conditions"]["tree"]["word"] == "all of" and len(kept["conditions"]["layers"]) >= 2
    assert kept["facts"]["causal"]["status"] == "PROVED"
    program = kept_data(standalone(Subject("sparsedsl.patterns:moba"), Setting(64), {}))["kept"]
    assert program["program"]["layers"] and "<svg" in program["graph"]["dark"]["svg"]


def test_a_file_of_a_million_tokens_is_small():
    text = standalone(Subject("sparsedsl.patterns:streaming_llm"), Setting(q_len=1 << 20), {})
    assert len(text) < 1_500_000


def test_only_the_page_of_the_server_is_answered():
    server = serve(Playground("sparsedsl.patterns:causal", {}, Setting(64)))
    import threading

    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    port = server.server_address[1]

    def status(path="/start", body=b"{}", **headers):
        words = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
        asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, words)
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    try:
        assert server.server_address[0] == "127.0.0.1"
        assert status() == 200 and status("/", None) == 200 and status("/etc/passwd", None) == 404
        assert status(Origin=f"http://127.0.0.1:{port}") == 200
        assert status(Origin="http://elsewhere.example") == 403 and status(Host="elsewhere.example") == 403
        assert status(Content_Type="text/plain") == 400 and status(body=b"[]") == 400 and status("/nothing") == 400
    finally:
        server.shutdown()
        server.server_close()


def test_the_command_writes_a_file(mine, tmp_path, capsys):
    out = tmp_path / "out.html"
    assert main(["view", f"{mine}:make", "--q-len", "128", "--set", "window=4", "--set", "causal=false", "--html", str(out)]) == 0
    assert kept_data(out.read_text())["kept"]["start"]["setting"]["values"]["window"] == 4
    assert capsys.readouterr().out.strip() == str(out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["make", "--set", "window"], "--set wants NAME=VALUE"),
        (["make", "--set", "window=x"], "--set wants NAME=VALUE"),
        (["make", "--port", "70000"], "--port must be 0"),
        (["make", "--q-len", "0"], "q_len must be a whole number of at least 1"),
        (["make", "--set", "window=0", "--html", "x.html"], "must be at least 1"),
        (["tabled", "--html", "x.html"], "--table doc=doc.pt"),
        (["nothing"], "has no 'nothing'"),
    ],
)
def test_the_command_says_what_is_wrong(mine, words, message, capsys):
    assert main(["view", f"{mine}:{words[0]}", *words[1:]]) == 2
    assert message in capsys.readouterr().err
