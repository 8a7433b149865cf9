"""`kata build`: buildah, or podman, builds an image whose RUN commands each are in a machine.

There is no builder of our own: Dockerfiles, their cache and base images are the builder's. It is told to execute
commands by `kata-runtime`, and what it has made is read as `kata load` reads it. Its storage is a directory of ours
(`_directory`), in which one build is at work at a time. So what a build has left that was ended can be removed, by
itself or by the next one, without looking at what else the user builds.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress

from kata import launcher, mount_table, paths, sysio
from kata.cli import manage, records
from kata.cli.args import Command, Option
from kata.errors import HostError, KataError, UnsupportedError, UsageError
from kata.images import reference as references

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kata.cli.args import Arguments
    from kata.images.store import Image

_BUILDERS = ("buildah", "podman")
_RUNTIME = "kata-runtime"
_END_S = 15.0
"""How long a builder may take to end when it is told to."""
_DETACH = 2
"""MNT_DETACH, umount(2)."""
_ENDING = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})
_STDIN = "-"
_LARGEST_FILE = 16 << 20
"""Bytes of a Dockerfile that is read from standard input."""
_MADE = "localhost/kata-build:made"
"""What the builder calls an image for which no name was asked."""

COMMANDS = {
    "build": Command(
        "build",
        "CONTEXT",
        "Builds an image from a Dockerfile with buildah or podman; each RUN is in a machine of its own.",
        [
            Option("-t --tag", "NAME[:TAG]", "the image's name", many=True),
            Option(
                "-f --file",
                "FILE",
                "the Dockerfile, '-' for standard input; CONTEXT/Containerfile or CONTEXT/Dockerfile if not given",
            ),
            Option("--build-arg", "KEY=VALUE", "a value for an ARG", many=True),
            Option("--label", "KEY=VALUE", "a label of the image", many=True),
            Option("--target", "STAGE", "stop after this stage"),
            Option("--network", "none", "RUN has no network"),
            Option("--no-cache", "", "execute each step again"),
            Option("--pull", "", "fetch base images again"),
            Option("--iidfile", "FILE", "write the image's id to a file"),
            Option("-q --quiet", "", "show nothing but the image's id"),
        ],
        least=1,
        most=1,
        notes="CONTEXT is a directory, a URL that the builder fetches, or '-' for none: then the Dockerfile is on\n"
        "standard input. buildah or podman has to be installed (apt-get install buildah), and root has to call it.\n"
        "FROM takes images of registries; they and the steps that are kept for the next build are in\n"
        "$KATA_STATE_DIR/build; 'kata prune build' removes them. One build runs at a time.",
    )
}


def _directory() -> str:
    return os.path.join(paths.state_dir(), paths.BUILD)


def builder() -> str:
    """The path of the builder.

    Raises:
        HostError: There is none.
    """
    for name in _BUILDERS:
        if found := shutil.which(name):
            return found
    raise HostError(
        "kata build needs buildah or podman, and neither is on the PATH",
        "apt-get install buildah; or build elsewhere, and kata load",
    )


_REMOVE = "remove what an earlier build has left"
_REMOVE_HINT = "kata prune build, with all steps that are kept"


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a builder and all that it has started: its process group."""
    try:
        if child.returncode is None:
            with sysio.Fd(os.pidfd_open(child.pid)) as ended, suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
                select.select([ended], [], [], _END_S)
    finally:  # also after a second Ctrl-C
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


class _Build:
    """The builder, at work in our storage.

    Args:
        program: Its path.
        directory: For this build alone; the caller removes it.
    """

    def __init__(self, program: str, directory: str) -> None:
        self.program = program
        self.is_podman = os.path.basename(program) == "podman"
        self.directory = directory
        self.containers = os.path.join(paths.run_dir(), "oci", paths.BUILD)
        self.runtime = os.path.join(directory, _RUNTIME)
        self._write_runtime()

    def _write_runtime(self) -> None:
        """A builder calls a runtime without most of the caller's environment."""
        import shlex

        # The one of this installation, whichever is on the PATH.
        package = os.path.dirname(launcher.command()[-1])
        program = [*launcher.command()[:-1], os.path.join(package, "oci_runtime", "__main__.py")]
        kept = {name: value for name, value in os.environ.items() if name.startswith("KATA_")}
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in kept.items())
        words = shlex.join([*program, "--root", self.containers])
        with open(self.runtime, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o700)
            file.write(f'#!/bin/sh\n{exports}exec {words} "$@"\n')

    def command(self, *words: str) -> list[str]:
        """The builder's argument vector for one of its commands."""
        run_root = os.path.join(paths.run_dir(), paths.BUILD)
        where = [f"--root={os.path.join(_directory(), 'storage')}", f"--runroot={run_root}"]
        if self.is_podman:
            where.append(f"--tmpdir={run_root}/libpod")
        return [self.program, *where, *words]

    def run(
        self, words: Sequence[str], what: str, *, quiet: bool = True, hint: str = "without -q it says more"
    ) -> None:
        """Run a command of the builder to its end; with Ctrl-C, to an early one.

        Args:
            words: Its argument vector.
            what: What it is to do, for errors: ``build the image``.
            quiet: Show nothing of what it says, but its last line if it fails.
            hint: What to do then, if it is quiet.

        Raises:
            HostError: It failed.
        """
        parent = os.getpid()
        output = subprocess.PIPE if quiet else None
        # In a group of its own: Ctrl-C is for this process, which then ends the builder.
        with subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if quiet else sys.stderr,
            stderr=output,
            process_group=0,
            preexec_fn=lambda: sysio.die_with_parent(parent),
        ) as child:
            try:
                said = child.communicate()[1] or b""
            except BaseException:
                _end(child)
                raise
        if child.returncode:
            lines = said.decode(errors="replace").strip().splitlines()
            reason = (
                f": {lines[-1].removeprefix('Error: ')}" if lines else f" (exit status {child.returncode})"
            )
            raise HostError(
                f"{os.path.basename(self.program)} could not {what}{reason}", hint if quiet else ""
            )

    def clear(self) -> None:
        """Remove what a build has left that was ended: containers of the runtime, and of the builder.

        Raises:
            HostError: Something cannot be removed.
        """
        try:
            for identity in os.listdir(self.containers):
                subprocess.run(
                    [self.runtime, "delete", "--force", identity],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    check=False,
                )
        except FileNotFoundError:
            pass
        if not os.path.isdir(os.path.join(_directory(), "storage")):
            return
        try:
            if not self.is_podman:
                self.run(self.command("rm", "--all"), _REMOVE, hint=_REMOVE_HINT)
            elif left := self._left():
                self.run(self.command("rm", "--force", *left), _REMOVE, hint=_REMOVE_HINT)
        finally:
            self._unmount()

    def _left(self) -> list[str]:
        """podman's containers; those of a build are another program's to it."""
        words = self.command("ps", "--all", "--external", "--quiet")
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()

    def _unmount(self) -> None:
        """Undo what the builder's storage mounts for as long as the host is up."""
        below = os.path.realpath(_directory()) + "/"
        for mount in reversed(mount_table.mounts()):
            if mount.target.startswith(below):
                sysio.umount2(mount.target, _DETACH)


def _arguments(arguments: Arguments, context: str, file: str | None, iid: str) -> list[str]:
    words = ["--isolation=oci", "--layers", f"--iidfile={iid}"]
    words += ["--tag", next(iter(arguments.many("tag")), _MADE)]
    if file is not None:
        words.append(f"--file={file}")
    for key in ("target", "network"):
        if (value := arguments.value(key)) is not None:
            words.append(f"--{key}={value}")
    for key in ("build_arg", "label"):
        words += [f"--{key.replace('_', '-')}={value}" for value in arguments.many(key)]
    if arguments.flag("no_cache"):
        words.append("--no-cache")
    if arguments.flag("pull"):
        words.append("--pull-always")
    if arguments.flag("quiet"):
        words.append("--quiet")
    return [*words, context]


def _build(arguments: Arguments) -> int:
    context = arguments.rest[0]
    names = [_name(text) for text in arguments.many("tag")]
    _check_context(context, arguments.value("file"))
    for key in ("build_arg", "label"):
        for text in arguments.many(key):
            if not text.partition("=")[0]:
                # The builders pass over it.
                raise UsageError(f"--{key.replace('_', '-')} {text!r} has no name", "KEY=VALUE")
    if arguments.value("network") not in (None, "none"):
        raise UsageError(
            f"--network {arguments.value('network')!r} is not offered for RUN: a machine has a network of its own",
            "none, or leave it out",
        )
    if sysio.in_user_namespace():
        raise UnsupportedError(
            "kata build needs root: an ordinary user's builder has a user namespace of its own",
            "sudo kata build, or podman build and kata load",
        )
    program = builder()
    from kata.cli.run import undo_when_told_to_end

    undo_when_told_to_end()
    id_file = None
    if (path := arguments.value("iidfile")) is not None:
        from kata.cli.run_options import IdFile

        id_file = IdFile(path, "--iidfile", replaces=True)
    try:
        image = _built(program, arguments, context)
        manage.give_names(image, names)
        if id_file is not None:
            id_file.write(image.id)
    except BaseException:
        if id_file is not None:
            id_file.discard()
        raise
    print(image.id)
    return 0


def _check_context(context: str, file: str | None) -> None:
    if _STDIN in (context, file) and os.isatty(0):
        raise UsageError("the Dockerfile cannot be typed at a terminal", "kata build -f - . < FILE")
    if context == _STDIN:
        if file is not None:
            raise UsageError(
                "without a context there is no file but the Dockerfile, which is standard input",
                "leave out -f",
            )
    elif "://" not in context and not os.path.isdir(context):
        raise UsageError(f"the context {context!r} is no directory", "kata build -t NAME .")


def _built(program: str, arguments: Arguments, context: str) -> Image:
    """Build an image, and read it into the store."""
    directory = os.path.join(_directory(), "work")
    # One build at a time.
    with records.DirectoryLock(_directory(), mode=0o700), _made_anew(directory):
        build = _Build(program, directory)
        build.clear()
        file = arguments.value("file")
        if context == _STDIN:
            context = os.path.join(directory, "context")
            os.mkdir(context)
            file = _STDIN
        if file == _STDIN:
            file = os.path.join(directory, "Dockerfile")
            _keep_stdin(file)
        iid = os.path.join(directory, "iid")
        archive = os.path.join(directory, "image.tar")
        try:
            words = _arguments(arguments, context, file, iid)
            build.run(_command(build, words), "build the image", quiet=arguments.flag("quiet"))
            with open(iid, encoding="ascii") as told:
                identity = told.read().strip().removeprefix("sha256:")
            if build.is_podman:
                save = ["save", "--format=docker-archive", f"--output={archive}", identity]
            else:
                save = ["push", identity, f"docker-archive:{archive}"]
            build.run(
                build.command(*save), "hand over the image", hint="df -h $KATA_STATE_DIR: is there space?"
            )
        finally:
            _clear_quietly(build)
        [image] = manage.load_file(archive, quiet=True)
        return image


def remove_kept() -> int:
    """Remove what is kept for the next build (`kata prune build`), after a build that is at work.

    Returns:
        How many bytes that took on the disk.

    Raises:
        HostError: It cannot be removed.
    """
    from kata.cli import on_disk

    storage = os.path.join(_directory(), "storage")
    if not os.path.isdir(storage):
        return 0
    work = os.path.join(_directory(), "work")
    with records.DirectoryLock(_directory(), mode=0o700), _made_anew(work):
        with suppress(HostError):  # without a builder nothing of one is at work
            _clear_quietly(_Build(builder(), work))
        size = on_disk.taken(on_disk.files_below(storage))
        try:
            shutil.rmtree(storage)
        except OSError as error:
            raise HostError(f"cannot remove {error.filename}: {error.strerror}", "kata df") from error
    return size


def _keep_stdin(path: str) -> None:
    """Write the Dockerfile on standard input to a file: a builder in a process group of its own may not read there."""
    with open(0, "rb", closefd=False) as given:
        content = given.read(_LARGEST_FILE + 1)
    if b"\0" in content or len(content) > _LARGEST_FILE:
        raise UsageError(
            "standard input is no Dockerfile",
            "a context in an archive has to be unpacked: mkdir C; tar -xf - -C C; kata build C",
        )
    if not content.strip():
        raise UsageError("the Dockerfile on standard input is empty", "kata build -f - . < FILE")
    with open(path, "wb") as file:
        file.write(content)


@contextmanager
def _made_anew(directory: str) -> Iterator[None]:
    """An empty directory, which goes at the end. That of a build that was killed goes now."""
    shutil.rmtree(directory, ignore_errors=True)
    paths.make_dirs(directory, 0o700)
    try:
        yield
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _command(build: _Build, words: list[str]) -> list[str]:
    if build.is_podman:
        return build.command(f"--runtime={build.runtime}", "build", *words)
    return build.command("build", f"--runtime={build.runtime}", *words)


def _clear_quietly(build: _Build) -> None:
    """What there is to tell is told already."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        build.clear()
    except (KataError, OSError):
        pass  # the next build tries again
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _name(text: str) -> str:
    wanted = references.parse_reference(text)
    if wanted.digest or text.partition(":")[0] in references.LOCAL_KINDS:
        raise UsageError(f"--tag {text!r} is no name of an image", "kata build -t NAME[:TAG] CONTEXT")
    return str(wanted)


HANDLERS = {"build": _build}
