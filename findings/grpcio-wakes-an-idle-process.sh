#!/bin/bash
# What: a Python process that holds an idle, connected gRPC channel is woken seven to ten times a second, and once a second after it has
#   closed the channel; right would be to sleep until the other side says something, as the same process does before.
# Version: grpcio 1.85.1 (PyPI), Python 3.11, Linux; other versions were not tried.
# Source: the threads "event_engine", "lifeguard" and "grpc_global_tim" of gRPC's core. Worked round by asking the CRI for pods in a child that ends
#   (src/kata/monitor/cri_query.py), so that an idle kata-monitor makes no context switch.
#
# Voluntary context switches of all threads but the one that measures, in 10 seconds. Seen:
#   before the channel: 0; with an idle channel: grpc_global_tim 10, event_engine 55 to 81, lifeguard 11; closed: grpc_global_tim 10
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! { python3 -m venv "$work/venv" && "$work/venv/bin/pip" install -q --disable-pip-version-check grpcio==1.85.1; } >"$work/pip.log" 2>&1; then
    echo "cannot be tried here: grpcio 1.85.1 is not to be had: $(tail -n 1 "$work/pip.log")"
    exit 77
fi
"$work/venv/bin/python" - "$work/socket" <<'PYTHON'
import asyncio, os, re, subprocess, sys

import grpc

ADDRESS = f"unix:{sys.argv[1]}"
SERVER = """
import sys, grpc
from concurrent.futures import ThreadPoolExecutor
server = grpc.server(ThreadPoolExecutor(1))
server.add_insecure_port(sys.argv[1])
server.start()
sys.stdin.read()
"""


def switches():
    found = {}
    for task in os.listdir("/proc/self/task"):
        if int(task) == os.getpid():
            continue
        try:
            status = open(f"/proc/self/task/{task}/status").read()
        except OSError:
            continue  # it has just ended
        name = re.search(r"^Name:\s+(.*)$", status, re.M)[1]
        found[name] = found.get(name, 0) + int(re.search(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.M)[1])
    return found


async def in_ten_seconds():
    await asyncio.sleep(2)
    before = switches()
    await asyncio.sleep(10)
    return {name: count - before.get(name, 0) for name, count in switches().items() if count > before.get(name, 0)}


async def main():
    first = await in_ten_seconds()
    server = subprocess.Popen([sys.executable, "-c", SERVER, ADDRESS], stdin=subprocess.PIPE)
    try:
        channel = grpc.aio.insecure_channel(ADDRESS)
        await asyncio.wait_for(channel.channel_ready(), 30)
        idle = await in_ten_seconds()
        await channel.close()
        closed = await in_ten_seconds()
    finally:
        server.stdin.close()
        server.wait()
    print(f"grpcio {grpc.__version__}: before the channel: {first or 0}; with an idle channel: {idle or 0}; closed: {closed or 0}")
    return 0 if sum(idle.values()) >= 10 and not first else 1


sys.exit(asyncio.run(main()))
PYTHON
