"""Answers to the page, from this machine to this machine. Built on ``http.server``.

A page of our own, and not Bokeh or Panel: the map is one canvas whose cells come from the tile analysis, which a widget library would only
wrap; the page must also be one file that works from a disk without a network, where their scripts alone weigh megabytes; and so the
playground needs no package beside what a pattern needs.

Only requests that name this server as their host, and come from its own page, are answered: other pages in the same browser cannot ask.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sparsedsl.errors import PatternError, SparseDSLError
from sparsedsl.lang.pattern import Pattern
from sparsedsl.program.graph import Program
from sparsedsl.settings import settings
from sparsedsl.specs import CannotLoad
from sparsedsl.view.facts import FACTS, fact
from sparsedsl.view.page import page
from sparsedsl.view.random_call import graph_picture, random_call
from sparsedsl.view.scene import Scene
from sparsedsl.view.setting import Setting
from sparsedsl.view.subject import Subject

__all__ = ["Playground", "serve"]

# Settings whose scenes are kept; bytes of a question at most.
KEPT, QUESTION = 16, 1 << 16


class Playground:
    """The answers, without any web: a question by its name and a mapping -> a mapping. What is refused is ``{"refused": message}``.

    >>> playground = Playground("sparsedsl.patterns:sliding_window", {}, Setting(q_len=64))
    >>> playground.answer("start", {})["parameters"][0]["name"]
    'w'
    >>> asked = {"setting": {"q_len": 64, "values": {"w": 4}}, "q_idx": 9, "kv_idx": 3}
    >>> playground.answer("pair", asked)["allowed"]
    False
    >>> playground.answer("view", {"setting": {"q_len": 0}})["refused"]
    'q_len must be a whole number of at least 1; got 0 (int)'
    """

    def __init__(self, spec: str, tables: Mapping[str, Any], setting: Setting):
        self.spec, self.tables, self.setting = spec, dict(tables), setting
        self._subject: Subject | None = None
        self._made: OrderedDict[Setting, Any] = OrderedDict()
        # Looks at the map do not wait for proofs; each kind of question is answered one at a time.
        self._looking, self._proving = threading.RLock(), threading.Lock()
        self.answers = {
            "start": self._start, "view": self._view, "pair": self._pair, "program": self._program, "graph": self._graph,
            **{name: self._fact(name) for name in FACTS},
        }  # fmt: skip

    def answer(self, name: str, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a question of the page."""
        start = time.perf_counter()
        try:
            with self._proving if name in FACTS else self._looking:
                found = self.answers[name](question)
        except (SparseDSLError, CannotLoad) as error:
            found = {"refused": str(error)}
        except Exception as error:  # the page says it: nobody looks at the terminal
            if settings().debug:
                raise
            found = {"refused": f"a fault of sparsedsl: {type(error).__name__}: {error}. SPARSEDSL_DEBUG=1 shows where"}
        return found | {"seconds": time.perf_counter() - start}

    def _start(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Read the file (again) and say what there is to set."""
        self._subject, first = None, self.setting
        self._made.clear()
        subject = self._read()
        values = subject.defaults | dict(first.values)
        setting = {name: getattr(first, name) for name in Setting.__dataclass_fields__} | {"values": values}
        found = {"name": self.spec, "parameters": subject.described(), "setting": setting, "program": False}
        try:
            made = subject.make(values)
        except (SparseDSLError, CannotLoad) as error:
            return found | {"refused": str(error)}
        exprs = made.exprs if isinstance(made, Pattern) else ()
        symbols = {symbol.name for expr in exprs for symbol in expr.free_symbols}
        program = isinstance(made, Program)
        return found | {"program": program, "reads_head": program or "h" in symbols, "reads_batch": "b" in symbols}

    def _read(self) -> Subject:
        if self._subject is None:
            self._subject = Subject(self.spec)
        return self._subject

    def _pattern(self, question: Mapping[str, Any]) -> tuple[Pattern | Program, Setting]:
        setting = Setting.read(question.get("setting", {}))
        return self._read().make(dict(setting.values)), setting

    def _scene(self, question: Mapping[str, Any]) -> Scene:
        """The scene of a setting; kept, for the next move of the map."""
        setting = Setting.read(question.get("setting", {}))
        if setting not in self._made:
            pattern, _ = self._pattern(question)
            if isinstance(pattern, Program):
                raise CannotLoad(f"{self.spec} is a program, whose pairs follow from a call")
            tables = {name: tensor for name, tensor in self.tables.items() if name in pattern.tables}
            self._made[setting] = Scene(pattern, setting, tables)
            while len(self._made) > KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end(setting)
        return self._made[setting]

    def _view(self, question: Mapping[str, Any]) -> dict[str, Any]:
        scene = self._scene(question)
        all_q, all_kv = scene.place.queries, range(scene.place.kv_len)
        queries = range(_whole(question, "q0", all_q.start), _whole(question, "q1", all_q.stop))
        keys = range(_whole(question, "kv0", 0), _whole(question, "kv1", all_kv.stop))
        return scene.view(queries, keys, _whole(question, "most", 400))

    def _pair(self, question: Mapping[str, Any]) -> dict[str, Any]:
        return self._scene(question).pair(_whole(question, "q_idx", 0), _whole(question, "kv_idx", 0))

    def _program(self, question: Mapping[str, Any]) -> dict[str, Any]:
        program, setting = self._pattern(question)
        if not isinstance(program, Program):
            raise CannotLoad(f"{self.spec} chooses nothing")
        return random_call(program, setting, self.tables)

    def _graph(self, question: Mapping[str, Any]) -> dict[str, Any]:
        program, setting = self._pattern(question)
        if not isinstance(program, Program):
            raise CannotLoad(f"{self.spec} has no graph of nodes")
        return {"svg": graph_picture(program, setting, str(question.get("theme", "light")))}

    def _fact(self, name: str) -> Any:
        def answer(question: Mapping[str, Any]) -> dict[str, Any]:
            pattern, setting = self._pattern(question)
            tables = {key: tensor for key, tensor in self.tables.items() if key in pattern.tables}
            return fact(name, pattern, setting, tables)

        return answer


def _whole(question: Mapping[str, Any], name: str, default: int) -> int:
    value = question.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise PatternError(f"{name} must be a whole number; got {value!r}")
    return value


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal belongs to the user."""

    def do_GET(self) -> None:
        """The page."""
        if not self._ours():
            return
        if self.path.split("?")[0] != "/":
            self._send(404, "text/plain", b"there is one page, /\n")
            return
        self._send(200, "text/html; charset=utf-8", page().encode())

    def do_POST(self) -> None:
        """A question of the page, as JSON."""
        if not self._ours():
            return
        size, name = self.headers.get("Content-Length", ""), self.path.strip("/")
        if not size.isdecimal() or int(size) > QUESTION or self.headers.get_content_type() != "application/json":
            self.close_connection = True
            self._send(400, "text/plain", b"a question is JSON of at most 64 KiB\n")
            return
        asked = self.rfile.read(int(size))
        try:
            question = json.loads(asked)
        except ValueError:
            question = None
        if not isinstance(question, dict) or name not in self.server.playground.answers:
            self._send(400, "text/plain", b"no such question\n")
            return
        answer = self.server.playground.answer(name, question)
        self._send(200, "application/json", json.dumps(answer).encode())

    def _ours(self) -> bool:
        """Whether the request means this server and comes from its page, not from another page by way of the browser."""
        port = self.server.server_address[1]
        hosts = {f"{host}:{port}" for host in ("127.0.0.1", "localhost")}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in hosts and origin in {None, *(f"http://{host}" for host in hosts)}:
            return True
        self.close_connection = True
        self._send(403, "text/plain", b"only the page of this server may ask\n")
        return False

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, playground: Playground, port: int):
        self.playground = playground
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone away is no error; anything else is shown."""
        import sys

        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def serve(playground: Playground, port: int = 0) -> _Server:
    """A server on the loopback address alone, not yet running; port 0 takes a free one. ``serve_forever()`` runs it.

    >>> server = serve(Playground("sparsedsl.patterns:causal", {}, Setting(q_len=64)))
    >>> server.server_address[0]
    '127.0.0.1'
    >>> server.server_close()
    """
    return _Server(playground, port)
