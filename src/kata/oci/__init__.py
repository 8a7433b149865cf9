"""The OCI runtime specification: how a container is described.

Source: https://github.com/opencontainers/runtime-spec, version 1.1.
"""
