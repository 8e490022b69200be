"""Bytes on a socket, for what no client library would send."""

from __future__ import annotations

import contextlib
import socket


def connect(port: int) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port), timeout=10)
    return made


def exchange(port: int, data: bytes) -> bytes:
    """Send bytes; return all that comes until the server closes the connection."""
    with connect(port) as made:
        with contextlib.suppress(ConnectionError):  # refused before all was sent
            made.sendall(data)
        return read_all(made)


def read_all(made: socket.socket) -> bytes:
    """Return what comes until the connection is closed or reset. Raises TimeoutError if it is not."""
    pieces: list[bytes] = []
    with contextlib.suppress(ConnectionError):
        while piece := made.recv(1 << 16):
            pieces.append(piece)
    return b"".join(pieces)


def read_until(made: socket.socket, mark: bytes) -> bytes:
    """Return what comes up to a mark."""
    data = b""
    while mark not in data:
        piece = made.recv(1 << 16)
        assert piece, data
        data += piece
    return data


def post_bytes(body: bytes, path: str = "/v1/chat/completions", *headers: str) -> bytes:
    """Return a whole request."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body
