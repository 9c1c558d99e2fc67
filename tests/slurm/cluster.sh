#!/usr/bin/env bash
# A Slurm of two pretended machines on this one, for tests:  sudo tests/slurm/cluster.sh install|start|stop [folder]
# Needs Debian or Ubuntu and root, but no systemd. `install` fetches the packages slurm-wlm and munge; `start` prints
# the folder's slurm.conf, whose name belongs into the environment variable SLURM_CONF.
set -euo pipefail
folder=${2:-/tmp/vireo-slurm}
hosts="127.0.0.1 vireo1 vireo2 # of tests/slurm/cluster.sh"

install() {
    if command -v slurmctld slurmd munged > /dev/null; then return; fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends slurm-wlm munge
}

munge_running() { munge -n 2>/dev/null | unmunge >/dev/null 2>&1; }

start_munge() {
    if munge_running; then return; fi
    mkdir -p /run/munge /var/log/munge /var/lib/munge /etc/munge
    [ -s /etc/munge/munge.key ] || head -c 1024 /dev/urandom > /etc/munge/munge.key
    chown -R munge: /run/munge /var/log/munge /var/lib/munge /etc/munge
    chmod 400 /etc/munge/munge.key
    chmod 755 /run/munge
    setpriv --reuid=munge --regid=munge --clear-groups munged
    echo munge > "$folder/started-munge"
}

# cred_expire: a requeued job is held for so long, 120 s by default.
configure() {
    cat > "$folder/slurm.conf" <<CONF
ClusterName=vireo
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
KillWait=5
SchedulerParameters=sched_interval=2,bf_interval=2
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
SlurmdParameters=config_overrides
NodeName=vireo1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=16821 CPUs=4 RealMemory=8000
NodeName=vireo2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=16822 CPUs=4 RealMemory=8000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=vireo1,vireo2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=vireo1,vireo2 MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF
}

start() {
    mkdir -p "$folder/state" "$folder/spool-vireo1" "$folder/spool-vireo2"
    start_munge
    configure
    export SLURM_CONF=$folder/slurm.conf
    grep -q "$hosts" /etc/hosts || echo "$hosts" >> /etc/hosts
    slurmctld
    slurmd -N vireo1
    slurmd -N vireo2
    for _ in $(seq 60); do
        if [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null)" = 2 ]; then
            echo "$SLURM_CONF"
            return
        fi
        sleep 0.5
    done
    echo "the nodes did not become idle within 30 s: $(sinfo 2>&1)" >&2
    return 1
}

stop() {
    export SLURM_CONF=$folder/slurm.conf
    # Steps that cannot report their end would try for minutes.
    timeout 5 scancel --user="$(id -un)" || true
    for _ in $(seq 20); do
        if [ -z "$(timeout 5 squeue --noheader 2>/dev/null)" ]; then break; fi
        sleep 0.5
    done
    # Not with sed -i, since a container's /etc/hosts cannot be replaced.
    others=$(grep -v "$hosts" /etc/hosts || true) && echo "$others" > /etc/hosts
    for name in slurmd-vireo1 slurmd-vireo2 slurmctld; do
        if [ -s "$folder/$name.pid" ]; then kill "$(cat "$folder/$name.pid")" 2>/dev/null || true; fi
    done
    if [ -f "$folder/started-munge" ]; then
        kill "$(cat /run/munge/munged.pid)" 2>/dev/null || true
        rm "$folder/started-munge"
    fi
}

case "${1:-}" in
    install | start | stop) "$1" ;;
    *) sed -n 2,4p "$0" && exit 2 ;;
esac
