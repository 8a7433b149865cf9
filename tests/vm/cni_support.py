"""CNI's bridge, as the tests of pods want it."""

from __future__ import annotations

import json
from pathlib import Path

PLUGINS = Path("/usr/lib/cni")


def write_network(directory: Path, name: str, subnet: str, *more: object, **bridge: object) -> Path:
    """Write the configuration of a network with one bridge.

    Args:
        directory: What is made is below it.
        name: The network's; its bridge is called ``{name}0``.
        subnet: In CIDR notation.
        more: Further plugins.
        bridge: Further settings of the bridge.

    Returns:
        The directory of the configuration.
    """
    networks = directory / "net.d"
    networks.mkdir()
    plugin = {
        "type": "bridge",
        "bridge": f"{name}0",
        "isGateway": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": subnet}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(directory / "ipam"),
        },
        **bridge,
    }
    content = {"cniVersion": "0.4.0", "name": name, "plugins": [plugin, *more]}
    (networks / f"10-{name}.conflist").write_text(json.dumps(content))
    return networks
