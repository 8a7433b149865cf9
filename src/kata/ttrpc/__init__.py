"""ttRPC: containerd's small RPC protocol over any stream socket.

`frame` and `envelope` are the protocol without I/O. `client` and `server` are for asyncio; `sync_client` is for
programs without an event loop. Nothing here depends on the messages: a request is anything with
``encode() -> bytes``, a response class anything with ``decode(bytes)`` that raises ValueError.

`client` makes unary calls and streaming ones (`client.Client.open`); `server` and `sync_client` know unary calls only.

Source: https://github.com/containerd/ttrpc/blob/main/PROTOCOL.md.
"""
