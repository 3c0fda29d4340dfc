"""Measurements of the system, beside those of others where there are any."""
