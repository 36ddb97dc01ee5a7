"""What the sending side and the hosting side share: hosted types, inbound messages, call chains, interventions."""
