"""What the tests share: real processes, and waiting for conditions."""
