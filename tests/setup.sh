#!/usr/bin/env bash
# Installs what the tests and the demo need: programs, and BoxLite in its own Python environment.
#
#     setup.sh VENV test|all|demo
#
# `test` installs what `make test` needs, `all` also what the other tests need. `demo` works without
# BoxLite where it is unavailable. Installs only what is missing; reports what it could not install,
# and fails.
set -euo pipefail

venv=$1
tier=$2
boxlite=boxlite==0.10.8

# Programs, each with its Debian package. Installed programs are left alone: a different version of
# qemu-utils would remove the machine's qemu-system-common.
programs='
cp coreutils
fusermount3 fuse3
mke2fs e2fsprogs
filefrag e2fsprogs
mkfs.xfs xfsprogs
mkfs.btrfs btrfs-progs
sfdisk fdisk
qemu-img qemu-utils
zstd zstd
rsync rsync
strace strace
busybox busybox
sqlite3 sqlite3
getfattr attr
setfacl acl
gio libglib2.0-bin
python3 python3-venv
unshare util-linux
findmnt util-linux
setpriv util-linux
bash bash
'
[ "$tier" != all ] || programs+='
c++ g++
zip zip
unzip unzip
curl curl
scp openssh-client
sshd openssh-server
sshfs sshfs
javac default-jdk-headless
restic restic
rclone rclone
mc mc
perl perl
man man-db
mandoc mandoc
zsh zsh
fish fish
file file
update-mime-database shared-mime-info
desktop-file-validate desktop-file-utils
thunar thunar
Xvfb xvfb
openbox openbox
xdotool xdotool
import imagemagick
dbus-daemon dbus
systemd-analyze systemd
strip binutils
debootstrap debootstrap
'
# Users' PATH often lacks the directory of mke2fs.
export PATH=$PATH:/usr/sbin:/sbin

missing() {
    local program package
    while read -r program package; do
        if [ -n "$program" ] && ! command -v "$program" >/dev/null; then
            echo "$package"
        fi
    done <<<"$programs"
    # Debian ships python3 without the module that venv needs.
    if command -v python3 >/dev/null && ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
        echo python3-venv
    fi
}

install_programs() {
    local packages=$* root=
    if ! command -v apt-get >/dev/null; then
        echo "setup: install what these Debian packages have: $packages" >&2
        return 1
    fi
    [ "$(id -u)" = 0 ] || root=sudo
    echo "setup: installing $packages"
    $root apt-get update -q
    # shellcheck disable=SC2086 # one word a package
    $root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -q -y --no-install-recommends $packages
}

have_boxlite() {
    "$venv/bin/python" - "$boxlite" 2>/dev/null <<'PYTHON'
import importlib.metadata, sys
name, version = sys.argv[1].split("==")
sys.exit(importlib.metadata.version(name) != version)
PYTHON
}

install_boxlite() {
    echo "setup: installing $boxlite into $venv"
    python3 -m venv --clear "$venv" && "$venv/bin/python" -m pip install --quiet "$boxlite"
}

lacking=$(missing | sort -u | tr '\n' ' ')
if [ -n "$lacking" ]; then
    # shellcheck disable=SC2086 # one word a package
    install_programs $lacking || true
    lacking=$(missing | sort -u | tr '\n' ' ')
    if [ -n "$lacking" ]; then
        echo "setup: could not install: $lacking" >&2
        exit 1
    fi
fi
if ! have_boxlite && ! { install_boxlite && have_boxlite; }; then
    echo "setup: could not install $boxlite with pip" >&2
    [ "$tier" = demo ] || exit 1
fi
if [ "$tier" = all ]; then
    "$(dirname "${BASH_SOURCE[0]}")/guest/prepare.sh" "$(dirname "$venv")/guest"
fi
