"""Clients of a tritonserver that do as little as a client can: bytes made before, one connection, no library.

What a call takes by one of these is the server's share of what it takes by a library.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Mapping

Call = Callable[[], bytes]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
LARGEST = 16384
"""Bytes of a frame that every server takes."""


def connected(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    found = socket.create_connection((host, int(port)))
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


def over_http(address: str, path: str, body: bytes, headers: Mapping[str, str]) -> Call:
    """POST `body` over HTTP/1.1; gives the content of the answer.

    Raises:
        ConnectionError: the server has closed the connection, or refuses the request.
    """
    server = connected(address)
    said = {"Host": address, "Content-Length": str(len(body)), **headers}
    request = (
        "".join([f"POST {path} HTTP/1.1\r\n", *(f"{k}: {v}\r\n" for k, v in said.items()), "\r\n"]).encode() + body
    )

    def call() -> bytes:
        server.sendall(request)
        got = b""
        while b"\r\n\r\n" not in got:
            got += received(server)
        head, _, content = got.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise ConnectionError(head.decode(errors="replace"))
        length = int(head.lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0])
        while len(content) < length:
            content += received(server)
        return content

    return call


def received(server: socket.socket) -> bytes:
    found = server.recv(1 << 20)
    if not found:
        raise ConnectionError("the server has closed the connection")
    return found


def over_grpc(address: str, method: str, message: bytes) -> Call:
    """Ask `method` (/package.Service/Name) over HTTP/2 (RFC 9113); gives the bytes of the answer's message.

    Raises:
        ConnectionError: the server has closed the connection, or gives no message.
    """
    server = connected(address)
    # All windows as large as they can be: nothing of an answer waits for leave.
    settings = struct.pack(">HI", 4, 2**31 - 1)
    server.sendall(PREFACE + frame(SETTINGS, 0, 0, settings) + frame(WINDOW, 0, 0, struct.pack(">I", 2**31 - 65536)))
    fields = {
        ":method": "POST", ":scheme": "http", ":path": method, ":authority": address,
        "te": "trailers", "content-type": "application/grpc",
    }  # fmt: skip
    # RFC 7541, 6.2.2: literal fields, never indexed, so that a request's bytes are always the same.
    head = b"".join(b"\0" + bytes([len(k)]) + k.encode() + bytes([len(v)]) + v.encode() for k, v in fields.items())
    body = b"\0" + struct.pack(">I", len(message)) + message
    parts = [body[begin : begin + LARGEST] for begin in range(0, len(body), LARGEST)]
    buffer = bytearray()
    stream = -1

    def next_frame() -> tuple[int, int, int, bytes]:
        while len(buffer) < 9 or len(buffer) < 9 + int.from_bytes(buffer[:3], "big"):
            buffer.extend(received(server))
        length, kind, flags = int.from_bytes(buffer[:3], "big"), buffer[3], buffer[4]
        whose, content = int.from_bytes(buffer[5:9], "big"), bytes(buffer[9 : 9 + length])
        del buffer[: 9 + length]
        return kind, flags, whose, content

    def call() -> bytes:
        nonlocal stream
        stream += 2
        frames = [frame(DATA, END_STREAM * (part is parts[-1]), stream, part) for part in parts]
        server.sendall(frame(HEADERS, END_HEADERS, stream, head) + b"".join(frames))
        found = b""
        while True:
            kind, flags, whose, content = next_frame()
            if kind in (SETTINGS, PING) and not flags & ACK:
                server.sendall(frame(kind, ACK, 0, content if kind == PING else b""))
            elif kind in (RESET, GOAWAY):
                raise ConnectionError(f"the server ends the call: {content!r}")
            elif kind == DATA and whose == stream:
                found += content
            if whose == stream and kind in (DATA, HEADERS) and flags & END_STREAM:
                if not found:
                    raise ConnectionError(f"no message, but {content!r}")
                return found[5:]

    return call


def frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    return len(content).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + content
