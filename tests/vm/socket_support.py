"""Unix sockets of the host for tests of volumes: a service that listens on one, and a client for a container."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import threading
from pathlib import Path
from types import TracebackType

CLIENT = """\
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
int main(int argc, char **argv) {
    static char room[65536];
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    ssize_t got, at, sent;
    strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
    if (connect(fd, (struct sockaddr *)&address, sizeof address)) {
        puts(strerror(errno));
        return 1;
    }
    while ((got = read(0, room, sizeof room)) > 0)
        for (at = 0; at < got; at += sent)
            if ((sent = send(fd, room + at, got - at, MSG_NOSIGNAL)) < 0) {
                puts(strerror(errno));
                return 2;
            }
    shutdown(fd, SHUT_WR);
    while ((got = read(fd, room, sizeof room)) > 0)
        write(1, room, got);
    return got ? 3 : 0;
}
"""
"""Sends its standard input to the socket that its argument names, ends that direction, and prints what comes back."""


def client(directory: Path) -> Path:
    """The client as a program for any root file system, in a directory of its own below this one."""
    path = directory / "client/unix-client"
    path.parent.mkdir(exist_ok=True)
    command = ["gcc", "-static", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=CLIENT, text=True, check=True)
    return path


class Service:
    """Listens on a path, as a context: it says the sum of a question once it has seen the question's end.

    Args:
        path: Where; what is there is replaced.
        mode: Of the socket's file.
    """

    def __init__(self, path: Path, mode: int = 0o666) -> None:
        self.path = path
        self.mode = mode
        self._listener = socket.socket(socket.AF_UNIX)
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Service:
        self.path.unlink(missing_ok=True)
        self._listener.bind(str(self.path))
        os.chmod(self.path, self.mode)
        self._listener.listen(128)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                question = bytearray()
                try:
                    while piece := connection.recv(1 << 16):
                        question += piece
                    connection.sendall(answer(bytes(question)))
                except OSError:
                    pass  # the client has gone


def answer(question: bytes) -> bytes:
    """What a `Service` says."""
    return hashlib.sha256(question).hexdigest().encode() + b"\n"
