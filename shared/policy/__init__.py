"""Decisions as pure functions: the gateway, the planner and the simulator all call these."""
