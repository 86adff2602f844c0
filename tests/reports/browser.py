"""Chromium without a window, driven by the DevTools protocol over a pipe: no driver, no port, no package."""

import base64
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"),
    *("--disable-background-networking", "--disable-component-update", "--no-first-run", "--hide-scrollbars"),
    *("--disable-extensions", "--disable-sync", "--metrics-recording-only", "--disable-default-apps", "about:blank"),
)
# Chromium reads commands from descriptor 3 and answers on 4.
LAUNCH = (
    "import os, sys; reads, writes = int(sys.argv[1]), int(sys.argv[2]); "
    "os.dup2(reads, 3); os.dup2(writes, 4); os.execv(sys.argv[3], sys.argv[3:])"
)
PATIENCE = 60  # seconds for one answer


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One process; `page` opens a file in a tab of its own."""

    def __init__(self, profile: Path):
        reads, self._to = _high_pipe()
        self._from, writes = _high_pipe()
        command = [sys.executable, "-c", LAUNCH, str(reads), str(writes), find_chromium()]
        self.process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", *FLAGS],
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        self._buffer, self._number = b"", 0
        self.events: list[dict] = []

    def close(self) -> None:
        try:
            self.call("Browser.close")
            self.process.wait(timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, session: str | None = None, **parameters):
        """The answer of one command; what it reports meanwhile goes to `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + PATIENCE
        while True:
            found = self._receive(until)
            if found.get("id") == self._number:
                assert "error" not in found, f"{method}: {found['error']}"
                return found["result"]
            self.events.append(found)

    def _receive(self, until: float) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, until - time.monotonic()))
            assert ready, "Chromium does not answer"
            data = os.read(self._from, 1 << 20)
            assert data, "Chromium has ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def page(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False, scripts: bool = True):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Page(self, target, session, path, width=width, height=height, dark=dark, scripts=scripts)


class Page:
    """A file, opened at a width of so many pixels."""

    def __init__(self, browser: Browser, target: str, session: str, path: Path, *, width, height, dark, scripts):
        self._browser, self._target, self._session = browser, target, session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        mobile = width < 700
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call("Page.navigate", url=path.as_uri() if isinstance(path, Path) else path)
        until = time.monotonic() + PATIENCE
        while not self._seen("Page.loadEventFired"):
            self._browser.events.append(self._browser._receive(until))
        if scripts:
            self.settle()

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)

    def call(self, method: str, **parameters):
        return self._browser.call(method, self._session, **parameters)

    def settle(self) -> None:
        """Waits for two frames, in which observers run and what they change is drawn."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def run(self, script: str):
        """The value of an expression in the page; a promise is awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def click(self, x: float, y: float) -> None:
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)
        self.settle()

    def hover(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.settle()

    def press(self, key: str) -> None:
        text = {"Enter": "\r", "Space": " "}.get(key)
        for kind in ("keyDown", "keyUp"):
            name = " " if key == "Space" else key
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=name,
                code=key,
                **({"text": text} if text and kind == "keyDown" else {}),
            )
        self.settle()

    def type(self, selector: str, text: str) -> None:
        """Puts `text` into a field, as the keyboard does."""
        self.run(f"(() => {{ const field = document.querySelector({selector!r}); field.focus(); field.select(); }})()")
        self.call("Input.insertText", text=text)
        self.settle()

    def screenshot(self, *, whole: bool = False) -> np.ndarray:
        """(H, W, 3) uint8 in [0, 255], of what is to be seen or of the whole page."""
        from PIL import Image

        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings: exceptions, the console, violated policies, failed loads."""
        found = []
        for event in self._mine():
            details = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(details["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded":
                found.append(details["entry"]["text"])
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(json.dumps(details["args"]))
        return found

    @property
    def requests(self) -> list[str]:
        return [e["params"]["request"]["url"] for e in self._mine() if e["method"] == "Network.requestWillBeSent"]

    def _mine(self) -> list[dict]:
        return [event for event in self._browser.events if event.get("sessionId") == self._session]

    def _seen(self, method: str) -> bool:
        return any(event["method"] == method for event in self._mine())


def _high_pipe() -> tuple[int, int]:
    """A pipe whose ends are not among the descriptors that Chromium is given."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in ends)
    for end in ends:
        os.close(end)
    return high
