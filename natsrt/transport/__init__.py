"""What touches the connection: connecting and supervising, calls and their replies."""
