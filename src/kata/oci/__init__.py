"""The OCI runtime specification: what a container is told to be.

Source: https://github.com/opencontainers/runtime-spec, version 1.1.
"""
