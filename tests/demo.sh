#!/usr/bin/env bash
# A tour of boxlitefs: makes a throwaway home with one box, mounts it, and works with the box
# through ls, mkdir, cp and rmdir. Stops at the first step that fails.
#
#     make demo            or, with boxlitefs in PATH, tests/demo.sh
#     make demo KEEP=1     leaves the home mounted, to try things
#
# BOXLITE_PYTHON names a Python that has the `boxlite` package; without it the home is made by hand.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${BOXLITE_PYTHON:-python3}
keep=${KEEP:-}
# Users' PATH often lacks the directory of mke2fs.
export PATH=$PATH:/usr/sbin:/sbin
place=$(mktemp -d "${TMPDIR:-/tmp}/boxlitefs-demo.XXXXXX")
step='preparing the home'

finish() {
    local status=$?
    trap - EXIT
    if [ "$status" != 0 ]; then
        echo "demo: FAILED at: $step" >&2
    fi
    if [ -n "$keep" ]; then
        printf '\nThe home %s stays mounted on %s. When done:\n' "$place/home" "$place/mnt"
        printf '  boxlitefs unmount %s && rm -rf %s\n' "$place/mnt" "$place"
        exit "$status"
    fi
    cd /
    if mountpoint -q "$place/mnt" && ! boxlitefs unmount "$place/mnt"; then
        # Never delete through a mount.
        echo "demo: left mounted: $place/mnt" >&2
        exit 1
    fi
    rm -rf "$place"
    [ "$status" != 0 ] || printf '\ndemo: done, everything worked\n'
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say() {
    printf '\n# %s\n' "$*"
}

# Prints a command as one would type it, then its output.
run() {
    step=$*
    printf '$ %s\n' "$step"
    "$@"
}

have_boxlite() {
    "$python" -c 'import boxlite' 2>/dev/null
}

# Makes the guest's files.
make_tree() {
    mkdir -p tree/etc tree/srv/www
    echo web >tree/etc/hostname
    echo '<h1>Hello from a box</h1>' >tree/srv/www/index.html
}

make_home() {
    make_tree
    if have_boxlite; then
        "$python" "$here/wheel.py" home make-archive web.boxlite web --tree tree >/dev/null
        "$python" "$here/wheel.py" home import web.boxlite web >/dev/null
        rm web.boxlite
    else
        echo 'BoxLite is not installed here: the home is made by hand.'
        "$here/demo/make-home.sh" home tree
    fi
}

# Prints the boxes that BoxLite itself finds, one name per line.
boxlite_list() {
    "$python" "$here/wheel.py" home list |
        python3 -c 'import json, sys; print(*(box["name"] for box in json.load(sys.stdin)), sep="\n")'
}

cd "$place"
mkdir out mnt
make_home

say 'Mount the home.'
run boxlitefs mount home mnt
run ls -l mnt

say 'A box is a directory.'
run ls -l mnt/web
run head -n 12 mnt/web/box.json

say 'Take a snapshot.'
run mkdir mnt/web/snapshots/before-upgrade
run ls -l mnt/web/snapshots/before-upgrade

say 'Back the box up: an archive that any BoxLite imports.'
run cp mnt/web/export.boxlite out/web.boxlite
run tar tvf out/web.boxlite

say "Look at the guest's files, as they are now or were in the snapshot."
run ls mnt/web/rootfs
run cat mnt/web/snapshots/before-upgrade/rootfs/etc/hostname

say 'Clone it, snapshots and all; no data is copied.'
run cp -r mnt/web mnt/web2

say 'Make a box of the backup.'
run cp out/web.boxlite mnt/restored.boxlite
run ls -l mnt
run ls -d mnt/web mnt/web/snapshots/before-upgrade mnt/web2/snapshots/before-upgrade mnt/restored

say 'Go back to the snapshot; no data is copied either.'
run cp mnt/web/snapshots/before-upgrade/export.boxlite mnt/web/export.boxlite
run cmp mnt/web/snapshots/before-upgrade/export.boxlite mnt/web/export.boxlite

say 'Give the clone another name, and delete what was restored.'
run mv mnt/web2 mnt/try
run rm -r mnt/restored
run ls mnt

say 'Delete the snapshot; the data that the clone needs stays.'
run rmdir mnt/web/snapshots/before-upgrade
run ls -l mnt/web/snapshots

say 'Look for damage and leftovers.'
run boxlitefs check home

if have_boxlite; then
    say 'What BoxLite itself says.'
    step='listing the boxes with BoxLite'
    listed=$(boxlite_list)
    echo "$listed"
    [ "$(sort <<<"$listed" | tr '\n' ' ')" = 'try web ' ]
fi

say 'What was done.'
run tail mnt/.boxlite/log
