"""A run on a host, watched: the websocket's messages, what was cached, and errors in plain words.

The websocket client is the little that is needed, so that the tests need no further library: text frames from
the server, no extensions (RFC 6455).
"""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import time
import urllib.error
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.host.booted import Host

TEXT, CLOSE, PING, PONG = 1, 8, 9, 10


class Refused(Exception):
    """The host did not take the prompt: a link or a value was wrong."""


class Socket:
    """The host's ``/ws``, as the page listens to it."""

    def __init__(self, host: Host, timeout: float = 300) -> None:
        self.client_id = uuid.uuid4().hex
        self._socket = socket.create_connection(("127.0.0.1", host.port), timeout=timeout)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            (
                f"GET /ws?clientId={self.client_id} HTTP/1.1\r\nHost: 127.0.0.1:{host.port}\r\n"
                f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
                "Sec-WebSocket-Version: 13\r\n\r\n"
            ).encode()
        )
        self._file = self._socket.makefile("rb")
        assert b"101" in self._file.readline()
        while self._file.readline().strip():
            pass

    def messages(self) -> Iterator[dict[str, Any]]:
        """Every text message; pictures of previews are skipped."""
        while True:
            kind, body = self._frame()
            if kind == CLOSE:
                return
            if kind == PING:
                self._answer(PONG, body)
            if kind == TEXT:
                yield json.loads(body)

    def _frame(self) -> tuple[int, bytes]:
        first, second = self._read(2)
        size = second & 127
        if size == 126:
            (size,) = struct.unpack(">H", self._read(2))
        elif size == 127:
            (size,) = struct.unpack(">Q", self._read(8))
        return first & 15, self._read(size)

    def _read(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise ConnectionError("the host closed the websocket")
        return bytes(data)

    def _answer(self, kind: int, body: bytes) -> None:
        mask = os.urandom(4)
        masked = bytes(b ^ mask[i % 4] for i, b in enumerate(body))
        self._socket.sendall(bytes([128 | kind, 128 | len(body)]) + mask + masked)

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Run:
    """What came of a prompt: its history entry, and the websocket's messages about it."""

    entry: dict[str, Any]
    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def status(self) -> str:
        """``success`` or ``error``."""
        return str(self.entry["status"]["status_str"])

    def event(self, kind: str) -> dict[str, Any]:
        """The last event of a kind in the history; empty when there was none."""
        found = [data for name, data in self.entry["status"]["messages"] if name == kind]
        return dict(found[-1]) if found else {}

    @property
    def cached(self) -> set[str]:
        return set(self.event("execution_cached").get("nodes", ()))

    @property
    def error(self) -> str:
        """``node: message`` of what stopped the run; empty for one that succeeded."""
        error = self.event("execution_error")
        return f"{error['node_id']}: {error['exception_message']}" if error else ""

    def progress(self, node_id: str) -> list[int]:
        """The steps that the websocket told of a node, in order."""
        about = [m["data"] for m in self.messages if m["type"] == "progress"]
        return [data["value"] for data in about if data.get("node") == node_id]


def run(host: Host, graph: dict[str, Any], workflow: dict[str, Any] | None = None) -> Run:
    """Run a graph to its end and listen. Raises Refused where the host rejects it."""
    with Socket(host) as listener:
        prompt_id = submit(host, graph, listener.client_id, workflow)
        messages = []
        for message in listener.messages():
            messages.append(message)
            if is_end(message, prompt_id):
                break
    return Run(history(host, prompt_id), messages)


def succeed(host: Host, graph: dict[str, Any], workflow: dict[str, Any] | None = None) -> Run:
    done = run(host, graph, workflow)
    assert done.status == "success", f"{done.error}\n{host.log[-2000:]}"
    return done


def fail(host: Host, graph: dict[str, Any]) -> str:
    """What the user reads: of the rejection of a prompt, or of the node that stopped."""
    try:
        done = run(host, graph)
    except Refused as refused:
        return str(refused)
    assert done.status == "error", "the run was expected to fail"
    return done.error


def submit(host: Host, graph: dict[str, Any], client_id: str, workflow: dict[str, Any] | None = None) -> str:
    """Queue it; the prompt's id."""
    payload: dict[str, Any] = {"prompt": graph, "client_id": client_id}
    if workflow is not None:
        payload["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
    try:
        return str(host.post("/prompt", payload)["prompt_id"])
    except urllib.error.HTTPError as error:
        raise Refused(error.read().decode()) from error


def is_end(message: dict[str, Any], prompt_id: str) -> bool:
    """Whether nothing more happens in this prompt."""
    data = message["data"]
    if data.get("prompt_id") != prompt_id:
        return False
    ended = message["type"] in ("execution_success", "execution_error", "execution_interrupted")
    return ended or (message["type"] == "executing" and data.get("node") is None)


def history(host: Host, prompt_id: str, timeout: float = 30) -> dict[str, Any]:
    """The entry, which is written a moment after the last message."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        entry = host.get(f"/history/{prompt_id}").get(prompt_id)
        if entry is not None and entry.get("status") is not None:
            return dict(entry)
        time.sleep(0.02)
    raise TimeoutError(f"no history of a prompt that ended; the log ends with\n{host.log[-3000:]}")
