"""virtiofsd: the separate, confined process that serves a sandbox's share to the guest as virtio-fs.

It speaks vhost-user with the hypervisor over a socket that exists under a name for an instant only. There are two
programs of this name with options of their own: the one in C that distributions had until 2023, and the present one
in Rust (https://gitlab.com/virtio-fs/virtiofsd).
"""

from __future__ import annotations

import os

from kata import children, confinement, sysio
from kata.errors import HostError, HypervisorError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.errors import KataError
    from kata.journal import Entry, Journal

RUST_PROGRAMS = (
    "/usr/libexec/virtiofsd",
    "/usr/lib/virtiofsd",
    "/usr/bin/virtiofsd",
    "/usr/local/bin/virtiofsd",
)
"""Where distributions put it."""
C_PROGRAM = "/usr/lib/qemu/virtiofsd"
SOCKET_NAME = "share.sock"
CAPABILITIES = (
    *(sysio.CAP_CHOWN, sysio.CAP_DAC_OVERRIDE, sysio.CAP_FOWNER, sysio.CAP_FSETID, sysio.CAP_SETUID),
    *(sysio.CAP_SETGID, sysio.CAP_MKNOD, sysio.CAP_SETFCAP),
    *(sysio.CAP_SETPCAP, sysio.CAP_SYS_ADMIN, sysio.CAP_SYS_RESOURCE),
)
"""What both start with. Those of the last line are for confining itself, and for many open files: it drops them."""
LEAVES_S = 1.0
"""How long it may take to end by itself."""


def find(configured: str = "") -> str | None:
    """Path of a virtiofsd: the configured one, otherwise the first that this host has; None where there is none.

    Raises:
        HostError: The configured one is not there.
    """
    if configured:
        if not os.access(configured, os.X_OK):
            raise HostError(
                f"virtiofsd is not at {configured}", "apt-get install virtiofsd, or correct the path"
            )
        return configured
    return next((path for path in (*RUST_PROGRAMS, C_PROGRAM) if os.access(path, os.X_OK)), None)


def command(program: str, directory: str, fd: int, cache: str = "auto") -> list[str]:
    """Argument vector of virtiofsd.

    Sub-mounts are announced, so that files of several host file systems keep distinct identities in the guest;
    extended attributes are needed for file capabilities, which packages of distributions have.

    Args:
        program: Its path; tells the kind.
        directory: What it serves.
        fd: Listening socket.
        cache: What the guest may keep: ``auto``, ``always`` or ``never``.
    """
    if program == C_PROGRAM:
        cache = "none" if cache == "never" else cache
        options = (
            f"source={directory},cache={cache},sandbox=namespace,announce_submounts,xattr,log_level=warn"
        )
        return [program, "-f", f"--fd={fd}", "-o", options]
    return [
        program,
        *(f"--fd={fd}", f"--shared-dir={directory}", f"--cache={cache}", "--sandbox=namespace"),
        *("--announce-submounts", "--xattr", "--log-level=warn"),
        # By a handle any file of the same file system could be opened.
        *("--inode-file-handles=never", "--modcaps=-dac_read_search"),
    ]


class FileServer:
    """The virtiofsd of one machine.

    Its socket listens from the beginning, so the hypervisor can be started first: what it asks waits.

    Args:
        program: Path of virtiofsd.
        directory: What it shall serve.
        run_dir: The sandbox's directory.
        journal: Its journal.
        cache: What the guest may cache; see `command`.
    """

    def __init__(
        self, program: str, directory: str, run_dir: str, journal: Journal, cache: str = "auto"
    ) -> None:
        import _socket

        self.program = program
        self.cache = cache
        self._directory = directory
        self._journal = journal
        self.child = children.SupervisedChild(f"the file server of the share ({program})")
        self.path = os.path.join(run_dir, SOCKET_NAME)
        """Of the socket, until a hypervisor is connected to it."""
        self._entry: Entry | None = journal.begin("socket", path=self.path)
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC, 0)
        try:
            with sysio.SocketName(self.path) as name:
                listener.bind(name)
                listener.listen(1)
        except OSError as error:
            listener.close()
            self.hide()
            raise HypervisorError(f"cannot make the socket of the file server: {error.strerror}") from error
        self._listener = sysio.Fd(listener.detach())
        self._peer: sysio.Fd | None = None  # the hypervisor's end of the connection, where we have made it

    def connect(self) -> sysio.Fd:
        """A hypervisor's end of the connection, for one that is given it; the socket can be reached no more then.

        Raises:
            HypervisorError: It cannot be connected.
        """
        import _socket

        client = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC, 0)
        try:
            with sysio.SocketName(self.path) as name:
                client.connect(name)
        except OSError as error:
            client.close()
            raise HypervisorError(f"cannot connect to the file server: {error.strerror}") from error
        finally:
            self.hide()
        self._peer = sysio.Fd(os.dup(client.fileno()))
        return sysio.Fd(client.detach())

    def move(self, directory: str, user: int) -> None:
        """Give the socket to the user of a hypervisor that goes by its name.

        Args:
            directory: Of that hypervisor alone.
            user: Its user id; 0 for root.

        Raises:
            HypervisorError: It cannot be moved there.
        """
        path = os.path.join(directory, SOCKET_NAME)
        former, self._entry = self._entry, self._journal.begin("socket", path=path)
        try:
            os.rename(self.path, path)
            if user:
                os.chown(path, user, user)
        except OSError as error:
            raise HypervisorError(f"cannot move the socket of the file server: {error.strerror}") from error
        finally:
            if former is not None:
                self._journal.mark_gone(former)
        self.path = path

    def hide(self) -> None:
        """Take the socket's name away: a hypervisor that goes by it is connected. Idempotent."""
        if self._entry is not None:
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                pass
            self._journal.mark_gone(self._entry)
            self._entry = None

    def start(self) -> None:
        """Start it. Main thread.

        Raises:
            HypervisorError: It cannot be executed.
        """
        try:
            self.child.start(
                command(self.program, self._directory, self._listener.raw, self.cache),
                self._journal,
                "virtiofsd",
                pass_fds=[self._listener.raw],
                capabilities=CAPABILITIES,
                namespaces=sysio.CLONE_NEWPID
                | sysio.CLONE_NEWIPC
                | sysio.CLONE_NEWUTS
                | sysio.CLONE_NEWCGROUP,
                confinement=confinement.helper(),
            )
        except OSError as error:
            raise HypervisorError(f"cannot start the file server: {error.strerror}") from error
        finally:
            self.close_socket()

    def close_socket(self) -> None:
        """Close our end of what it listens on."""
        self._listener.close()

    def hang_up(self) -> None:
        """Have it end beside its hypervisor, which is about to end, and not after it. Idempotent."""
        if self._peer is not None:
            import _socket

            peer, self._peer = _socket.socket(fileno=self._peer.detach()), None
            try:
                peer.shutdown(_socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended
            finally:
                peer.close()

    def failure(self) -> KataError | None:
        """Why it is no longer there, or None while it is."""
        sentence = self.child.failure()
        if not sentence:
            return None
        return HypervisorError(
            sentence,
            "Without it no file of the host can be reached. KATA_SHARED_FS=virtio-9p does without this program.",
        )

    def stop(self) -> None:
        """End it, after the hypervisor. Idempotent; blocks for milliseconds.

        It consists of two processes. Both go by themselves when the hypervisor's end of the connection is closed,
        and then the outer one reaps the inner one, which nobody may do when it is killed.
        """
        self.hide()
        self.hang_up()
        self.close_socket()
        self.child.stop(LEAVES_S, LEAVES_S)
