"""Pure values: subjects, envelopes, serialization. No I/O."""
