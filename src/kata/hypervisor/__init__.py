"""Virtual machines: what the engine asks of a hypervisor (`base`), and QEMU behind it (`qemu`)."""
