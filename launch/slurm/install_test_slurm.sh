#!/usr/bin/env bash
# A real Slurm of one node on this machine, for trying train.sbatch and for the tests. Never for work: everything
# runs as root and nothing limits what a job may use. Needs root and Debian or Ubuntu.
#
#   sudo bash launch/slurm/install_test_slurm.sh [DIR]          installs what is missing, starts it, waits for it
#   sudo bash launch/slurm/install_test_slurm.sh --stop [DIR]   stops its daemons and cancels its jobs
#
# DIR (default /tmp/iv3-slurm) holds its configuration, key, logs and state. Slurm's commands find it through
# SLURM_CONF=DIR/slurm.conf; a Slurm that is already here is left alone.

set -euo pipefail

action=start
[ "${1:-}" != --stop ] || { action=stop; shift; }
dir=${1:-/tmp/iv3-slurm}

say() { echo "[slurm] $*"; }
die() { echo "[slurm] error: $*" >&2; exit 1; }
is_alive() { [ -s "$dir/$1.pid" ] && kill -0 "$(cat "$dir/$1.pid")" 2>/dev/null; }

# stop NAME SIGNAL: ends one of our daemons by its pid file.
stop() {
  is_alive "$1" || return 0
  local pid
  pid=$(cat "$dir/$1.pid")
  kill "-$2" "$pid"
  for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
  rm -f "$dir/$1.pid"
}

[ "$(id -u)" -eq 0 ] || die "Slurm's daemons start jobs as other users, so they need root"

if [ "$action" = stop ]; then
  [ -f "$dir/slurm.conf" ] || die "$dir holds no Slurm of this script"
  export SLURM_CONF=$dir/slurm.conf
  if is_alive slurmctld; then
    scancel --state=PENDING --user=root || true
    scancel --signal=KILL --full --user=root || true
    sleep 1
  fi
  stop slurmctld TERM
  stop slurmd TERM
  stop munged TERM
  say "stopped"
  exit 0
fi

if ! command -v slurmctld >/dev/null || ! command -v slurmd >/dev/null || ! command -v munged >/dev/null; then
  command -v apt-get >/dev/null || die "install slurmctld, slurmd and munge; there is no apt-get to do it with"
  say "installing slurm-wlm and munge"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
fi

is_alive slurmctld && is_alive slurmd && { say "already running; export SLURM_CONF=$dir/slurm.conf"; exit 0; }

mkdir -p "$dir/munge" "$dir/state" "$dir/spool"
chmod 755 "$dir"
[ -s "$dir/munge/key" ] || head -c 128 /dev/urandom >"$dir/munge/key"
chmod 700 "$dir/munge"
chmod 600 "$dir/munge/key"

# A port that nobody listens to, from the one given upwards.
free_port() {
  local port=$1
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
  echo "$port"
}

host=$(hostname -s)
# Twice the processors that are here: jobs of the tests wait more than they compute.
cat >"$dir/slurm.conf" <<CONF
ClusterName=iv3test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port 36817)
SlurmdPort=$(free_port 37817)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for as long as a credential lives; by default two minutes.
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
KillWait=30
NodeName=localhost NodeHostname=$host NodeAddr=127.0.0.1 CPUs=$(($(nproc) * 2)) State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$dir/slurm.conf

if ! is_alive munged; then
  rm -f "$dir"/munge.socket*
  # As root and in a folder of the user's choice, which munged says is unusual.
  munged --force --key-file="$dir/munge/key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" 2>"$dir/munge/start.log" ||
    die "munged did not start: $(tail -n 1 "$dir/munge/start.log")"
fi
is_alive slurmctld || slurmctld
is_alive slurmd || slurmd -N localhost

for _ in $(seq 150); do
  if [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ]; then
    say "running: one node, $(($(nproc) * 2)) processors; export SLURM_CONF=$dir/slurm.conf"
    exit 0
  fi
  sleep 0.2
done
die "the node is not idle after 30 s: $(sinfo 2>&1 | tail -n 1); logs are in $dir"
