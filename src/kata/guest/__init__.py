"""Builds the kernel and initrd of virtual machines, and reads their manifest."""
