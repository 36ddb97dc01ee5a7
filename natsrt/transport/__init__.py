"""The connection to NATS and what uses it directly: calls, replies, questions to other workers, cancellation."""
