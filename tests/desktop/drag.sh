#!/usr/bin/env bash
# What a person does with a mouse in a file manager who knows nothing of boxes: looks, drags an archive
# in and backups out, copies a box, deletes one. Whether that came out well is for others to judge.
#
#     drag.sh MOUNT FOLDER [PICTURE…]
#
# MOUNT has the boxes web, with a snapshot clean, and worker; FOLDER, in a directory for settings and
# caches, has api.boxlite. FOLDER/.looked becomes the mount's status when it was only looked at. PICTURE
# is of an archive that is dragged in, the second of one that is dragged out.
set -euo pipefail
mount=$(realpath "$1")
folder=$(realpath "$2")
. "$(dirname "${BASH_SOURCE[0]}")/session.sh"
if [ "$(id -u)" = 0 ] && [ "$(stat -c %U "$folder")" != root ]; then
    as=(setpriv --reuid="$(stat -c %u "$folder")" --regid="$(stat -c %g "$folder")" --clear-groups)
fi

# Those who copy give a file its time at the end.
is_copied() { [ -f "$2" ] && [ "$(stat -L -c '%s %Y' "$1")" = "$(stat -c '%s %Y' "$2")" ]; }
is_gone_from() { ! [ -e "$1" ]; }
one_more_web() { compgen -G "$mount/web (*/snapshots/clean"; }

trap end_session EXIT
begin_session 1000x480 "$(dirname "$folder")"

open_window "$folder" 0 0 500 460
outside=$window
open_window "$mount/web/snapshots/clean" 500 0 500 460
close_window "$window"
open_window "$mount/web" 500 0 500 460
close_window "$window"
open_window "$mount" 500 0 500 460
boxes=$window
cat "$mount/.boxlite/status" >"$folder/.looked"

drag "$outside" api.boxlite "$boxes" ${3:+"$3"}
wait_for "box api" test -e "$mount/api/box.json"
# The window shows the file that was dropped until it is told to look again.
press "$boxes" F5

drag "$boxes" web "$outside"
wait_for "backup of a box" is_copied "$mount/web/export.boxlite" "$folder/web/export.boxlite"
wait_for "backup of its snapshot" is_copied \
    "$mount/web/snapshots/clean/export.boxlite" "$folder/web/snapshots/clean/export.boxlite"

select_item "$boxes" web
press "$boxes" ctrl+c
press "$boxes" ctrl+v
wait_for "copy of a box" one_more_web

select_item "$boxes" worker
press "$boxes" shift+Delete
# It asks, and deleting is what Return says.
xdotool key Return
wait_for "deletion" is_gone_from "$mount/worker"
close_window "$boxes"

open_window "$mount/web" 500 0 500 460
drag "$window" export.boxlite "$outside" ${4:+"$4"}
wait_for "dragged archive" is_copied "$mount/web/export.boxlite" "$folder/export.boxlite"
close_window "$window"

# In a box it is a link, and a link is what would be copied. This is where that leads.
open_window "$mount/.boxlite/view/web" 500 0 500 460
drag "$window" export.boxlite.zst "$outside"
wait_for "dragged compressed archive" is_copied "$mount/web/export.boxlite.zst" "$folder/export.boxlite.zst"
