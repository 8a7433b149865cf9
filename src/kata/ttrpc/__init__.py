"""ttRPC: containerd's small RPC protocol over any stream socket.

`frame` and `envelope` are the protocol without I/O, `sync_client` a client for programs without an event
loop, `client` and `server` are for asyncio. Nothing here knows what messages are carried: a request is
anything with ``encode() -> bytes``, and a response class anything with ``decode(bytes)`` that raises
ValueError.

Reference: https://github.com/containerd/ttrpc/blob/main/PROTOCOL.md. Calls are unary; streams are not
    offered.
"""
