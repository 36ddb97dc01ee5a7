"""Compares natsrt with bare nats-py and AutoGen's other runtimes: ``python -m benchmarks``."""
