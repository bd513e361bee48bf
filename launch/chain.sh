#!/usr/bin/env bash
# Precompute, then stage 1, then stage 2, each when the one before is done: launch/chain.sh DIR [options of sbatch]
#
# Writes DIR/features, DIR/stage1 and DIR/stage2. Presets and flags of the stages come from the environment:
#   PRESET1=stage1_cogvit_l FLAGS1="--data.shards /data/*.tar" FLAGS2="--data.shards /data/*.tar" launch/chain.sh /runs/mine -p gpu
# The same command goes on where a chain stopped.
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    if [[ ${1:-} == -h || ${1:-} == --help ]]; then exit 0; fi
    exit 2
fi
DIR=$1
shift
PRESET1=${PRESET1:-stage1_cogvit_l} PRESET2=${PRESET2:-stage2_cogvit_l}
read -ra FLAGS1 <<<"${FLAGS1:-}"
read -ra FLAGS2 <<<"${FLAGS2:-}"

submit() { sbatch --parsable --kill-on-invalid-dep=yes "$@"; }
features=$(submit "$@" launch/precompute.sh "$PRESET1" "${FLAGS1[@]}" --out "$DIR/features")
stage1=$(submit --dependency="afterok:$features" "$@" launch/stage1.sh "$PRESET1" "${FLAGS1[@]}" \
    --teachers.source store --teachers.store "$DIR/features" --out "$DIR/stage1")
stage2=$(submit --dependency="afterok:$stage1" "$@" launch/stage2.sh "$PRESET2" "${FLAGS2[@]}" \
    --init "$DIR/stage1" --out "$DIR/stage2")
echo "precompute $features, stage 1 $stage1, stage 2 $stage2"
