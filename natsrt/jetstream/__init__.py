"""What is stored in JetStream: the registry."""
