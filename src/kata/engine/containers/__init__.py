"""Containers of a sandbox: their specification, root file system, mounts, devices, processes, and their ends."""
