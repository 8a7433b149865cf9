"""Virtual machines: what the engine asks of a hypervisor (`base`), and those that there are (`registry`)."""
