"""The HTTP front: validates, tokenises, enqueues, relays tokens."""
