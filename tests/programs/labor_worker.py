"""A worker process with laborers: ``labor_worker.py URL NAMESPACE SETTINGS_JSON AGENT_TYPE…``.

It says ``ready <worker_id>`` when it serves them, and stops in order at SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import sys

import natsrt
from tests.programs.labor import host


async def main() -> None:
    url, namespace, settings, *agent_types = sys.argv[1:]
    options = json.loads(settings)
    factory_seconds = options.pop("factory_seconds", 10.0)
    runtime = natsrt.NatsAgentRuntime(url, namespace=namespace, **options)
    await runtime.start()
    await host(runtime, *agent_types, factory_seconds=factory_seconds)
    print(f"ready {runtime.worker_id}", flush=True)  # noqa: T201
    await runtime.stop_when_signal()
    print("stopped", flush=True)  # noqa: T201


asyncio.run(main())
