#!/usr/bin/env bash
# Starts Ray on this machine, in the foreground: the head of a cluster, or a node that joins it.
#
#   infra/cluster/start.sh head --num-cpus 8         # Ctrl-C or SIGTERM ends the node
#   infra/cluster/start.sh HEAD:6379 --num-gpus 1    # on every other machine
#
# Further words go to `ray start`. Everyone who holds the token may run any code on the cluster, and
# nobody else may: make one on the head with `ray get-auth-token --generate` and copy
# ~/.ray/auth_token to every machine that starts or uses it. The token and the data travel in the
# clear, so the machines need a private network.
#
# All ports are fixed: FIRST_PORT (6379) to FIRST_PORT + 199. Open these between the machines; the
# job server, FIRST_PORT + 1, listens on 127.0.0.1 alone.
set -euo pipefail
: "${1:?usage: infra/cluster/start.sh head|HEAD:PORT [flags of ray start]}"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# `ray job stop` kills after so many seconds, 3 by default: a run that ends in order takes longer.
export RAY_JOB_STOP_WAIT_TIME_S=${RAY_JOB_STOP_WAIT_TIME_S:-30}
first=${FIRST_PORT:-6379}
role=(--address "$1")
if [ "$1" = head ]; then
  role=(--head --port "$first" --dashboard-host 127.0.0.1 --dashboard-port $((first + 1)))
  role+=(--ray-client-server-port $((first + 2)))
fi
exec ray start "${role[@]}" --block --disable-usage-stats \
  --node-manager-port $((first + 3)) --object-manager-port $((first + 4)) \
  --runtime-env-agent-port $((first + 5)) --metrics-export-port $((first + 6)) \
  --dashboard-agent-listen-port $((first + 7)) --dashboard-agent-grpc-port $((first + 8)) \
  --min-worker-port $((first + 10)) --max-worker-port $((first + 199)) "${@:2}"
