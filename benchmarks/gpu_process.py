"""A process of ``gpu_worker.py`` seen from ``gpu.py``: asked one thing at a time, with a limit on how long it may take."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

__all__ = ["Process", "ProcessDied"]

WORKER = Path(__file__).resolve().parent / "gpu_worker.py"
ROOT = WORKER.parent.parent


class ProcessDied(Exception):
    """The process ended or was ended; ``at``: what it had said it was about to do."""

    def __init__(self, why: str, at: str) -> None:
        super().__init__(f"{why} at {at}")
        self.at = at


class Process:
    """A worker; what it prints goes to the end of ``log``, or is kept until it ends, for the reason."""

    def __init__(self, device: str, ours: str, env: dict[str, str], log: Path | None) -> None:
        self.at, self._last_words = "start", ""
        # Closed in `end`.
        self._printed = log.open("a+") if log is not None else tempfile.TemporaryFile("w+")  # noqa: SIM115
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process: Any = subprocess.Popen(
            [sys.executable, str(WORKER), device, ours],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            text=True,
            env={**os.environ, **env, "PYTHONPATH": path},
            start_new_session=True,  # so that what it started can be ended with it
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """The answer; :class:`ProcessDied` if the process ends first, or has not answered after ``limit_s`` and is ended."""
        until = time.monotonic() + limit_s
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._death("ended") from None
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise self._death(f"no answer after {limit_s:.0f} s") from None
            if line is None:
                raise self._death("ended")
            answer = json.loads(line)
            if "result" in answer:
                return dict(answer["result"])
            self.at = answer["at"]

    def _death(self, why: str) -> ProcessDied:
        self.end()
        return ProcessDied(f"{why}: {self._last_words}" if self._last_words else why, self.at)

    def end(self) -> None:
        """End it and what it started, and keep the last of what it printed."""
        if self._printed.closed:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(OSError):  # what was not read any more
            self._process.stdin.close()
        self._printed.seek(0)
        lines = [line for line in self._printed.read().splitlines() if line.strip()]
        self._last_words = lines[-1][:300] if lines else ""
        self._printed.close()
