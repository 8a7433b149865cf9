"""Cloud Hypervisor, behind the seam of `kata.hypervisor.protocols`.

What is said here of its behaviour was seen of version 54. Sources: its docs/ (api.md, cpu.md, memory.md, vsock.md,
seccomp.md, landlock.md) and vmm/src/api/openapi/cloud-hypervisor.yaml.
"""
