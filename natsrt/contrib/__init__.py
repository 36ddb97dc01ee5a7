"""What builds on the public names of natsrt alone. Each module says which extra it needs, if any."""
