#!/usr/bin/env bash
# Takes the pictures of a file manager in docs/, without a person: file-manager.png of the mount, a box, a
# snapshot and the files of its guest, dragging.png of an archive on its way in, and of one on its way out.
#
#     screenshots.sh PYTHON-WITH-THE-WHEEL DOCS          as root, for a desktop belongs to somebody else
set -euo pipefail

python=$1
docs=$(realpath "$2")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/session.sh"
place=$(mktemp -d /tmp/demo-XXX)

finish() {
    end_session
    umount "$place/boxes" 2>/dev/null || true
    rm -rf "$place"
}
trap finish EXIT

cd "$place"
mkdir -p boxes Downloads .shots .tree/{bin,dev,etc/apk,home/agent,proc,root,run,srv/www,sys,tmp,usr/{bin,lib},var/{lib,log}}
echo web >.tree/etc/hostname
echo '<h1>Hello from a box</h1>' >.tree/srv/www/index.html
head -c 20000 /dev/urandom >.tree/usr/bin/agent
printf '#!/bin/sh\necho hi\n' >.tree/home/agent/task.sh
wheel() { "$python" "$here/../wheel.py" .home "$@" >/dev/null; }
wheel make-archive Downloads/api.boxlite api --tree .tree
for name in web worker; do wheel import Downloads/api.boxlite $name; done
chmod 755 .
chown -R nobody:nogroup .
boxlitefs mount -o allow_other .home boxes
mkdir boxes/web/snapshots/clean

"$here/drag.sh" boxes Downloads .shots/in.png .shots/out.png
montage .shots/in.png .shots/out.png -tile 1x2 -geometry +4+4 .shots/drag.png

mkdir boxes/web/snapshots/before-upgrade
as=(setpriv --reuid=nobody --regid=nogroup --clear-groups)
begin_session 760x470 "$place"
number=0
for what in . web web/snapshots/before-upgrade web/rootfs; do
    open_window "$place/boxes/$what" 0 0 760 450
    import -window root ".shots/look-$((number++)).png"
    close_window "$window"
done
montage .shots/look-?.png -tile 2x2 -geometry +4+4 .shots/look.png

for picture in look:file-manager drag:dragging; do
    convert ".shots/${picture%:*}.png" -colors 128 "PNG8:$docs/${picture#*:}.png"
    identify -format '%d/%f: %wx%h, %b\n' "$docs/${picture#*:}.png"
done
