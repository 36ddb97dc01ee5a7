"""The way out: what ``send_message`` and ``publish_message`` do."""
