#!/usr/bin/env bash
# Makes a BoxLite home with one stopped box, `web`, without BoxLite: the files and rows that
# BoxLite 0.10.8 (database schema 10) makes for an imported box.
#
#     make-home.sh HOME TREE       TREE is what the guest's disk contains
set -euo pipefail

mkdir -p "$1"
home=$(cd "$1" && pwd)
tree=$2
schema=$(dirname "${BASH_SOURCE[0]}")/schema.sql
id=DemoBox00web # twelve base62 digits, as BoxLite's
now=$(date -u +%Y-%m-%dT%H:%M:%SZ)
seconds=$(date +%s)
container=$(printf '%064d' 0)

mkdir -p "$home"/{bases,boxes/"$id"/disks,db,images/disk-images,locks,logs,tmp}
touch "$home/.lock" "$home/locks/0"

raw=$home/tmp/raw
mke2fs -q -t ext4 -d "$tree" "$raw" 64M >/dev/null
qemu-img convert -O qcow2 "$raw" "$home/boxes/$id/disks/disk.qcow2"
rm "$raw"

# A quote inside an SQL string is doubled, inside a JSON string it needs a backslash.
box_home=${home//\\/\\\\}/boxes/$id
box_home=${box_home//\"/\\\"}
box_home=${box_home//\'/\'\'}

{
    cat "$schema"
    cat <<SQL
INSERT INTO schema_version VALUES (1, 10, '$now');
INSERT INTO box_config VALUES ('$id', 'web', $seconds, '{"id":"$id","name":"web","created_at":"$now","container":{"id":"$container"},"options":{"cpus":null,"memory_mib":null,"disk_size_gb":null,"working_dir":null,"env":[],"rootfs":{"Image":"alpine:latest"},"volumes":[],"network":{"Enabled":{"allow_net":[]}},"ports":[],"auto_remove":false,"auto_delete":null,"detach":false,"entrypoint":null,"cmd":null,"user":null,"secrets":[]},"engine_kind":"Libkrun","box_home":"$box_home"}');
INSERT INTO box_state VALUES ('$id', 'stopped', NULL, '{"status":"stopped","pid":null,"container_id":null,"last_updated":"$now","lock_id":0,"health_status":{"state":"None","failures":0,"last_check":null},"error_reason":null,"exit_code":null}');
SQL
} | sqlite3 -bail "$home/db/boxlite.db" >/dev/null
