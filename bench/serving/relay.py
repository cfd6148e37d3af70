"""A relay that copies bytes both ways and knows nothing of HTTP: what a further process on the way costs at the least.

`python -m bench.serving.relay HOST PORT` prints the port that it listens on, and relays until it is killed.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from bench.serving.world import ROOT

_PIECE = 65_536


@contextmanager
def relayed(url: str) -> Iterator[str]:
    """The address of a relay before an engine's."""
    to = urlsplit(url)
    command = [sys.executable, "-m", "bench.serving.relay", str(to.hostname), str(to.port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None:
                raise RuntimeError("the relay has no output")
            yield f"http://127.0.0.1:{int(process.stdout.readline())}{to.path}"
        finally:
            process.kill()


async def relay(host: str, port: int) -> None:
    """Relay every connection to an address, until killed."""

    async def connected(client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        engine_in, engine_out = await asyncio.open_connection(host, port)
        await asyncio.gather(_copy(client_in, engine_out), _copy(engine_in, client_out))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while piece := await source.read(_PIECE):
            target.write(piece)
            await target.drain()
        target.close()


if __name__ == "__main__":
    asyncio.run(relay(sys.argv[1], int(sys.argv[2])))
