#!/usr/bin/env bash
# Takes docs/file-manager.png: a file manager, without a person, looks at the mount, a box, a
# snapshot and the files of its guest.
#
#     screenshots.sh PYTHON-WITH-THE-WHEEL PICTURE
#
# Needs Xvfb, openbox, thunar, xdotool and ImageMagick, which `make screenshots` installs.
set -euo pipefail

python=$1
picture=$(realpath "$2")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
place=$(mktemp -d)
display=:97
processes=()
shots=()

finish() {
    for process in "${processes[@]}"; do kill "$process" 2>/dev/null || true; done
    boxlitefs unmount "$place/boxes" 2>/dev/null || true
    rm -rf "$place"
}
trap finish EXIT

cd "$place"
mkdir -p boxes home shots tree/{bin,dev,etc/apk,home/agent,proc,root,run,srv/www,sys,tmp,usr/{bin,lib},var/{lib,log}}
echo web >tree/etc/hostname
echo '<h1>Hello from a box</h1>' >tree/srv/www/index.html
head -c 20000 /dev/urandom >tree/usr/bin/agent
printf '#!/bin/sh\necho hi\n' >tree/home/agent/task.sh
wheel() { "$python" "$here/wheel.py" home "$@" >/dev/null; }
wheel make-archive web.boxlite web --tree tree
for name in web api worker; do wheel import web.boxlite $name; done
boxlitefs mount home boxes
mkdir boxes/web/snapshots/{clean,before-upgrade}

export DISPLAY=$display XDG_CONFIG_HOME=$place/config XDG_CACHE_HOME=$place/cache NO_AT_BRIDGE=1
export XDG_RUNTIME_DIR=$place/run HOME=$place
mkdir -m 700 run
Xvfb $display -screen 0 760x470x24 >/dev/null 2>&1 &
processes+=($!)
for _ in {1..100}; do xdotool getdisplaygeometry >/dev/null 2>&1 && break || sleep 0.1; done
openbox >/dev/null 2>&1 &
processes+=($!)

for what in . web web/snapshots/before-upgrade web/rootfs; do
    dbus-run-session -- thunar "$place/boxes/$what" >/dev/null 2>&1 &
    manager=$!
    for _ in {1..200}; do
        window=$(xdotool search --onlyvisible --class thunar 2>/dev/null | tail -n 1) && [ -n "$window" ] && break
        sleep 0.1
    done
    xdotool windowsize "$window" 760 450 windowmove "$window" 0 0
    sleep 4
    import -window root "shots/$(printf '%02d' "${#shots[@]}").png"
    shots+=("$what")
    xdotool windowclose "$window"
    kill $manager 2>/dev/null || true
    wait $manager 2>/dev/null || true
    while xdotool search --onlyvisible --class thunar >/dev/null 2>&1; do sleep 0.1; done
done
montage shots/*.png -tile 2x2 -geometry +4+4 "$place/all.png"
convert "$place/all.png" -colors 128 "PNG8:$picture"
echo "$picture: $(identify -format '%wx%h' "$picture"), $(stat -c %s "$picture") bytes"
