"""Sending: the implementation of ``send_message`` and ``publish_message``."""
