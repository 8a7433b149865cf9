"""Where things live on the host, and the environment variables that move them.

========================  =====================  ==============================================
variable                  default                holds
========================  =====================  ==============================================
``KATA_RUN_DIR``          ``/run/kata``          what lives as long as a sandbox
``KATA_STATE_DIR``        ``/var/lib/kata``      images, containers: kept over a reboot
``KATA_GUEST_DIR``        ``$KATA_STATE_DIR/guest``  the guest's kernel and initrd
``KATA_CACHE_DIR``        ``/var/cache/kata``    builds and downloads that can be made again
========================  =====================  ==============================================

Plain strings: `pathlib` would be paid for on every container start.
"""

from __future__ import annotations

import os


def _place(variable: str, default: str) -> str:
    value = os.environ.get(variable) or default
    return os.path.abspath(value)


def run_dir() -> str:
    """Directory of everything that ends with its sandbox; a tmpfs on most machines."""
    return _place("KATA_RUN_DIR", "/run/kata")


def state_dir() -> str:
    """Directory of images and containers."""
    return _place("KATA_STATE_DIR", "/var/lib/kata")


def guest_dir() -> str:
    """Directory of the guest's kernel, initrd and their manifest ``guest.json``."""
    return _place("KATA_GUEST_DIR", os.path.join(state_dir(), "guest"))


def cache_dir() -> str:
    """Directory of kernel builds and downloaded packages."""
    return _place("KATA_CACHE_DIR", "/var/cache/kata")


def sandbox_dir(sandbox_id: str) -> str:
    """Run directory of one sandbox."""
    return os.path.join(run_dir(), "sandboxes", sandbox_id)


def container_dir(container_id: str) -> str:
    """State directory of one container of the human door: bundle, record, writable disk, log."""
    return os.path.join(state_dir(), "containers", container_id)
