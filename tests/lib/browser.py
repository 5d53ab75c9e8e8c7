"""A headless Chromium, driven through its DevTools protocol on a pair of pipes."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 300.0
"""Seconds until a wait is given up. Only a broken page meets it, however slow the machine is."""


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Refused(AssertionError):
    """What the browser or the page's script says to a call."""


class Browser:
    """One page. Calls raise `Refused`."""

    def __init__(self, profile: Path, width: int = 1200, height: int = 800) -> None:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()

        def as_3_and_4() -> None:  # the numbers that Chromium reads from and writes to
            reading, writing = os.dup(to_browser), os.dup(from_browser)
            os.dup2(reading, 3)
            os.dup2(writing, 4)

        command = [
            str(find_browser()),
            "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
            "--disable-dev-shm-usage", f"--window-size={width},{height}",
            f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command,
            preexec_fn=as_3_and_4,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._numbers = itertools.count(1)
        self._buffer = b""
        self.console: list[str] = []  # errors that the page has logged
        page = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, **params: Any) -> Any:
        """A command to the page."""
        return self._call(method, self._session, **params)

    def _call(self, method: str, session: str | None = None, **params: Any) -> Any:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == number:
                if "error" in reply:
                    raise Refused(reply)
                return reply["result"]
            if reply.get("method") == "Runtime.exceptionThrown":
                self.console.append(str(reply["params"]["exceptionDetails"]))
            elif reply.get("method") == "Log.entryAdded":
                entry = reply["params"]["entry"]
                if entry["level"] == "error":
                    self.console.append(str(entry))

    def _receive(self) -> Any:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], PATIENCE)
            assert ready, "the browser says nothing"
            data = os.read(self._read, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def evaluate(self, script: str) -> Any:
        """Value of a JavaScript expression; promises are awaited."""
        reply = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in reply:
            raise Refused(reply["exceptionDetails"])
        return reply["result"].get("value")

    def wait(self, script: str) -> Any:
        """The first true value of an expression, which may fail before, as while a page loads."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with contextlib.suppress(Refused):
                if value := self.evaluate(script):
                    return value
            time.sleep(0.05)
        text = self.evaluate("document.body.innerText")
        raise AssertionError(f"{script!r} did not become true; the page says: {text}")

    def click(self, selector: str, index: int = 0) -> None:
        """Click on an element as soon as it is there and can be clicked on."""
        element = f"document.querySelectorAll({json.dumps(selector)})[{index}]"
        self.wait(f"(e => e && !e.disabled && (e.click(), true))({element})")

    def choose_file(self, selector: str, path: Path) -> None:
        """Give a file to an <input type=file>, as a user does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """The visible part as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
