"""What containerd executes: the commands of ``containerd-shim-kata-v2``."""
