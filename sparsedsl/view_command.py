"""``python -m sparsedsl view SPEC``: the playground in a browser, or as one file."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import webbrowser
from pathlib import Path
from typing import Any

from sparsedsl.errors import ArgumentError, SparseDSLError
from sparsedsl.specs import given_tables, load_tables
from sparsedsl.working import written

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
examples:
  python -m sparsedsl view sparsedsl.patterns:streaming_llm
  python -m sparsedsl view my_patterns.py:mine --q-len 65536 --port 8080 --no-browser
  python -m sparsedsl view my_patterns.py:make --set window=512 --html mine.html

The name may also be a function of numbers, as make(window: int = 64, causal: bool = True): each becomes a slider.
The page is served to this machine alone, until Ctrl-C; reloading it reads the file again. --html writes one file instead, which shows
one setting without a server and without a network. A program shows one call on random rows, and its graph."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of ``view`` beside SPEC and ``--table``."""
    command.add_argument("--q-len", type=int, default=4096, metavar="N", help="number of queries to begin with (default 4096)")
    command.add_argument("--kv-len", type=int, metavar="N", help="number of keys (default: up to the last query)")
    command.add_argument("--q-offset", type=int, default=0, metavar="N", help="position of the first query (default 0)")
    command.add_argument("--head", type=int, default=0, metavar="N", help="head to begin with (default 0)")
    command.add_argument("--block-size", type=int, default=128, metavar="N", help="tokens in a tile (default 128)")
    command.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter to begin with; may be given more than once"
    )
    command.add_argument("--port", type=int, default=0, metavar="N", help="port of the page (default: a free one)")
    command.add_argument("--no-browser", action="store_true", help="print the address and open nothing")
    command.add_argument("--html", type=Path, metavar="PATH", help="write the page as one file that needs no server, and end")


def run(arguments: argparse.Namespace) -> int:
    """Serve until interrupted, or write the file."""
    from sparsedsl.view.page import standalone
    from sparsedsl.view.server import Playground, serve
    from sparsedsl.view.setting import Setting
    from sparsedsl.view.subject import Subject

    if not 0 <= arguments.port < 1 << 16:
        raise ArgumentError(f"--port must be 0, for a free one, or up to 65535; got {arguments.port}")
    numbers = {name: getattr(arguments, name) for name in ("q_len", "kv_len", "q_offset", "head")}
    numbers |= {"q_block": arguments.block_size, "kv_block": arguments.block_size}
    setting = Setting.read(numbers | {"values": dict(_value(word) for word in arguments.set)})
    if arguments.html is not None:
        subject = Subject(arguments.spec)
        made = subject.make(dict(setting.values))
        tables = load_tables(made, arguments.table)
        page = standalone(subject, setting, tables)
        written(arguments.html, lambda path: path.write_text(page, encoding="utf-8"))
        print(arguments.html)
        return 0
    tables = given_tables(arguments.table)
    with contextlib.suppress(SparseDSLError):  # what is refused, the page says; what cannot be loaded at all ends here
        Subject(arguments.spec)
    server = serve(Playground(arguments.spec, tables, setting), arguments.port)
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    print(f"{arguments.spec} at {address} (Ctrl-C ends it)", flush=True)
    if not arguments.no_browser:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(file=sys.stderr)
    finally:
        server.server_close()
    return 0


def _value(word: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    try:
        if not equals or not name:
            raise ValueError
        return name, json.loads({"True": "true", "False": "false"}.get(value, value))
    except ValueError:
        raise ArgumentError(f"--set wants NAME=VALUE with a number, true or false, as in --set window=64; got {word!r}") from None
