"""What a runtime reports about itself: counters, health, NATS services, spans and AutoGen's events."""
