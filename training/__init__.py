"""Trains the small model that ships with the project, with the engine's own layers."""
