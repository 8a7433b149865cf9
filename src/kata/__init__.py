"""Containers that each run in their own lightweight virtual machine."""

__version__ = "0.1.0"
