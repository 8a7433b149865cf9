"""Virtual machines: the interface the engine uses, and QEMU behind it.

`qemu_process.spawn` forks and executes QEMU with the few modules that needs; what talks to it afterwards
(`qemu.Qemu`: QMP, asyncio) is imported while the machine boots.
"""
