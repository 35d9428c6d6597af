#!/bin/sh
# debian.sh PACKAGE FILE: install Debian's PACKAGE unless FILE is there, if that is possible here.
set -u
[ -e "$2" ] && exit 0
command -v apt-get > /dev/null || exit 0
if [ "$(id -u)" = 0 ]; then
    run=""
elif command -v sudo > /dev/null && sudo -n true 2> /dev/null; then
    run="sudo -n"
else
    echo "$1 is not installed, and only an administrator can: apt-get install $1"
    exit 0
fi
echo "Installing Debian's package $1"
$run apt-get install -y -qq "$1" > /dev/null 2>&1 ||
    { $run apt-get update -qq && $run apt-get install -y -qq "$1"; } > /dev/null 2>&1 ||
    echo "$1 could not be installed; going on without it"
exit 0
