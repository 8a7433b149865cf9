#!/bin/bash
# What: QEMU empties a file that it was given as memory of its own: behind a memory-backend-file with share=off, which mmap(2) maps with
#   MAP_PRIVATE, a virtio-mem device punches the file full of holes at its start. What other machines have mapped of it is gone, too.
#   Right would be to leave the file alone, and drop the private pages: "share=off" says that changes are not visible to others.
# Version: qemu-system-x86 1:7.2+dfsg-7+deb12u18+b3 (Debian 12)
# Source: QEMU's softmmu/physmem.c, ram_block_discard_range, calls fallocate(2) with FALLOC_FL_PUNCH_HOLE for every block that has a
#   descriptor; what a balloon and free page reporting give back takes the same way. Later versions warn of it. So machines that go on
#   from one file have it open for reading only (src/kata/hypervisor/qemu/template_memory.py).
#
# A file of 64 MiB without a hole is given to a machine that does not run, once as its main memory and once as that of a virtio-mem
# device. Seen:
#   main memory: 64 MiB of the file are left
#   virtio-mem: 0 MiB of the file are left
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
program=${1-} # another QEMU than the pinned one
if [[ ! $program ]]; then
    mkdir -p "$work/archives/partial" "$work/root"
    if ! apt-get -qq -o Dir::Cache::archives="$work/archives" -o Debug::NoLocking=1 --download-only --reinstall -y \
        install qemu-system-{x86,common}=1:7.2+dfsg-7+deb12u18+b3 qemu-system-data=1:7.2+dfsg-7+deb12u18 seabios=1.16.2-1 >"$work/apt.log" 2>&1; then
        echo "cannot be tried here: these packages of Debian 12 are not to be had: $(tail -n 1 "$work/apt.log")"
        exit 77
    fi
    for package in "$work"/archives/*.deb; do dpkg-deb -x "$package" "$work/root"; done
    export LD_LIBRARY_PATH=$work/root/usr/lib/x86_64-linux-gnu QEMU_MODULE_DIR=$work/root/usr/lib/x86_64-linux-gnu/qemu
    program=$work/root/usr/bin/qemu-system-x86_64
fi

places=()
[[ ${1-} ]] || places=(-L "$work/root/usr/share/qemu" -L "$work/root/usr/share/seabios")

left() { # left NAME OPTION...: the MiB of the file that are not holes, after a machine has had it
    local name=$1
    shift
    head -c $((64 << 20)) /dev/urandom >"$work/memory"
    printf '{"execute":"qmp_capabilities"}\n{"execute":"quit"}\n' |
        "$program" -nodefaults -display none -S "${places[@]}" -machine "q35,accel=tcg${machine-}" -m 64M,maxmem=1G -qmp stdio \
            -object "memory-backend-file,id=it,mem-path=$work/memory,size=64M,share=off" "$@" >"$work/qmp.log"
    echo "$name: $(($(stat -c %b "$work/memory") * 512 >> 20)) MiB of the file are left"
}

{
    machine=,memory-backend=it left "main memory"
    left "virtio-mem" -device virtio-mem-pci,memdev=it
} | tee "$work/said"
diff "$work/said" - <<'SEEN'
main memory: 64 MiB of the file are left
virtio-mem: 0 MiB of the file are left
SEEN
