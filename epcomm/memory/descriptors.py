"""File descriptors from every rank of a host to every other, over Unix sockets; knows nothing of CUDA.

One datagram carries one descriptor, so there are no connections, no half messages and no threads. A rank sends without
blocking and receives in between: whatever the number of ranks, and in whatever order they arrive, nobody waits for a
full queue while others wait for it. The sockets have abstract names, which vanish with the process.
"""

from __future__ import annotations

import array
import errno
import os
import secrets
import select
import socket
import time
from collections.abc import Mapping

from epcomm.bootstrap import Communicator
from epcomm.errors import BootstrapError, PeerTimeout

__all__ = ["Mailbox", "exchange_descriptors"]

Address = tuple[bytes, bytes]  # name of a socket, and its secret

_TOKEN_BYTES = 16
_RANK_BYTES = 4
_RETRY_S = 0.001  # how long to wait for the receivers of full queues
_OPERATION = "exchange of device memory"
_DO = (
    "see whether those ranks are alive, and in one network namespace (one container) with this one; "
    "raise EPCOMM_TIMEOUT_S if they are only slow"
)


class Mailbox:
    """The socket at which one rank receives descriptors.

    Attributes:
        address: what the peers need to know, picklable: the socket's name, and a secret that their messages repeat,
            because any process of the host can write to the name.
    """

    def __init__(self) -> None:
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        name = b"\0epcomm-" + secrets.token_hex(16).encode()
        self.address: Address = (name, self._token)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.setblocking(False)
            self._socket.bind(name)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Take the name away, and close what lies in the queue."""
        self._socket.close()

    def exchange(self, fd: int, rank: int, peers: Mapping[int, Address], timeout_s: float) -> dict[int, int]:
        """Send `fd` to all `peers`; the descriptors that they sent, by rank. The caller closes them.

        Every peer makes the same call. Blocks the host, `timeout_s` at most.

        Args:
            fd: an open descriptor; it stays open.
            rank: this rank.
            peers: rank and `address` of every other rank.
            timeout_s: seconds.

        Raises:
            PeerTimeout: some ranks did not send, or did not receive, in time; names them.
            BootstrapError: a rank's socket does not exist.
        """
        start = time.monotonic()
        received: dict[int, int] = {}
        # Each rank starts with the one after it, so that not all write to the same queue.
        unsent = sorted(peers, key=lambda peer: (peer <= rank, peer))
        try:
            while True:
                unsent = [peer for peer in unsent if not self._send(fd, rank, peer, peers[peer])]
                self._receive(received, peers)
                if not unsent and len(received) == len(peers):
                    return received
                elapsed = time.monotonic() - start
                if elapsed >= timeout_s:
                    raise _late(rank, unsent, set(peers) - set(received), elapsed)
                wait_s = min(_RETRY_S if unsent else timeout_s - elapsed, timeout_s - elapsed)
                select.select([self._socket], [], [], wait_s)
        except BaseException:
            for descriptor in received.values():
                os.close(descriptor)
            raise

    def _send(self, fd: int, rank: int, peer: int, address: Address) -> bool:
        """Put `fd` into the queue of `peer`; False if it is full."""
        name, token = address
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
        try:
            self._socket.sendmsg([token + rank.to_bytes(_RANK_BYTES, "little")], [rights], 0, name)
        except OSError as error:
            # ETOOMANYREFS: more descriptors under way than this user may have open.
            if error.errno in (errno.EAGAIN, errno.ENOBUFS, errno.ETOOMANYREFS):
                return False
            raise BootstrapError(
                _OPERATION,
                got=f"{error.strerror} when rank {rank} wrote to the socket of rank {peer}",
                wanted="all ranks of a node in one network namespace, and none that has given up",
                do="start the ranks of a host in one container; look for an earlier error of that rank",
            ) from error
        return True

    def _receive(self, received: dict[int, int], peers: Mapping[int, Address]) -> None:
        """Take everything out of the queue; what no peer sent is closed."""
        while len(received) < len(peers):
            try:
                message, ancillary, _, _ = self._socket.recvmsg(64, socket.CMSG_SPACE(4 * 8), socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            descriptors = array.array("i")
            for level, kind, payload in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
            token, source = message[:_TOKEN_BYTES], int.from_bytes(message[_TOKEN_BYTES:], "little")
            known = secrets.compare_digest(token, self._token) and source in peers and source not in received
            if known and len(descriptors) == 1:
                received[source] = descriptors[0]
            else:
                for descriptor in descriptors:
                    os.close(descriptor)


def exchange_descriptors(comm: Communicator, fd: int, timeout_s: float) -> dict[int, int]:
    """Send `fd` to every other rank; their descriptors, by rank. Collective; blocks the host.

    The ranks are processes of one host, or threads (which get descriptors of their own, too). The caller closes what
    it gets. Descriptors that never arrive are `PeerTimeout`; as a rank may fail alone, the caller lets the ranks agree
    afterwards.

    Args:
        comm: the ranks.
        fd: an open descriptor; it stays open.
        timeout_s: seconds to wait for the peers once all of them have called.

    Raises:
        PeerTimeout, BootstrapError: as `Mailbox.exchange`.
    """
    mailbox: Mailbox | None = None
    failure: OSError | None = None
    try:
        mailbox = Mailbox()
    except OSError as error:  # the peers must hear of it, or they would wait
        failure = error
    try:
        addresses = dict(enumerate(comm.allgather(None if mailbox is None else mailbox.address)))
        without = [peer for peer, address in addresses.items() if address is None]
        if without or mailbox is None:
            raise BootstrapError(
                _OPERATION,
                got=f"no Unix socket on ranks {without}" + (f" ({failure})" if failure else ""),
                wanted="one abstract Unix socket a rank",
                do="raise the limit of open files there (ulimit -n)",
            ) from failure
        del addresses[comm.rank]
        return mailbox.exchange(fd, comm.rank, addresses, timeout_s)
    finally:
        if mailbox is not None:
            mailbox.close()


def _late(rank: int, unsent: list[int], missing: set[int], elapsed_s: float) -> PeerTimeout:
    return PeerTimeout(
        _OPERATION,
        phase="file descriptors",
        waiting_rank=rank,
        awaited_ranks=sorted(missing | set(unsent)),
        elapsed_s=elapsed_s,
        do=_DO,
    )
