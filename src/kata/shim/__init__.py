"""containerd's door: the commands of ``containerd-shim-kata-v2``."""
