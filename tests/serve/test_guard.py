"""Slow, endless and ambiguous requests end with their own connection."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator

import pytest

from q35c.serve.guard import GuardedProtocol
from q35c.serve.settings import MAX_HEAD_BYTES, MAX_HEAD_LINES
from tests.serve.fakes import FakeEngine
from tests.serve.harness import Running, chat, running, wait_until
from tests.serve.raw import connect, exchange, post_bytes, read_all, read_until

HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


class Impatient(GuardedProtocol):
    head_seconds, write_seconds, most_connections = 0.3, 0.3, 40


@pytest.fixture(scope="module")
def impatient() -> Iterator[Running]:
    with running(protocol=Impatient) as made:
        yield made


@pytest.mark.parametrize(
    "head",
    [
        HEAD + b"X-A: " + b"a" * 100_000 + b"\r\n\r\n",
        HEAD + b"X-A: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n",
        HEAD + b"X-A: a\r\n" * MAX_HEAD_LINES + b"\r\n",
        b"GET /health HTTP/1.1\nHost: localhost\n\n",
        HEAD + b"X-A: a\nX-B: b\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        HEAD + b"Host: other\r\n\r\n",
        HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        HEAD + b"Content-Length: 3\r\ncontent-length : 3\r\n\r\nabc",
        HEAD + b"Content-Length: 3\r\ncontent-length: 3\r\n\r\nabc",
        HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b" folded: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=range(15),
)
def test_a_malformed_head_is_refused_and_the_connection_closed(
    impatient: Running, head: bytes
) -> None:
    answer = exchange(impatient.port, head)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("extra", [MAX_HEAD_LINES - 4, 0])
def test_a_large_head_within_the_limits_is_read(impatient: Running, extra: int) -> None:
    head = HEAD + b"X-A: " + b"a" * 8000 + b"\r\n" + b"X-B: b\r\n" * extra
    answer = exchange(impatient.port, head + b"Connection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_a_second_request_behind_the_first_is_looked_at_as_well(impatient: Running) -> None:
    second = b"GET /v1/models HTTP/1.1\nHost: localhost\n\n"
    answer = exchange(impatient.port, HEAD + b"\r\n" + second)
    assert answer.startswith(b"HTTP/1.1 200 ") and b"HTTP/1.1 400 " in answer
    third = exchange(impatient.port, HEAD + b"\r\n" + HEAD + b"Connection: close\r\n\r\n")
    assert third.count(b"HTTP/1.1 200 ") == 2


@pytest.mark.parametrize("sent", [b"", b"GET", HEAD, b"G" * 5000])
def test_a_head_that_does_not_end_is_not_waited_for(impatient: Running, sent: bytes) -> None:
    assert exchange(impatient.port, sent) == b""


def test_nor_is_one_that_comes_byte_by_byte_or_behind_an_answer(impatient: Running) -> None:
    with connect(impatient.port) as made:
        made.sendall(HEAD + b"\r\n")
        read_until(made, b'{"status":"ok"}')
        made.sendall(b"G")
        assert read_all(made) == b""
    with connect(impatient.port) as made:
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.02):
                try:
                    made.send(b"G")
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        assert read_all(made) == b""
        stop.set()
        dripping.join()


def test_no_event_waits_for_the_one_before_to_be_acknowledged(impatient: Running) -> None:
    with connect(impatient.port) as made:
        made.sendall(HEAD + b"\r\n")
        read_until(made, b'{"status":"ok"}')
        (connection,) = impatient.server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_many_idle_connections_do_not_keep_others_out(impatient: Running) -> None:
    idle = [connect(impatient.port) for _ in range(60)]  # more than are let in
    for made in idle:
        assert read_all(made) == b""
        made.close()
    with impatient.client() as client:
        assert client.get("/health").status_code == 200


def test_a_body_has_a_length_and_a_time(impatient: Running) -> None:
    head = post_bytes(b"", "/v1/chat/completions").replace(b"Length: 0", b"Length: 200000000")
    with connect(impatient.port) as made:
        made.sendall(head)
        assert b" 413 " in read_until(made, b"too large")
    chunked = head.replace(b"Content-Length: 200000000", b"Transfer-Encoding: chunked")
    with connect(impatient.port) as made:
        made.sendall(chunked)
        piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
        sent = 0
        try:
            while sent < 64 << 20:
                made.sendall(piece)
                sent += len(piece)
        except OSError:
            pass
        assert 32 << 20 <= sent < 64 << 20 or b" 413 " in read_until(made, b"too large")


def test_a_reader_that_stops_is_dropped_and_others_go_on() -> None:
    engine = FakeEngine(lambda request: "x" * 3000 if len(request.ids) < 60 else "y" * 500_000)
    with (
        running(engine, protocol=Impatient, unread_seconds=0.2) as server,
        connect(server.port) as made,
    ):
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps(chat("long prompt " * 20, stream=True, logprobs=True, top_logprobs=20))
        made.sendall(post_bytes(body.encode()))
        read_until(made, b"200 OK")
        with server.client() as client:
            answer = client.post("/v1/chat/completions", json=chat(stream=True))
            assert answer.text.endswith("[DONE]\n\n")
            wait_until(lambda: bool(engine.cancelled))
            assert [len(request.ids) > 60 for request in engine.cancelled] == [True]
            wait_until(lambda: len(server.server.server_state.connections) == 1)
            line = 'q35c_cancelled_total{reason="disconnect"} 1.0'
            wait_until(lambda: line in client.get("/metrics").text)
