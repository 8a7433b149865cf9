"""The command for people: `kata run`, `ps`, `exec` and the rest. Needs no daemon."""
