"""Embedding: an asyncio web service whose request handlers call agents.

The service starts the runtime at its own start and closes it at its own end, in the same event loop. The HTTP code here
is only as complete as the example needs. With a web framework, start and stop the runtime in the framework's hooks for
starting and stopping.

Run it: python examples/web_service.py
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler
from local_server import local_server

from natsrt import NatsAgentRuntime, NatsrtError


@dataclass
class Text:
    text: str


class Shouter(RoutedAgent):
    @message_handler
    async def shout(self, message: Text, ctx: MessageContext) -> Text:
        return Text(message.text.upper())


class Service:
    """``GET /<agent type>/<text>`` sends the text to the agent and answers with its reply."""

    def __init__(self, runtime: NatsAgentRuntime) -> None:
        self._runtime = runtime

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        _, agent_type, text = request.split()[1].decode().split("/", 2)
        try:
            result = await self._runtime.send_message(Text(text), AgentId(agent_type, "default"))
            status, body = "200 OK", {"text": result.text}
        except NatsrtError as error:
            status, body = f"{error.code} {type(error).__name__}", {"error": str(error)}
        payload = json.dumps(body).encode()
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(payload)}\r\n\r\n".encode() + payload)
        await writer.drain()
        writer.close()
        await writer.wait_closed()


async def get(port: int, path: str) -> tuple[str, str]:
    """Sends a request, as a browser does. Returns the status line and the body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    return head.splitlines()[0], body


async def main() -> None:
    async with local_server() as url, NatsAgentRuntime(url) as worker:
        await Shouter.register(worker, "shouter", lambda: Shouter("shouts"))

        async with NatsAgentRuntime(url) as runtime:  # starts with the service and ends with it
            service = await asyncio.start_server(Service(runtime).answer, "127.0.0.1", 0)
            async with service:
                port = service.sockets[0].getsockname()[1]

                for path in ("/shouter/hello", "/nobody/hello"):
                    status, body = await get(port, path)
                    print(f"GET {path}: {status}: {body}")

                assert await get(port, "/shouter/hello") == ("HTTP/1.1 200 OK", '{"text": "HELLO"}')
                assert (await get(port, "/nobody/hello"))[0] == "HTTP/1.1 404 UnknownAgentType"


if __name__ == "__main__":
    asyncio.run(main())
