#!/bin/sh
# stage.sh NAME COMMAND: run a shell command, and say how many seconds it took, whether it ends well or not.
started=$(date +%s)
sh -c "$2"
status=$?
echo "$1: $(($(date +%s) - started)) s"
exit $status
