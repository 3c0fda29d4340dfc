"""Policy: pure functions from values to values, that services, planner and simulator all call."""
