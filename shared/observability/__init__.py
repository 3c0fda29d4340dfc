"""Logging, metrics and the health endpoints of a service."""
