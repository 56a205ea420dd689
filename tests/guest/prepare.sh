#!/usr/bin/env bash
# Prepares a real guest for the tests: QEMU, a Debian kernel, and a busybox with the init beside
# this file.
#
#     prepare.sh DIR
#
# makes DIR/qemu, DIR/vmlinuz and DIR/initrd.gz. The packages are unpacked below DIR and not
# installed: the QEMU of another suite would remove the machine's qemu-utils.
set -euo pipefail

dir=$1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -x "$dir/qemu" ] && [ -s "$dir/vmlinuz" ] && [ "$dir/initrd.gz" -nt "$here/init" ]; then
    exit 0
fi
command -v apt-get >/dev/null || {
    echo "setup: the guest of the tests is made of Debian packages" >&2
    exit 1
}
echo "setup: unpacking QEMU and a kernel into $dir"
rm -rf "$dir"
mkdir -p "$dir/packages" "$dir/root"
dir=$(cd "$dir" && pwd)
root=$dir/root
if ! apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1; then
    [ "$(id -u)" = 0 ] && apt-get update -q || sudo apt-get update -q
fi
kernel=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image-/ { print $2; exit }')
cd "$dir/packages"
# Libraries that are installed are used as they are.
packages=$(apt-get -s install --no-install-recommends qemu-system-x86 | awk '/^Inst/ { print $2 }')
# shellcheck disable=SC2086 # one word a package
apt-get download -q $packages qemu-system-x86 busybox-static "$kernel" >/dev/null 2>&1
for package in *.deb; do
    dpkg -x "$package" "$root"
done

libraries=$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu
cat >"$dir/qemu" <<QEMU
#!/bin/sh
LD_LIBRARY_PATH=$libraries exec $root/usr/bin/qemu-system-x86_64 \\
    -L $root/usr/share/qemu -L $root/usr/share/seabios -L /usr/share/qemu -L /usr/share/seabios "\$@"
QEMU
chmod +x "$dir/qemu"
cp "$root"/boot/vmlinuz-* "$dir/vmlinuz"

init=$dir/init
mkdir -p "$init"/{bin,dev,lib,mnt}
cp "$root/bin/busybox" "$init/bin/busybox"
find "$root/lib/modules" -name 'virtio*.ko' -exec cp {} "$init/lib/" \;
cp "$here/init" "$init/init"
chmod +x "$init/init"
(cd "$init" && find . | busybox cpio -o -H newc 2>/dev/null | gzip) >"$dir/initrd.gz"
rm -rf "$dir/packages"
