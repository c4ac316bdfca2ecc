"""The end of the manager's HTTP server."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from batchlab.runtime.home import listen
from batchlab.server.http_server import Server


def test_server_answers_a_connection_that_arrived_just_before_the_end() -> None:
    requests = ["begun", "ended"]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        requests.remove("begun")
        await asyncio.sleep(0.05)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        requests.remove("ended")

    async def both() -> None:
        server = Server(app)
        with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started:
                await asyncio.sleep(0)
            while "begun" in requests and not server.should_exit:
                # asyncio has accepted the connection, but uvicorn does not know the connection yet.
                if any("accept" in str(task.get_coro()) for task in asyncio.all_tasks()):
                    server.end()
                await asyncio.sleep(0)
            await serving
            assert server.should_exit
            assert not requests

    asyncio.run(both())
