#!/usr/bin/env bash
# Run once on every node before anything heavy: check_node.sh PYTHON OUT DEVICE. Prints "SWITCH NODE ADDRESS SECONDS", or one
# line that says why the node cannot take part, and leaves with 2.
set -uo pipefail
node=$(hostname -s)

refuse() {
    echo "error: $node: $1" >&2
    exit 2
}

"$1" -c "" 2>/dev/null || refuse "PYTHON=$1 does not start; is the venv or container there?"
absent=$("$1" -c '
from importlib.util import find_spec
specs = {name: find_spec(name) for name in ("torch", "megatron.core", "deepspeed", "ray", "transformers", "cogvit")}
print(*(name for name, spec in specs.items() if spec is None or spec.origin is None))  # an empty folder has no origin
' 2>&1) || absent="an import fails: ${absent##*$'\n'}"
[[ -z $absent ]] || refuse "$1 lacks $absent"
# Only where somebody speaks of GPUs, for torch takes seconds to start.
if [[ ${3:-auto} == cuda ]] || env | grep -Eq '^SLURM\w*_GPUS\w*=.*[1-9]' || command -v nvidia-smi >/dev/null; then
    fault=$("$1" -c '
import sys
from cogvit.config.device import device_fault, device_flag
print(device_fault(device_flag(sys.argv[1])))' "${3:-auto}" 2>&1) || true
    fault=${fault##*$'\n'}
    [[ -z $fault ]] || refuse "$fault"
fi
probe=$2/logs/.writable-$node-${SLURM_JOB_ID:-}
{ mkdir -p "$2/logs" && : >"$probe" && rm "$probe"; } 2>/dev/null || refuse "--out $2 cannot be written"
address=$(getent ahostsv4 "$node" | awk '{ print $1; exit }')
[[ -n $address ]] || refuse "its own name has no IPv4 address; see /etc/hosts or DNS"
[[ $address != 127.* || ${SLURM_JOB_NUM_NODES:-1} == 1 ]] ||
    refuse "its own name means $address, where other nodes do not find it; see /etc/hosts"
echo "${SLURM_TOPOLOGY_ADDR:-$node} ${SLURMD_NODENAME:-$node} $address $(date +%s)"
