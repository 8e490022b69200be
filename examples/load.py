"""Put a server under load: clients that stream, one after the other each; print tokens a second and waiting times.

q35c serve model.q35c                                           (in another terminal)
python examples/load.py [http://127.0.0.1:8080 [clients [requests [tokens]]]]
"""

import asyncio
import itertools
import json
import statistics
import sys
import time
from urllib.parse import urlsplit

URL = urlsplit(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080")
CLIENTS, REQUESTS, TOKENS = (
    int(sys.argv[place]) if len(sys.argv) > place else default
    for place, default in ((2, 4), (3, 3), (4, 64))
)


async def lines(method, path, body=None):
    """Yield the lines of an answer's body as they come."""
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: {URL.netloc}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(URL.hostname, URL.port)
    writer.write(head.encode() + data)
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"{path}: {status.decode().strip()}")
    async for line in reader:
        yield line
    writer.close()
    await writer.wait_closed()


async def one_request(model, number):
    """Return the seconds to the first token, those between the others, and their number."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"Tell me story number {number}."}],
        "max_tokens": TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    times, new_tokens, begin = [], 0, time.perf_counter()
    async for line in lines("POST", "/v1/chat/completions", body):
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            new_tokens = (event.get("usage") or {}).get("completion_tokens", new_tokens)
            if any(choice["delta"] for choice in event["choices"]):
                times.append(time.perf_counter())
    gaps = [b - a for a, b in itertools.pairwise(times)]
    return times[min(1, len(times) - 1)] - begin, gaps[1:], new_tokens


async def one_client(model, client):
    return [await one_request(model, client * REQUESTS + n) for n in range(REQUESTS)]


async def main():
    listed = [line async for line in lines("GET", "/v1/models") if line.startswith(b"{")]
    model = json.loads(listed[0])["data"][0]["id"]
    begin = time.perf_counter()
    done = await asyncio.gather(*(one_client(model, client) for client in range(CLIENTS)))
    seconds = time.perf_counter() - begin
    results = [result for client in done for result in client]
    gaps = sorted(gap for _, gaps, _ in results for gap in gaps) or [0.0]
    print(f"{len(results)} answers, {sum(n for _, _, n in results) / seconds:.1f} tokens/s in all")
    print(f"first token after {1000 * statistics.median(r[0] for r in results):.0f} ms (median)")
    print(
        f"then every {1000 * statistics.median(gaps):.1f} ms, p99 {1000 * gaps[int(len(gaps) * 0.99)]:.1f} ms"
    )


asyncio.run(main())
