"""Restores published states and generates tokens in a continuous batch."""
