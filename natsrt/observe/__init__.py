"""What a runtime shows of itself: counters, health, NATS services, spans and AutoGen's events."""
