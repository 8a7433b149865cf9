"""The runtime's options, which containerd writes to the standard input of ``start``.

They are a ``google.protobuf.Any``, from containerd 2.3 on in a BootstrapParams (`kata.shim.bootstrap`). The one that
means something here is ``ConfigPath`` of ``runtimeoptions.v1.Options``: what stands below ``options`` of a runtime in
containerd's and Docker's configuration, and ``ctr run --runtime-config-path``.
"""

from __future__ import annotations

import os
import stat

from kata.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.proto.bootstrap_pb import BootstrapParams

_MOST = 4 << 20
_TYPE = "runtimeoptions.v1.Options"


def given() -> bytes:
    """What is on standard input, if that is a pipe or a file; a person at a terminal is not waited for."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return b""
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return b""
    found = b""
    while len(found) < _MOST and (piece := os.read(0, 65536)):
        found += piece
    return found


def config_path(raw: bytes, told: BootstrapParams | None = None) -> str:
    """The configuration file that the client names, or empty.

    Args:
        raw: What `given` found.
        told: The same, if it is containerd 2.3's.

    Raises:
        ConfigError: It cannot be decoded.
    """
    if not raw:
        return ""
    from kata.proto.codec import DecodeError
    from kata.proto.google_pb import Any as AnyMessage
    from kata.proto.runtimeoptions_pb import Options

    try:
        if told is None:
            messages = [AnyMessage.decode(raw)]
        else:
            messages = [one.value for one in told.extensions if one.value is not None]
        for message in messages:
            # Those of other types are another runtime's, runc's: nothing in them is about us.
            if message.type_url.rpartition("/")[2] == _TYPE:
                return Options.decode(message.value).config_path
    except DecodeError as error:
        raise ConfigError(f"the runtime's options cannot be decoded: {error}") from None
    return ""
