"""A headless Chromium, and what a page does in it: driven over its own protocol, with a time-out for everything."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tornado.websocket import WebSocketClientConnection, websocket_connect

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-sync",
    "--disable-extensions", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip
_SECONDS = 60


class Page:
    """One page: what it asked the network for, what it complained of, and what a script in it answers."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: WebSocketClientConnection) -> None:
        self._loop, self._socket, self._last = loop, socket, 0
        self._session: str | None = None
        self.requests: list[str] = []
        """Every address it asked for, but for its own file."""
        self.errors: list[str] = []
        """Exceptions, errors in the console, and what its Content-Security-Policy refused."""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command, answered."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), _SECONDS))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._last += 1
        number = self._last
        session = {} if self._session is None else {"sessionId": self._session}
        await self._socket.write_message(json.dumps({"id": number, "method": method, "params": parameters, **session}))
        while True:
            answer = await self._socket.read_message()
            assert answer is not None, "the browser is gone"
            message = json.loads(answer)
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self._note(message.get("method", ""), message.get("params", {}))

    def _note(self, method: str, said: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            address = said["request"]["url"]
            if address != said["documentURL"] and not address.startswith("data:"):  # what the page itself holds
                self.requests.append(address)
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(said["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "assert"):
            self.errors.append(str(said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.errors.append(said["entry"]["text"])

    def open(self, path: Path, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """Show a file in a window of this size."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("location.protocol === 'file:' && document.readyState === 'complete'")

    def ask(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str) -> Any:
        """The value of an expression once it is true."""
        deadline = time.monotonic() + _SECONDS
        while not (value := self.ask(script)):
            assert time.monotonic() < deadline, f"never true: {script}; {self.errors}"
            time.sleep(0.05)
        return value

    def move(self, x: float, y: float) -> None:
        """Put the mouse there."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, path: Path) -> None:
        """Take a screenshot of the window."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser() -> Iterator[Page]:
    """A browser of its own, gone afterwards with all of its processes."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, env={**os.environ, "HOME": profile},
        )  # fmt: skip
        loop = asyncio.new_event_loop()
        try:
            address = _address(process, Path(profile) / "DevToolsActivePort")
            connection = loop.run_until_complete(asyncio.wait_for(_connect(address), _SECONDS))
            yield Page(loop, connection)
            connection.close()
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=_SECONDS)
            loop.close()


async def _connect(address: str) -> WebSocketClientConnection:
    return await websocket_connect(address, max_message_size=1 << 28)


def _address(process: subprocess.Popen[bytes], file: Path) -> str:
    """Where it listens, on this machine alone; it writes this down once it does."""
    deadline = time.monotonic() + _SECONDS
    while not (file.is_file() and len(lines := file.read_text().splitlines()) == 2):
        assert process.poll() is None and time.monotonic() < deadline, "the browser did not start"
        time.sleep(0.05)
    return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
