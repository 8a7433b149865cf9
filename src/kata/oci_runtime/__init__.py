"""``kata-runtime``: the original's commands for administration. Its command line for containers (OCI) is planned."""
