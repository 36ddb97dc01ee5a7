"""What natsrt stores in JetStream: the registry, and keyed agents with their states."""
