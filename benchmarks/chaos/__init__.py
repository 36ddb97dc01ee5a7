"""What becomes of calls, events and agents when processes and servers die: ``python -m benchmarks.chaos``.

Everything is real: worker processes, nats-servers, ``kill -9`` and SIGSTOP. `benchmarks/README.md` says how to add a
scenario.
"""
