#!/bin/busybox sh
# The guest's first process: mounts the usual, inserts the modules, hands over to the agent, and powers off when that ends.
export PATH=/usr/bin HOME=/root LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
while read -r module; do
    insmod "/usr/lib/modules/$module.ko" || echo "init: cannot insert $module"
done </etc/modules
disk=$(sed -n 's/.* disk=\([^ ]*\).*/\1/p' /proc/cmdline)
if [ -n "$disk" ]; then # a disk with a system of its own, and an archive to unpack over it
    mount -t ext4 "$disk" /mnt
    tar -x -f "$(sed -n 's/.* archive=\([^ ]*\).*/\1/p' /proc/cmdline)" -C /mnt
    umount /dev/shm /dev/pts /dev /sys /proc /tmp
    exec switch_root /mnt /sbin/init
fi
ip link set lo up 2>/dev/null
hostname guest
python3 -I -B -X utf8=1 /agent.py
echo "init: the agent ended"
sync
poweroff -f
