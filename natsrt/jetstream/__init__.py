"""What is stored in JetStream: the registry, and keyed agents with their state."""
