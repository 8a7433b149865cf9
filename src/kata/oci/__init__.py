"""The OCI runtime specification: how a container is described.

Source: https://github.com/opencontainers/runtime-spec, version 1.1.
"""

OCI_VERSION = "1.1.0"
"""Of the runtime specification, the version that is spoken."""
