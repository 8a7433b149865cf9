"""``kata-runtime features``: what of the runtime specification is supported, as its features structure.

The structure itself is `kata.oci.features`, which the shim answers with as well.

Source: runtime-spec ``features.md``.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.cli.args import Arguments


def command(arguments: Arguments) -> int:
    """Carry the command out."""
    import json

    from kata.oci.features import features

    sys.stdout.write(json.dumps(features(), indent=4) + "\n")
    return 0
