"""What is shown: telemetry, service endpoints."""
