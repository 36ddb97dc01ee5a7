"""The connection to NATS, and the parts that use it directly: calls, replies, questions to workers, cancellation."""
