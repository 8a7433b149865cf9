"""Network of a sandbox: what is plugged into its virtual machine, and what the guest is told."""
