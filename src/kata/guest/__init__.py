"""What is booted in a virtual machine: the builder of kernel and initrd, and their manifest."""
