#!/bin/bash
# What: an idle pasta fills a pool of 32 pipes and makes them as large as it may, so each takes about half of the pipe memory that its user has left
#   (32 MiB of 64, then 16, 8 ...): after five of them no program of this user may enlarge a pipe (EPERM), after six a new pipe holds 8 KiB instead
#   of 64. Right would be to make pipes when a connection is spliced, or to say in pasta(1) what they cost.
# Version: passt 0.0~git20230309.7c7625d-1 (Debian 12), Linux 6.18; fs.pipe-user-pages-soft as Linux has it (16384 pages).
# Source: the pools of tcp_splice.c, whose size is probed in tcp.c; pipe(7), "/proc files". Worked round in src/kata/children.py: what is read
#   from helpers takes the pipe that it gets. docs/rootless.md tells users of it.
#
# A new pipe of the user, and what F_SETPIPE_SZ says to 1 MiB, beside so many pastas that do nothing. Seen:
#   0: 65536 bytes, enlarged; ... 4: 65536 bytes, enlarged; 5: 65536 bytes, EPERM; 6: 8192 bytes, EPERM; 7: 8192 bytes, EPERM
set -euo pipefail
version=0.0~git20230309.7c7625d-1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cannot() {
    echo "cannot be tried here: $1"
    exit 77
}
[ "$(id -u)" = 0 ] || cannot "it takes root to become a user who has no pipes yet"
chmod 755 "$work"
(cd "$work" && apt-get download -qq "passt=$version" && dpkg-deb -x passt_*.deb files) >"$work/apt.log" 2>&1 ||
    cannot "passt $version is not to be had: $(tail -n 1 "$work/apt.log")"
cat >"$work/pipes.py" <<'PYTHON'
import fcntl, os, subprocess, sys, time

PASTA = sys.argv[1]
POOL = 64  # ends of the 32 pipes that it fills its pool with, about a second after its start


def new_pipe():
    """What a new pipe holds (bytes), and whether it may be enlarged to 1 MiB."""
    ends = os.pipe()
    try:
        size = fcntl.fcntl(ends[0], fcntl.F_GETPIPE_SZ)
        try:
            fcntl.fcntl(ends[0], fcntl.F_SETPIPE_SZ, 1 << 20)
        except PermissionError:
            return size, "EPERM"
        return size, "enlarged"
    finally:
        for end in ends:
            os.close(end)


def pipes_of(pid):
    links = (os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
    return sum(link.startswith("pipe:") for link in links)


subprocess.run(("mount", "-t", "tmpfs", "tmpfs", "/mnt"), check=True)
for words in (("link", "add", "d0", "type", "veth", "peer", "name", "d1"), ("addr", "add", "192.0.2.2/24", "dev", "d0"),
              ("link", "set", "d0", "up"), ("link", "set", "d1", "up"), ("link", "set", "lo", "up"), ("route", "add", "default", "via", "192.0.2.1")):
    subprocess.run(("ip", *words), check=True)
seen, running = [new_pipe()], []
try:
    for count in range(7):
        network = f"/mnt/{count}"
        open(network, "w").close()
        subprocess.run(("unshare", f"--net={network}", "true"), check=True)
        pasta = subprocess.Popen(
            (PASTA, "--foreground", "--quiet", "--config-net", "--ipv4-only", "--netns-only", "--netns", network)
        )
        running.append(pasta)
        until, before = time.monotonic() + 10, -1
        while time.monotonic() < until and pasta.poll() is None:
            now = pipes_of(pasta.pid)
            if now > POOL and now == before:
                break
            before = now
            time.sleep(0.3)
        if pasta.poll() is not None:
            print(f"cannot be tried here: pasta ended with {pasta.returncode}")
            sys.exit(77)
        seen.append(new_pipe())
finally:
    for process in running:
        process.kill()
        process.wait()
print("; ".join(f"{count}: {size} bytes, {told}" for count, (size, told) in enumerate(seen)))
sys.exit(0 if seen[0][1] == "enlarged" and seen[-1][1] == "EPERM" else 1)
PYTHON
# A mount namespace in which /dev/net/tun is everybody's, as udev makes it; then the user, with a network of nothing but a veth.
cat >"$work/as-user" <<'SH'
set -eu
mknod "$1/tun" c 10 200
chmod 666 "$1/tun"
mount --bind "$1/tun" /dev/net/tun
exec setpriv --reuid 61234 --regid 61234 --clear-groups -- \
    unshare --user --map-root-user --net --mount -- python3 "$1/pipes.py" "$1/files/usr/bin/pasta"
SH
status=0
unshare --mount bash "$work/as-user" "$work" || status=$?
exit "$status"
