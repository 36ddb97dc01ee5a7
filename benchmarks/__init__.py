"""Measurements of natsrt beside bare nats-py and AutoGen's other runtimes: ``python -m benchmarks``."""
