#!/usr/bin/env bash
# Installs what tests/slurm needs, from Debian, as root. Starts no service: the tests run daemons of their own.
set -euo pipefail
packages=(slurmctld slurmd slurm-client munge iproute2 shellcheck)
export DEBIAN_FRONTEND=noninteractive
if dpkg --status "${packages[@]}" >/dev/null 2>&1; then exit 0; fi
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
install() { apt-get install --yes --quiet --no-install-recommends "${packages[@]}"; }
install || { apt-get update --quiet && install; }
