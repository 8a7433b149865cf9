"""The human door: `kata run`, `ps`, `exec` and the rest. Needs no daemon."""
