"""The job's store: where its ranks meet, and where each tells the others how it is (`megassm.parallel.watchdog`).

torch's TCPStore knows no passwords: whoever reaches its port may list, read and write it. So where it is ours to start
(torchrun starts its own) it listens at the address that the ranks are told, and at no other; and what this package
keeps in it lies under a random prefix, signed with a secret that the ranks give each other over their process group.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import ipaddress
import os
import socket
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from megassm.errors import UserError

DIGEST_CHARS = 2 * hashlib.sha256().digest_size


class SignedStore:
    """Texts by key, signed with the job's secret; entries without a valid signature are ignored."""

    def __init__(self, store: Store, secret: bytes) -> None:
        self._secret = secret
        self._store = PrefixStore(f"megassm/{self._mac('prefix')[:32]}", store)

    def set(self, key: str, text: str) -> None:
        self._store.set(key, self._mac(f"{key}\0{text}") + text)

    def get(self, key: str) -> str | None:
        """The text; None unless a rank of the job has put one there."""
        if not self._store.check([key]):
            return None
        found = self._store.get(key).decode(errors="replace")
        text = found[DIGEST_CHARS:]
        return (
            text if hmac.compare_digest(found[:DIGEST_CHARS].encode(), self._mac(f"{key}\0{text}").encode()) else None
        )

    def _mac(self, text: str) -> str:
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()


def launcher_holds_store() -> bool:
    """Whether torchrun's agent holds the store, not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def meet(rank: int, size: int, one_machine: bool, timeout: timedelta) -> Store | None:
    """The store at MASTER_ADDR and MASTER_PORT, which rank 0 starts; None where the launcher holds one.

    Raises:
        UserError: the address is not valid, or the port is taken.
    """
    if launcher_holds_store():
        return None
    host, port = os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT", "")
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"environment: MASTER_PORT = {port!r}: must be a port, 1 to 65535")
    listener = _listener(host, int(port), one_machine) if rank == 0 else None
    try:
        if listener is None:
            return TCPStore(host, int(port), size, rank == 0, timeout, multi_tenant=True)
        return TCPStore(host, int(port), size, True, timeout, master_listen_fd=listener)
    except RuntimeError as error:
        raise _not_met(rank, host, int(port), error) from None


def _not_met(rank: int, host: str, port: int, error: RuntimeError) -> UserError:
    """Why the ranks did not meet, in a line; torch's own text is a page."""
    why = str(error).strip().partition("\n")[0][:200]
    if rank == 0 and "EADDRINUSE" in str(error):
        return _port_taken(host, port, os.strerror(errno.EADDRINUSE))
    return UserError(
        f"environment: MASTER_ADDR = {host!r}, MASTER_PORT = {port}: rank {rank} does not meet the others there "
        f"({why}). Every rank must be started with the same two, those of rank 0's machine, and reach it"
    )


def _port_taken(host: str, port: int, why: str) -> UserError:
    return UserError(
        f"environment: MASTER_PORT = {port}: cannot be listened at on {host} ({why}); another job may "
        "use it: give this one another (deepspeed --master_port, torchrun --master-port)"
    )


def _listener(host: str, port: int, one_machine: bool) -> int | None:
    """A socket bound to `host` alone. None where it must be to all addresses: the other machines know this one's name
    by another address than it does itself, or it is translated on the way."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"environment: MASTER_ADDR = {host!r}: {error.strerror}; give rank 0's host") from None
    if not one_machine and ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        return None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            return None
        raise _port_taken(host, port, error.strerror or "") from None
    return listener.detach()
