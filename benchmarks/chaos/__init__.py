"""Tests calls, events and agents while processes and servers are killed: ``python -m benchmarks.chaos``.

The scenarios use real worker processes and nats-servers, ``kill -9`` and SIGSTOP. `benchmarks/README.md` describes how
to add a scenario.
"""
