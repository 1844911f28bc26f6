"""A real browser without a screen, for tests of the page and for its pictures. No test itself."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["missing_browser", "open_browser", "served"]


def missing_browser() -> str:
    """Why there is no browser to test with; empty where there is one."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed: pip install '.[test]'"
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        return "no chromium with chromedriver: apt-get install chromium chromium-driver"
    return ""


@contextlib.contextmanager
def open_browser(width: int = 1400, height: int = 900) -> Iterator[Any]:
    """A selenium driver of a new Chromium, closed at the end."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for word in (
            "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
            "disable-component-update", "disable-sync", "disable-dev-shm-usage", f"user-data-dir={folder}",
            f"window-size={width},{height}", "force-device-scale-factor=1", "hide-scrollbars",
        ):  # fmt: skip
            options.add_argument(f"--{word}")
        service = webdriver.ChromeService(str(shutil.which("chromedriver")))
        driver = webdriver.Chrome(options, service)
        try:
            driver.set_script_timeout(120)
            yield driver
        finally:
            driver.quit()


@contextlib.contextmanager
def served(spec: str, tables: dict[str, Any] | None = None, **setting: Any) -> Iterator[str]:
    """The address of a playground, served while the block runs."""
    from sparsedsl.view.server import Playground, serve
    from sparsedsl.view.setting import Setting

    server = serve(Playground(spec, tables or {}, Setting.read(setting)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
