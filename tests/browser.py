"""A headless Chromium, driven over the WebDriver protocol with the standard library alone."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

KEYS = {"Tab": "\ue004", "Enter": "\ue007", "Space": " ", "Home": "\ue011", "End": "\ue010", "Escape": "\ue00c"} | {
    f"Arrow{name}": chr(0xE012 + index) for index, name in enumerate(("Left", "Up", "Right", "Down"))
}
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """A session of a browser. Logs hold what the page requested and what the console reported.

    Args:
        port: of its driver.
        script: let pages run scripts.
    """

    def __init__(self, port: int, script: bool) -> None:
        self._address = f"http://127.0.0.1:{port}"
        self._wait_until_ready()
        options = {
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"],
            "prefs": {} if script else {"profile.managed_default_content_settings.javascript": 2},
            "perfLoggingPrefs": {"enableNetwork": True, "enablePage": False},
        }
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = self._call("/session", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]
        self._session = f"/session/{session}"

    def open(self, path: Path) -> None:
        """Open a file, and wait until the page is whole."""
        self._call(f"{self._session}/url", {"url": path.as_uri()})
        self.wait("return document.documentElement.dataset.ready === 'yes'")

    def text(self, path: Path) -> str:
        """Open a file, and return the text that is visible."""
        self._call(f"{self._session}/url", {"url": path.as_uri()})
        body = self._call(f"{self._session}/element", {"using": "css selector", "value": "body"})[ELEMENT]
        text: str = self._call(f"{self._session}/element/{body}/text")
        return text

    def run(self, script: str, *arguments: Any) -> Any:
        return self._call(f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.05)

    def press(self, *names: str) -> None:
        """Press and release keys, one after the other."""
        actions = [{"type": kind, "value": KEYS[name]} for name in names for kind in ("keyDown", "keyUp")]
        self._act({"type": "key", "id": "keyboard", "actions": actions})

    def point(self, selector: str) -> None:
        """Move the pointer onto an element."""
        self.run(
            "document.querySelector(arguments[0]).scrollIntoView({block: 'center', behavior: 'instant'})", selector
        )
        element = self._call(f"{self._session}/element", {"using": "css selector", "value": selector})
        move = {"type": "pointerMove", "duration": 10, "x": 0, "y": 0, "origin": element}
        self._act({"type": "pointer", "id": "mouse", "actions": [move]})

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self._call(f"{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def resize(self, width: int) -> None:
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)

    def media(self, kind: str = "screen", scheme: str = "light") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", media=kind, features=features)

    def requests(self) -> list[str]:
        """Return the addresses that were requested since the last call."""
        entries = (json.loads(entry["message"])["message"] for entry in self._log("performance"))
        return [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]

    def console(self) -> list[str]:
        return [entry["message"] for entry in self._log("browser")]

    def pdf(self) -> bytes:
        return base64.b64decode(self.devtools("Page.printToPDF", printBackground=True)["data"])

    def close(self) -> None:
        self._call(self._session, method="DELETE")

    def _act(self, action: dict[str, Any]) -> None:
        self._call(f"{self._session}/actions", {"actions": [action]})

    def _log(self, kind: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._call(f"{self._session}/se/log", {"type": kind})
        return found

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                self._call("/status")
                return
            except OSError:
                assert time.monotonic() < deadline, "chromedriver does not answer"
                time.sleep(0.1)

    def _call(self, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._address + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]


@contextmanager
def open_browser(script: bool = True) -> Iterator[Browser]:
    """Start a browser; skip the test where there is none."""
    driver = shutil.which("chromedriver")
    if driver is None or not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no Chromium: apt-get install -y --no-install-recommends chromium chromium-driver")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        browser = Browser(port, script)
        try:
            yield browser
        finally:
            browser.close()
    finally:
        process.terminate()
        process.wait()
