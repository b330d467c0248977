#!/usr/bin/env bash
# A Slurm cluster on this machine, for the tests: two nodes of 8 CPUs and 8 H100s that are only said to exist.
#
#   cluster.sh start DIR PORT    daemons with all their files in DIR, on PORT and the next ones; clients
#                                find them by SLURM_CONF=DIR/slurm.conf
#   cluster.sh stop DIR          ends them
#
# Needs root and Debian's slurm-wlm and munge (22.05 tried); neither systemd, cgroups nor a database.
set -euo pipefail

action=${1:?start or stop} DIR=$(realpath -m "${2:?a directory}") PORT=${3:-}
NODES=(dytnode1 dytnode2)
MARK="# megatron_dyt's test cluster" # of our lines in /etc/hosts
munge_socket=$DIR/munge.socket

start() {
  : "${PORT:?a port}"
  mkdir -p "$DIR"/{state,spool}
  start_munge
  name_nodes
  make_gpus
  write_configuration
  export SLURM_CONF=$DIR/slurm.conf
  slurmctld -i
  local node
  for node in "${NODES[@]}"; do slurmd -N "$node"; done
  for _ in $(seq 200); do
    [ "$(sinfo -h -p all -t idle -o %D 2>/dev/null)" != "${#NODES[@]}" ] || return 0
    sleep 0.2
  done
  sinfo -N -l
  tail -n 20 "$DIR"/*.log
  return 1
}

start_munge() {
  (umask 077 && mkdir -p "$DIR/munge" && head -c 1024 /dev/urandom >"$DIR/munge/key")
  munged --force --key-file="$DIR/munge/key" --seed-file="$DIR/munge/seed" --socket="$munge_socket" \
    --pid-file="$DIR/munged.pid" --log-file="$DIR/munged.log" 2>/dev/null
}

# The nodes' names must resolve: ranks meet at the first one's.
name_nodes() {
  local node
  for node in "${NODES[@]}"; do
    getent hosts "$node" >/dev/null || echo "127.0.0.1 $node $MARK" >>/etc/hosts
  done
}

# Slurm counts a GPU whose file is a device, and never opens it: these are all /dev/null.
make_gpus() {
  local number
  for number in {0..7}; do mknod "$DIR/gpu$number" c 1 3; done
  echo "NodeName=dytnode[1-2] Name=gpu Type=h100 File=$DIR/gpu[0-7]" >"$DIR/gres.conf"
  echo "CgroupAutomount=no" >"$DIR/cgroup.conf"
}

# cred_expire: a requeued job waits that many seconds, 120 by default. The partition `urgent` takes nodes from
# `spare`, whose jobs have a minute's notice and are requeued.
write_configuration() {
  cat >"$DIR/slurm.conf" <<CONF
ClusterName=dyt
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$munge_socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.%n.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdLogFile=$DIR/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
GresTypes=gpu
NodeName=dytnode[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$((PORT + 1))-$((PORT + 2))] CPUs=8 Sockets=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=8000 Gres=gpu:h100:8 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=5 PreemptMode=OFF
PartitionName=spare Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
CONF
}

stop() {
  SLURM_CONF=$DIR/slurm.conf scancel --user root 2>/dev/null || true
  local file
  for file in "$DIR"/slurmd.*.pid "$DIR/slurmctld.pid" "$DIR/munged.pid"; do
    [ ! -f "$file" ] || kill "$(<"$file")" 2>/dev/null || true
  done
  # In place: a container's /etc/hosts is a mount, which cannot be replaced.
  grep -v "$MARK" /etc/hosts >"$DIR/hosts" && cat "$DIR/hosts" >/etc/hosts
}

"$action"
