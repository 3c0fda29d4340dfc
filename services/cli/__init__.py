"""The prfaas command: starts a whole system, talks to one, makes checkpoints."""
