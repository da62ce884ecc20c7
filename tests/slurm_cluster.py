"""A real SLURM on this machine: a controller and two nodes, each a "virtual machine" of namespaces.

Every host has its own network, mounts, host name and processes; a bridge joins them, and no link leads out of it. The
files are this machine's, as on a cluster with a shared file system. Needs root, slurm-wlm, munge and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "nsenter", "unshare")
NET = "10.91.0"
ADDRESSES = {"ctl": f"{NET}.1", "n1": f"{NET}.11", "n2": f"{NET}.12"}
NODES = ("n1", "n2")
CPUS = 4

CONF = """\
ClusterName=tests
SlurmctldHost=ctl({address})
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={lab}/munge.sock,cred_expire=5
StateSaveLocation={lab}/state
SlurmdSpoolDir={lab}/spool.%n
SlurmctldPidFile={lab}/slurmctld.pid
SlurmdPidFile={lab}/slurmd.%n.pid
SlurmctldLogFile={lab}/slurmctld.log
SlurmdLogFile={lab}/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=50000,sched_interval=2,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=5
KillWait=15
MessageTimeout=5
TCPTimeout=2
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
{nodes}
PartitionName=train Nodes=n1,n2 Default=YES State=UP PriorityTier=10 PreemptMode=REQUEUE
PartitionName=urgent Nodes=n1,n2 State=UP PriorityTier=100 PreemptMode=OFF
"""

INIT = """\
mount --make-rprivate / && hostname {host} && mount --bind {lab}/hosts /etc/hosts && mount -t tmpfs tmpfs /dev/shm
export SLURM_CONF={lab}/slurm.conf
{command} &
while :; do wait -n || sleep 0.1; done
"""


class Cluster:
    """The hosts by name, and what happens to them."""

    def __init__(self, lab: Path) -> None:
        self.lab = lab
        self._spaces = f"mssm{os.getpid()}"
        self._hosts: dict[str, subprocess.Popen[bytes]] = {}

    def up(self) -> None:
        (self.lab / "munge.key").write_bytes(secrets.token_bytes(128))
        (self.lab / "munge.key").chmod(0o600)
        hosts = [f"{address} {name}" for name, address in ADDRESSES.items()]
        (self.lab / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]), encoding="utf-8")
        nodes = [f"NodeName={node} NodeAddr={ADDRESSES[node]} CPUs={CPUS} CoresPerSocket={CPUS} RealMemory=4000"
                 for node in NODES]  # fmt: skip
        conf = CONF.format(lab=self.lab, address=ADDRESSES["ctl"], nodes="\n".join(nodes))
        (self.lab / "slurm.conf").write_text(conf, encoding="utf-8")
        for host in ADDRESSES:
            self._network(host)
        munge = (f"--socket={self.lab}/munge.sock --key-file={self.lab}/munge.key --pid-file={self.lab}/munge.pid "
                 f"--log-file={self.lab}/munge.log --seed-file={self.lab}/munge.seed")  # fmt: skip
        self._boot("ctl", f"munged --force {munge} && exec slurmctld -D")
        for node in NODES:
            self.start(node)
        self.wait_until(lambda: all(self.idle(node) for node in NODES), lambda: self.run("ctl", "sinfo", check=False))

    def down(self) -> None:
        for host in [*self._hosts]:
            self.kill(host)
        for host in ADDRESSES:
            _ip("netns", "del", self._space(host), check=False)

    def run(self, host: str, *command: str, check: bool = True) -> str:
        """What a command on a host prints."""
        entered = ("nsenter", "--target", str(self._init(host)), "--net", "--mount", "--uts", "--ipc", "--pid")
        done = subprocess.run(
            [*entered, "--", "env", f"SLURM_CONF={self.lab}/slurm.conf", *command],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command} on {host}: {done.stdout}{done.stderr}"
        return done.stdout

    def idle(self, node: str) -> bool:
        return self.run("ctl", "sinfo", "-h", "-p", "train", "-n", node, "-o", "%T", check=False).strip() == "idle"

    def start(self, node: str) -> None:
        self._boot(node, f"mkdir -p {self.lab}/spool.{node} && exec slurmd -D -N {node}")

    def kill(self, host: str) -> None:
        """As if its power failed."""
        process = self._hosts.pop(host)
        process.kill()  # its child is the first process of the host, and ends with it: --kill-child
        process.wait()

    def cut(self, node: str) -> None:
        """Takes the cable out; everything on the node lives on."""
        _ip("-n", self._space("ctl"), "link", "set", f"v{node}", "down")

    def job(self, job_id: str) -> dict[str, str]:
        text = self.run("ctl", "scontrol", "show", "job", "-o", job_id)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def processes(self, node: str) -> list[psutil.Process]:
        """Everything that lives on a node but its first process."""
        return psutil.Process(self._init(node)).children(recursive=True)

    @staticmethod
    def wait_until(condition: Callable[[], bool], explain: Callable[[], str] = str, within_s: float = 400) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, f"the moment never came: {explain()}"
            time.sleep(0.2)

    def _space(self, host: str) -> str:
        return f"{self._spaces}-{host}"

    def _network(self, host: str) -> None:
        space, address = self._space(host), f"{ADDRESSES[host]}/24"
        _ip("netns", "add", space)
        _ip("-n", space, "link", "set", "lo", "up")
        if host == "ctl":
            _ip("-n", space, "link", "add", "br0", "type", "bridge", "forward_delay", "0")
            _ip("-n", space, "addr", "add", address, "dev", "br0")
            _ip("-n", space, "link", "set", "br0", "up")
            return
        middle = self._space("ctl")
        _ip("link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", f"v{host}", "netns", middle)
        _ip("-n", middle, "link", "set", f"v{host}", "master", "br0", "up")
        _ip("-n", space, "addr", "add", address, "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")

    def _boot(self, host: str, command: str) -> None:
        script = INIT.format(host=host, lab=self.lab, command=command)
        spaces = ("--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
        with (self.lab / f"{host}.out").open("ab") as out:
            self._hosts[host] = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self._space(host)}", "unshare", *spaces, "--", "bash", "-c", script],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        self.wait_until(lambda: bool(psutil.Process(self._hosts[host].pid).children()), within_s=10)

    def _init(self, host: str) -> int:
        return psutil.Process(self._hosts[host].pid).children()[0].pid


def _ip(*command: str, check: bool = True) -> None:
    subprocess.run(["ip", *command], check=check, capture_output=True)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster that is up; skips where there can be none."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs a SLURM to start: {', '.join(missing)} not installed (slurm-wlm, munge, iproute2)")
    if os.geteuid() != 0:
        pytest.skip("needs root, for the namespaces of the virtual nodes")
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as lab:  # short: it holds a socket
        (Path(lab) / "state").mkdir()
        Path(lab).chmod(0o755)
        virtual = Cluster(Path(lab))
        with contextlib.ExitStack() as stack:
            stack.callback(virtual.down)
            try:
                virtual.up()
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
            yield virtual
