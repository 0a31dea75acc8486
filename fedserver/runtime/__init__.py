"""Leases, timers, recovery: what drives the round machine, and what services ask."""
