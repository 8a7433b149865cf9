#!/bin/sh
# First program of the lab: modules, the host's root below a writable layer, then inside.py as PID 1 in it.
# After its mounts only what the host's own programs cannot do for themselves is done here.
export PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1
# Not `--install`, which makes four hundred links, each at the speed of an emulated machine.
mount() { busybox mount "$@"; }
mkdir() { busybox mkdir -p "$@"; }
die() {
    echo "kvm-lab: $*"
    busybox poweroff -f
}

while read -r module; do
    busybox insmod "/modules/$module" || echo "kvm-lab: cannot insert $module"
done </modules/order

# Nobody writes to the host's files through this, so whatever was read stays true unless the host itself changes it.
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro,noatime hostroot /lower || die "no host root"
mount -t tmpfs -o mode=755,size=75% upper /upper || die "no tmpfs"
mkdir /upper/up /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/up,workdir=/upper/work,redirect_dir=on,noatime lab /root ||
    die "no overlay"
mount -o move /proc /root/proc
mount -o move /sys /root/sys
mount -o move /dev /root/dev
mount -t tmpfs -o mode=755 run /root/run || die "no /run"
mkdir /root/run/kvmlab
busybox cp /bin/busybox /inside.py /frames.py /root/run/kvmlab/
release=$(busybox uname -r)
read -r modules </modules/tree
if [ -d "/lower$modules" ]; then
    mkdir "/root/lib/modules/$release"
    mount -o bind "/lower$modules" "/root/lib/modules/$release"
fi
exec busybox switch_root /root /usr/bin/python3 -I -S /run/kvmlab/inside.py
