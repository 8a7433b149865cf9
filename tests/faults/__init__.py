"""Faults on purpose: a victim is killed at a named point, or at a random moment, and nothing may be left."""
