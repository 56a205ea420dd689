#!/usr/bin/env bash
# Installs the package on a minimal Debian in a directory and uses it exactly as README.md and
# docs/install.md say. Needs root, /dev/fuse and Debian's packages.
#
#     fresh_machine.sh PACKAGE.deb
#
# Uses the Debian release and package sources of this machine, and keeps the result in target/fresh
# for the next run. All processes and mounts are in namespaces that end with the script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH=$PATH:/usr/sbin:/sbin

step='preparing'
say() {
    step=$*
    printf 'fresh machine: %s\n' "$step"
}

if [ -z "${FRESH_INSIDE:-}" ]; then
    [ "$(id -u)" = 0 ] || { echo 'fresh machine: needs root' >&2; exit 1; }
    command -v debootstrap >/dev/null || { apt-get update -q && apt-get install -q -y --no-install-recommends debootstrap; }
    root=$(mktemp -d /var/tmp/boxlitefs-fresh.XXXXXX)
    # --one-file-system: never through a mount.
    trap 'rm -rf --one-file-system "$root"' EXIT
    FRESH_INSIDE=$root unshare --mount --pid --fork --kill-child --mount-proc --propagation private "$0" "$@"
    exit
fi

root=$FRESH_INSIDE
package=$(realpath "$1")
trap '[ $? = 0 ] || printf "fresh machine: FAILED at: %s\n" "$step" >&2' EXIT

# ---- the machine --------------------------------------------------------------------------------

suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
base=$PWD/target/fresh/$suite
if [ ! -e "$base.complete" ]; then
    say "a minimal Debian $suite"
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        awk -v suite="$suite" '$2 == suite && $3 == "main" { print $1; exit }')
    rm -rf "$base"
    mkdir -p "$base"
    debootstrap --variant=minbase --include=sudo "$suite" "$base" "$mirror" >"$base.log" || { tail "$base.log"; exit 1; }
    touch "$base.complete"
fi
cp -a --reflink=auto "$base/." "$root"
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
while read -r device major minor; do
    mknod -m 666 "$root/dev/$device" c "$major" "$minor"
done <<'DEVICES'
null 1 3
zero 1 5
full 1 7
random 1 8
urandom 1 9
tty 5 0
fuse 10 229
DEVICES
ln -s /proc/self/fd "$root/dev/fd"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
# Every boot and every container makes it; fusermount3 needs it.
ln -sf ../proc/self/mounts "$root/etc/mtab"
cp /etc/resolv.conf "$root/etc/resolv.conf"
apt-config dump | grep -i '^Acquire::.*proxy' >"$root/etc/apt/apt.conf.d/90fresh" || true
# Nobody is there to confirm.
cat >>"$root/etc/apt/apt.conf.d/90fresh" <<'CONF'
APT::Get::Assume-Yes "true";
Dpkg::Use-Pty "false";
quiet "2";
CONF
as_root() { chroot "$root" /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 sh -euc "$1"; }
as_alice() { as_root "exec su - alice -c '$(printf '%s' "$1" | sed "s/'/'\\\\''/g")'"; }
# Prints the output of a command only if it fails.
quietly() { "$@" >"$root/said" 2>&1 || { cat "$root/said"; return 1; }; }
quietly as_root 'useradd -m -s /bin/bash alice; echo "alice ALL=(ALL) NOPASSWD: ALL" >/etc/sudoers.d/alice; apt-get update'

# The homes name their own paths, so make them where they will be used.
cp -r tests/demo "$root/tmp/demo"
mkdir -p "$root/tmp/tree/etc" "$root/srv"
echo web >"$root/tmp/tree/etc/hostname"
docs=$root/tmp/docs
mkdir "$docs"
cp README.md docs/install.md "$docs"
mkdir -p "$root/home/alice/target/debian"
cp "$package" "$root/home/alice/target/debian/"
demo=$root/tmp/demo
mount --bind "$root/home" /home
mount --bind "$root/srv" /srv
"$demo/make-home.sh" /home/alice/.boxlite "$root/tmp/tree"
"$demo/make-home.sh" /srv/boxlite-home "$root/tmp/tree"
as_root 'chown -R alice:alice /home/alice'

# Prints the Nth code block of a kind in a document, without the fence.
block() { # DOCUMENT KIND N
    awk -v fence="\`\`\`$2" -v wanted="$3" '
        !inside && /^```/ { inside = 1; ours = $0 == fence && ++count == wanted; next }
        inside && $0 == "```" { inside = 0; next }
        inside && ours { print }' "$docs/$1"
}

same() { # WHAT WANTED GOT
    [ "$2" = "$3" ] || { printf 'fresh machine: %s: %s instead of %s\n' "$1" "$3" "$2" >&2; exit 1; }
}

# ---- README.md ----------------------------------------------------------------------------------

commands=$(block README.md sh 1)
say "README.md's first commands, as a user"
printf '%s\n' "$commands" | sed 's/^/    $ /'
same 'lines in the first block of README.md' 2 "$(printf '%s\n' "$commands" | wc -l)"
quietly as_alice "$commands"
same 'the boxes' web "$(as_alice 'ls boxes')"
same "the guest's hostname" web "$(as_alice 'cat boxes/web/rootfs/etc/hostname')"
as_alice 'mkdir boxes/web/snapshots/first && cp boxes/web/export.boxlite backup.boxlite && cp -r boxes/web boxes/web2'
same 'the boxes' 'web
web2' "$(as_alice 'ls boxes')"
as_alice 'boxlitefs status boxes' | sed 's/^/    /'
as_alice 'boxlitefs unmount boxes && boxlitefs check'

say 'what the package has'
for file in /usr/bin/boxlitefs /usr/sbin/mount.boxlite /usr/sbin/mount.fuse.boxlite \
    /usr/share/man/man1/boxlitefs.1.gz /usr/share/man/man8/mount.boxlite.8.gz \
    /usr/share/bash-completion/completions/boxlitefs /usr/share/zsh/site-functions/_boxlitefs \
    /usr/share/fish/vendor_completions.d/boxlitefs.fish \
    /usr/lib/systemd/system/boxlitefs@.service /usr/lib/systemd/user/boxlitefs.service \
    /usr/lib/systemd/user/boxlitefs-snapshots.service /usr/lib/systemd/user/boxlitefs-snapshots.timer \
    /usr/share/mime/packages/boxlitefs.xml /usr/share/applications/boxlitefs.desktop \
    /usr/share/doc/boxlitefs/README.md /usr/share/doc/boxlitefs/copyright; do
    as_root "dpkg -L boxlitefs | grep -qx $file" || { echo "fresh machine: $file is not in the package" >&2; exit 1; }
done
as_root 'dpkg --verify boxlitefs'

# ---- docs/install.md: fstab ---------------------------------------------------------------------

lines=$(block install.md fstab 1)
say 'the line for /etc/fstab'
printf '%s\n' "$lines" | sed 's/^/    /'
as_root "mkdir /mnt/boxlite; cat >>/etc/fstab <<'FSTAB'
$lines
FSTAB
mount -a"
same 'boxes of the home in /srv' web "$(as_root 'ls /mnt/boxlite')"
same 'source and type' '/srv/boxlite-home fuse.boxlite' "$(as_root 'findmnt -n -o SOURCE,FSTYPE /mnt/boxlite' | tr -s ' ')"
same 'boxes that others see' web "$(as_alice 'ls /mnt/boxlite')"
as_root 'mount -o remount,ro /mnt/boxlite'
as_root '! mkdir /mnt/boxlite/web/snapshots/s 2>/dev/null'
as_root 'umount /mnt/boxlite; mount /mnt/boxlite; mkdir /mnt/boxlite/web/snapshots/s; umount /mnt/boxlite'
line=$(block install.md fstab 2)
say "the line for a user's own home"
printf '%s\n' "$line" | sed 's/^/    /'
as_root "cat >>/etc/fstab <<'FSTAB'
$line
FSTAB
mount -a; test -z \"\$(ls /home/alice/boxes)\"; umount /mnt/boxlite"
as_alice 'mount boxes && ls boxes >/dev/null && umount boxes'

# ---- a service ----------------------------------------------------------------------------------

say 'the units'
quietly as_root 'apt-get install --no-install-recommends systemd dbus libpam-systemd
    systemd-analyze verify --man=no boxlitefs@alice.service
    XDG_RUNTIME_DIR=/run systemd-analyze verify --user --man=no boxlitefs.service'

# Runs under systemd once it is up, and writes its exit status to /result.
cat >"$root/service_test.sh" <<'TEST'
#!/bin/bash
trap 'echo $? >/result' EXIT
exec >/service_test.log 2>&1
set -eux
boxes=/home/alice/boxes
state() { systemctl show -P "$1" boxlitefs@alice; }
soon() { for _ in $(seq 200); do if "$@"; then return; fi; sleep 0.1; done; echo "never: $*"; exit 1; }
as_alice() { su alice -c "export XDG_RUNTIME_DIR=/run/user/$(id -u alice); $1"; }
serves() { [ "$(as_alice "ls $boxes" 2>/dev/null)" = "$(printf 'web\nweb2')" ]; }
other_process() { [ "$(state MainPID)" != "$1" ] && [ "$(state MainPID)" != 0 ]; }

# The line in /etc/fstab was mounted at boot, and its messages are in the journal.
soon mountpoint -q /mnt/boxlite
test "$(ls /mnt/boxlite)" = web
mkdir /mnt/boxlite/web/snapshots/after-boot
in_journal() { journalctl --no-pager -o cat -t boxlitefs | grep -q 'snapshot after-boot of box web'; }
soon in_journal
! mkdir /mnt/boxlite/.Trash-0
warned() { journalctl --no-pager -o cat -t boxlitefs -p warning | grep -q refused:; }
soon warned
systemctl stop mnt-boxlite.mount
! mountpoint -q /mnt/boxlite

mkdir -p /etc/systemd/system/boxlitefs@alice.service.d
printf '[Service]\nWatchdogSec=2\nTimeoutAbortSec=2\n' >/etc/systemd/system/boxlitefs@alice.service.d/test.conf
systemctl daemon-reload
systemctl enable --now boxlitefs@alice
# Once started, the service serves where every process sees it.
serves
findmnt -n -t fuse.boxlite "$boxes"
test "$(stat -c %U "/proc/$(state MainPID)")" = alice
as_alice "mkdir $boxes/web/snapshots/by-the-service"
journalctl --no-pager -o cat -u boxlitefs@alice | grep -q 'snapshot by-the-service of box web'
as_alice "rmdir $boxes/web/snapshots/by-the-service"
# It outlives the watchdog's timeout.
process=$(state MainPID)
sleep 5
test "$(state MainPID)" = "$process"
# After a kill, the service and its mount come back.
kill -KILL "$process"
soon other_process "$process"
soon serves
# The watchdog kills a service that no longer answers.
process=$(state MainPID)
kill -STOP "$process"
soon other_process "$process"
soon serves
test "$(state NRestarts)" = 2
# A stop unmounts and is not a failure.
systemctl stop boxlitefs@alice
test "$(state Result)" = success
! mountpoint -q "$boxes"
# The user can run it without root.
loginctl enable-linger alice
soon test -S "/run/user/$(id -u alice)/systemd/private"
as_alice 'systemctl --user enable --now boxlitefs'
serves
as_alice 'systemctl --user stop boxlitefs'
! mountpoint -q "$boxes"
test "$(as_alice 'systemctl --user show -P Result boxlitefs')" = success
TEST
chmod +x "$root/service_test.sh"
cat >"$root/etc/systemd/system/service_test.service" <<'UNIT'
[Unit]
Requires=dbus.socket
After=basic.target dbus.socket
[Service]
Type=oneshot
ExecStart=/service_test.sh
ExecStopPost=/bin/systemctl poweroff --force --force
UNIT

# Runs systemd as the first process of the machine.
cat >"$root/boot.sh" <<'BOOT'
set -eu
cd "$1"
mount --rbind "$1" "$1"
cd "$1"
mount -t proc proc proc
mkdir -p dev/pts dev/shm old
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -sf pts/ptmx dev/ptmx
mount -t tmpfs -o mode=755 tmpfs run
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
    mount -t cgroup2 cgroup2 sys/fs/cgroup
else
    mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
    mkdir sys/fs/cgroup/systemd
    mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd
fi
pivot_root . old
umount -l /old
exec env -i container=chroot PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --log-target=console --unit=service_test.service
BOOT
say 'the services, by a systemd of their own'
timeout -k 5 120 unshare --mount --pid --fork --kill-child --cgroup --uts --ipc --propagation private \
    bash "$root/boot.sh" "$root" >"$root/said" 2>&1 || true
if [ "$(cat "$root/result" 2>/dev/null)" != 0 ]; then
    tail -n 30 "$root/said" "$root/service_test.log"
    exit 1
fi

# ---- removal ------------------------------------------------------------------------------------

say 'removing the package'
quietly as_root 'apt-get purge boxlitefs; test ! -e /usr/bin/boxlitefs; test ! -e /usr/sbin/mount.fuse.boxlite'
say 'done, everything worked'
