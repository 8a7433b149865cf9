"""``kata-runtime``: the command line of an OCI runtime, and the original's commands for administration."""
