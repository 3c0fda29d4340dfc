"""Computes the state of prompts and publishes it while it is being computed."""
