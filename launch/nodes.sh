#!/usr/bin/env bash
# A training on several machines, or on one: start the same command on each of them.
#   HEAD=gpu01 NODES=2 GPUS=8 launch/nodes.sh mine.toml [--set table.key=value ...]
#   HEAD   the name of one of the machines, by which the others reach it; not needed for NODES=1
#   NODES  how many machines (1)
#   GPUS   processes on each: as many as it has GPUs, if not given
#   PORT   of the rendezvous (29500); another one for each training that meets at the same HEAD
# Addresses are found by themselves. On a machine with several networks, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose the one.
set -euo pipefail
recipe=${1:?"usage: HEAD=gpu01 NODES=2 GPUS=8 $0 RECIPE [--set table.key=value ...]"}
shift
nodes=${NODES:-1} port=${PORT:-29500} gpus=${GPUS:-gpu}
PYTHON=${PYTHON:-python}

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
)
[ -n "${address:-}" ] || exit 2
if [ "$nodes" -gt 1 ] && [ -z "${HEAD:-}" ]; then
  echo "error: NODES=$nodes machines, and no HEAD where they meet" >&2
  echo "    -> HEAD=<the name of one of them> NODES=$nodes $0 $recipe" >&2
  exit 2
fi

# SIGUSR1 saves a checkpoint and ends the run, as SIGTERM does: torchrun passes on what it is told to, and waits for the checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
echo "node $(hostname) at $address, $nodes of them meet at ${HEAD:-localhost}:$port" >&2
exec "$PYTHON" -m torch.distributed.run \
  --nnodes "$nodes" --nproc_per_node "$gpus" --max_restarts 0 \
  --rdzv_backend c10d --rdzv_endpoint "${HEAD:-localhost}:$port" --rdzv_conf "is_host=$is_head,read_timeout=30" --rdzv_id finetune \
  --local_addr "$address" --signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m finetune --recipe "$recipe" "$@"
