"""QEMU.

`process.spawn` forks and executes it with the few modules that needs; what talks to it afterwards (`machine.Qemu`: QMP,
asyncio) is imported while the machine boots.
"""
