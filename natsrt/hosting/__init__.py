"""Receiving: from a NATS message to its handler, and the answer back to the caller."""
