# A file manager, used as by a person, on a display that nobody sees. To be sourced.
#
# Needs Xvfb, openbox, thunar, xdotool, gdbus, dbus-daemon and ImageMagick.

# Put before each program of the user that it is to be; `as=(setpriv …)` for another than this one.
as=()
running=()
declare -A frames=()

# A display, a session bus and a file manager: begin_session WIDTHxHEIGHT SETTINGS. SETTINGS is a directory of
# that user, and his home for as long as it takes.
begin_session() {
    settings=$2
    export HOME=$settings XDG_CONFIG_HOME=$settings/.config XDG_CACHE_HOME=$settings/.cache
    export XDG_RUNTIME_DIR=$settings/.run XDG_DATA_HOME=$settings/.local NO_AT_BRIDGE=1
    export GSETTINGS_BACKEND=memory
    # Of a session before.
    rm -rf "$settings/.display" "$XDG_RUNTIME_DIR"
    "${as[@]}" mkdir -p -m 700 "$XDG_CONFIG_HOME" "$XDG_CACHE_HOME" "$XDG_RUNTIME_DIR" "$XDG_DATA_HOME"
    start Xvfb -displayfd 3 -screen 0 "$1x24" -nolisten tcp 3>"$settings/.display"
    wait_for "a display" test -s "$settings/.display"
    DISPLAY=:$(cat "$settings/.display")
    export DISPLAY
    start openbox
    start dbus-daemon --session --nofork --address="unix:path=$XDG_RUNTIME_DIR/bus"
    export DBUS_SESSION_BUS_ADDRESS=unix:path=$XDG_RUNTIME_DIR/bus
    wait_for "a session bus" test -S "$XDG_RUNTIME_DIR/bus"
    start thunar --daemon
    wait_for "a file manager" "${as[@]}" gdbus wait --session --timeout 1 org.freedesktop.FileManager1
    wait_for "a window manager" xdotool get_num_desktops
}

end_session() {
    local number
    # The display last: without one the others complain.
    for ((number = ${#running[@]} - 1; number >= 0; number--)); do
        kill "${running[number]}" && wait "${running[number]}" || true
    done 2>/dev/null
    running=()
}

start() {
    "${as[@]}" "$@" >/dev/null 2>&1 &
    running+=($!)
}

# Tries again and again: wait_for WHAT COMMAND….
wait_for() {
    local what=$1 attempt
    shift
    for attempt in {1..300}; do
        "$@" >/dev/null 2>&1 && return
        sleep 0.1
    done
    echo "after $attempt attempts: no $what" >&2
    if [ -n "${DISPLAY:-}" ]; then import -window root "${TMPDIR:-/tmp}/boxlitefs-desktop.png" || true; fi
    return 1
}

# Until nothing moves any more.
settle() {
    local last=- now
    for _ in {1..60}; do
        sleep 0.4
        now=$(import -window root rgb:- | sha256sum)
        [ "$now" != "$last" ] || return 0
        last=$now
    done
}

# Shows a directory: open_window PATH LEFT TOP WIDTH HEIGHT. $window is the window's number.
open_window() {
    local before
    before=$(windows)
    # Ends at once where the file manager runs, and is the file manager where that ended.
    start thunar "$1"
    wait_for "window of $1" is_another_than "$before"
    window=$(comm -13 <(echo "$before") <(windows) | head -n 1)
    # Does not tell when that is done if it was there before.
    xdotool windowmove "$window" "$2" "$3" windowsize "$window" "$4" "$5"
    # Where a window is can't be asked of xdotool: it counts the frame twice.
    frames[$window]="$2 $3 $4 $5"
    settle
}

close_window() {
    xdotool windowactivate --sync "$1" key ctrl+w
    wait_for "end of a window" is_gone "$1"
}

windows() { { xdotool search --onlyvisible --name ' - Thunar$' 2>/dev/null || true; } | sort; }
is_another_than() { [ -n "$(comm -13 <(echo "$1") <(windows))" ]; }
is_gone() { ! windows | grep -qx "$1"; }

# What is typed goes to this window: press WINDOW KEY….
press() {
    xdotool windowactivate --sync "$1" key "${@:2}" 2>/dev/null
    settle
}

# Selects what has this name, as typing it does; its middle is $x $y then, for the picture changed there:
# select_item WINDOW NAME.
select_item() {
    local left top width height part changed
    read -r left top width height <<<"${frames[$1]}"
    # Without the line that tells what is selected, and the field that shows what is typed.
    part=${width}x$((height - 140))+$left+$((top + 90))
    xdotool mousemove $((left + width - 20)) $((top + height - 60)) click 1
    press "$1" Escape
    import -window root -crop "$part" +repage "$settings/.without.png"
    xdotool type "$2"
    sleep 0.3
    press "$1" Escape
    import -window root -crop "$part" +repage "$settings/.with.png"
    changed=$(convert "$settings/.without.png" "$settings/.with.png" -compose difference -composite \
        -threshold 5% -trim -format '%w %h %X %Y' info:)
    read -r width height x y <<<"$changed"
    x=$((left + x + width / 2)) y=$((top + 90 + y + height / 2))
}

# Drags what has this name to the empty part of another window, and has a picture of it on the way if one is
# asked for: drag WINDOW NAME TO [PICTURE].
drag() {
    local left top width height to_x to_y step
    select_item "$1" "$2"
    read -r left top width height <<<"${frames[$3]}"
    to_x=$((left + width * 4 / 5)) to_y=$((top + height * 4 / 5))
    xdotool mousemove "$x" "$y" mousedown 1
    for step in {1..10}; do
        xdotool mousemove $((x + (to_x - x) * step / 10)) $((y + (to_y - y) * step / 10))
        sleep 0.1
    done
    settle
    if [ -n "${4:-}" ]; then import -window root "$4"; fi
    xdotool mouseup 1
}
