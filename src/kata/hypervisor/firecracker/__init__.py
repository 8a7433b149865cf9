"""Firecracker, behind the seam of `kata.hypervisor.protocols`.

What is said here of its behaviour was seen of version 1.17. Sources: its docs/ (device-api.md, device-hotplug.md,
memory-hotplug.md, ballooning.md, vsock.md, logger.md) and src/firecracker/swagger/firecracker.yaml.
"""
