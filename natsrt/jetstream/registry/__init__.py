"""The registry: which workers host which agent types, in one JetStream KV bucket."""
