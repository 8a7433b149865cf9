"""The network of a sandbox: the interfaces of its virtual machine, and the configuration that the guest gets."""
