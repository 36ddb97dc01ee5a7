"""The way in: from a NATS message to a handler, and back to the caller."""
