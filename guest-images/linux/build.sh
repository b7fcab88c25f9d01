#!/bin/sh
# Builds the Linux image of tests and benchmarks into the directory DIR: `build.sh DIR`.
#
#   vmlinuz         the distribution's cloud kernel, a bzImage
#   vmlinux         the same as ELF, with its PVH note
#   initramfs.cpio  busybox, modules of that kernel, and `init`; not compressed, so that another
#                   archive can be appended to it
#   version         what they were made from
#
# Needs Debian or a system like it (apt, dpkg) with lz4, zstd and xz, and no privileges. Which
# kernel is current is asked each time; what is up to date is not built again.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
cd "$1"

# Modules with all that they need. For guests: virtio, a file system, the power button. For the machine around
# them in the lab: KVM and its networks.
MODULES='button evdev
    virtio_mmio virtio_blk virtio_net virtio_console virtio_balloon virtio-rng ext4 crc32c_generic
    kvm-amd kvm-intel tun veth bridge vxlan ip_gre openvswitch vport-vxlan'

depends() { apt-cache show --no-all-versions "$1" | sed -n 's/^Depends: \([^ ,]*\).*/\1/p'; }
kernel=$(depends linux-image-cloud-amd64)
[ -n "$kernel" ] || {
    echo 'build.sh: no package linux-image-cloud-amd64: run apt-get update' >&2
    exit 1
}
candidate() { apt-cache policy "$1" | sed -n 's/^ *Candidate: //p'; }
version="$kernel $(candidate "$kernel") busybox $(candidate busybox-static) $(
    cat "$here/init" "$here/build.sh" "$here/vmlinux.sh" | sha256sum | cut -c1-16
)"
[ "$(cat version 2>/dev/null)" != "$version" ] || exit 0
echo "Linux image: $version"
rm -rf work version
mkdir -p work/tree/bin
cd work

apt-get download -qq -o APT::Sandbox::User="$(id -un)" "$kernel" busybox-static
for package in *.deb; do dpkg -x "$package" unpacked; done
cp unpacked/boot/vmlinuz-* vmlinuz
"$here/vmlinux.sh" vmlinuz vmlinux

# Newer packages have their files in /usr.
find unpacked -path '*bin/busybox' -exec cp {} tree/bin/busybox ';'
busybox=$PWD/tree/bin/busybox
release=${kernel#linux-image-}
tree=$(find unpacked -type d -path "*lib/modules/$release")
to=tree/lib/modules/$release
mkdir -p "$to"
cp "$tree/modules.builtin" "$tree/modules.order" "$to"

# Copies a module and what it depends on, as its own `depends=` says. Names may be written with
# either - or _. What is built into the kernel needs no file.
add_module() {
    pattern=$(echo "$1" | sed 's/[-_]/[-_]/g')
    file=$(find "$tree" -name "$pattern.ko" -o -name "$pattern.ko.xz" -o -name "$pattern.ko.zst")
    [ -n "$file" ] || {
        ! grep -q "/$pattern\.ko" "$tree/modules.builtin" || return 0
        echo "build.sh: $kernel has no module $1" >&2
        exit 1
    }
    name=$(basename "$file") && name=${name%%.*}.ko
    [ ! -e "$to/$name" ] || return 0
    case $file in
        *.xz) xz -dc "$file" >"$to/$name" ;;
        *.zst) zstd -qdc "$file" >"$to/$name" ;;
        *) cp "$file" "$to/$name" ;;
    esac
    for needed in $(tr '\0' '\n' <"$to/$name" | sed -n 's/^depends=//p' | tr ',' ' '); do
        add_module "$needed"
    done
}
for module in $MODULES; do add_module "$module"; done
"$busybox" depmod -b tree "$release"

cp "$here/init" tree/init
chmod 755 tree/init
# Where the kernel looks for modprobe.
ln -s bin tree/sbin
mkdir -p tree/proc tree/sys tree/dev tree/run tree/tmp tree/mnt tree/etc
(cd tree && find . | LC_ALL=C sort | "$busybox" cpio -o -H newc -R 0:0 2>/dev/null) >initramfs.cpio

cd ..
mv work/vmlinuz work/vmlinux work/initramfs.cpio .
rm -rf work
echo "$version" >version
