"""Chromium, driven over two pipes in its own protocol: what a reader of our pages sees, clicks and types."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tab:
    """One page of a browser. Raises RuntimeError for what the browser refuses, and for what a page's script throws."""

    def __init__(self, orders: BinaryIO, answers: BinaryIO) -> None:
        self._orders, self._answers = orders, answers
        self._numbers, self._session, self._rest, self._seen = itertools.count(1), "", b"", set[str]()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends one command and returns its result."""
        number = next(self._numbers)
        order = {"id": number, "method": method, "params": params}
        order |= {"sessionId": self._session} if self._session else {}
        self._orders.write(json.dumps(order).encode() + b"\0")
        self._orders.flush()
        while (message := self._message()).get("id") != number:
            self._seen.add(message.get("method", ""))
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        result: dict[str, Any] = message["result"]
        return result

    def open(self, page: Path | str, *, width: int, height: int = 900, scripts: bool = True) -> None:
        """Opens a file, or an address, at a window's size in pixels and waits until it has loaded."""
        self.resize(width=width, height=height)
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self._seen.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while "Page.loadEventFired" not in self._seen:
            self._seen.add(self._message().get("method", ""))

    def resize(self, *, width: int, height: int = 900) -> None:
        """Makes the window this large, in pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def width(self) -> float:
        """The pixels that the page takes from left to right; more than the window's, and it scrolls sideways."""
        width: float = self.call("Page.getLayoutMetrics")["cssContentSize"]["width"]
        return width

    def count(self, selector: str) -> int:
        """How many elements there are; also where scripts do not run."""
        document = self.call("DOM.getDocument", depth=0)["root"]["nodeId"]
        return len(self.call("DOM.querySelectorAll", nodeId=document, selector=selector)["nodeIds"])

    def see(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def until(self, condition: str) -> None:
        """Draws one frame after the other until a condition in JavaScript holds: what follows a resize comes late."""
        self.see(
            f"new Promise(done => {{(function look() {{ ({condition}) ? done() : requestAnimationFrame(look) }})()}})"
        )

    def click(self, selector: str) -> None:
        """Clicks the middle of an element with the mouse."""
        x, y = self.see(
            f"(e => {{e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
            f"return [r.x + r.width / 2, r.y + r.height / 2]}})(document.querySelector({selector!r}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Presses a key of the keyboard by its name, such as ArrowDown."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_KEYS[key])

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            read = os.read(self._answers.fileno(), 1 << 20)
            if not read:
                raise RuntimeError("the browser has ended")
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded


_KEYS = {"Tab": 9, "ArrowDown": 40, "ArrowUp": 38, "Enter": 13}


@contextmanager
def browse(profile: Path) -> Iterator[Tab]:
    """A browser without a window, its files in `profile`."""
    assert CHROMIUM is not None
    orders, to_browser = os.pipe()
    from_browser, answers = os.pipe()
    command = [CHROMIUM, "--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run"]
    command += [f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    process = subprocess.Popen(  # the browser reads its orders from file 3 and writes its answers to file 4
        ["bash", "-c", f'exec "$@" 3<&{orders} 4>&{answers}', "bash", *command],
        pass_fds=(orders, answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(orders)
    os.close(answers)
    try:
        with os.fdopen(to_browser, "wb") as orders_file, os.fdopen(from_browser, "rb") as answers_file:
            yield Tab(orders_file, answers_file)
    finally:
        process.terminate()
        process.wait(120)
