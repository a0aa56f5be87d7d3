#!/usr/bin/env bash
# A training on several machines, or on one: start the same command on each of them.
#   HEAD=gpu01 NODES=2 GPUS=8 launch/nodes.sh mine.toml [--set table.key=value ...]
#   HEAD   the name of one of the machines, by which the others reach it; not needed for NODES=1
#   NODES  how many machines (1)
#   GPUS   processes on each: as many as it has GPUs, if not given
#   PORT   of the rendezvous (29500); another one for each training that meets at the same HEAD
# Addresses are found by themselves. On a machine with several networks, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose the one.
set -euo pipefail
case "${1:-}" in "" | -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
recipe=$1
shift
nodes=${NODES:-1} port=${PORT:-29500} gpus=${GPUS:-gpu}
PYTHON=${PYTHON:-python}
refuse() { printf 'error: %s\n    -> %s\n' "$1" "$2" >&2; exit 2; }
[[ $nodes =~ ^[1-9][0-9]*$ ]] || refuse "NODES=$nodes is no number of machines" "NODES=2, say"
[[ $gpus =~ ^([1-9][0-9]*|gpu)$ ]] || refuse "GPUS=$gpus is no number of processes" "GPUS=8, say; all GPUs of each machine if it is left out"
[[ $port =~ ^[1-9][0-9]{0,4}$ ]] || refuse "PORT=$port is no port" "PORT=29500, say"
[ -f "$recipe" ] || refuse "$recipe: no such recipe" "give a path that is right from $PWD on each machine"
command -v "$PYTHON" > /dev/null || refuse "there is no $PYTHON" "activate the environment that finetune is installed in, or set PYTHON"
if [ "$nodes" -gt 1 ] && [ -z "${HEAD:-}" ]; then
  refuse "NODES=$nodes machines, and no HEAD where they meet" "HEAD=<the name of one of them> NODES=$nodes $0 $recipe"
fi
if [ "$gpus" = gpu ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  refuse "there is no GPU here, and the number of processes is not given" "GPUS=2, say, trains on the CPU"
fi
[ "$nodes" -gt 1 ] || port=0  # any that is free

# An address of HEAD can be bound on its own machine alone. The others are told by which of their addresses they reach it:
# torchrun would tell its peers a host's name, which may be known to itself alone.
read -r is_head address < <("$PYTHON" - "${HEAD:-localhost}" "$port" <<'PYTHON'
import socket, sys

head, port = sys.argv[1], int(sys.argv[2])
try:
    family, _, _, _, place = socket.getaddrinfo(head, port, type=socket.SOCK_DGRAM)[0]
except OSError as error:
    sys.exit(f"error: HEAD={head} cannot be found ({error.strerror})\n    -> give its address, or a name that each machine knows")
with socket.socket(family, socket.SOCK_DGRAM) as probe:
    try:
        probe.bind((place[0], 0))
        print(1, head)
    except OSError:
        probe.connect(place)
        print(0, probe.getsockname()[0])
PYTHON
) || exit 2

# SIGUSR1 saves a checkpoint and ends the run, as SIGTERM does: torchrun passes on what it is told to, and waits for the checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
[ "$nodes" -eq 1 ] || echo "node $(hostname) at $address, $nodes of them meet at ${HEAD:-localhost}:$port" >&2
exec "$PYTHON" -m torch.distributed.run \
  --nnodes "$nodes" --nproc_per_node "$gpus" --max_restarts 0 \
  --rdzv_backend c10d --rdzv_endpoint "${HEAD:-localhost}:$port" --rdzv_conf "is_host=$is_head,read_timeout=30" --rdzv_id finetune \
  --local_addr "$address" --signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m finetune --recipe "$recipe" "$@"
