"""``kata-monitor``: the sandboxes of this node for Prometheus, and for people with a browser (docs/monitor.md).

The only part of kata with packages of its own (aiohttp, grpcio); they are in an environment apart, so that no engine
can come to import them.
"""
