"""Everything kept in Redis: job queues, token streams, published states. Knows redis, no torch."""
