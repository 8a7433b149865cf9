"""Puts kata on a machine and takes it off again: the work behind `make install` and `make uninstall`.

What is installed, below PREFIX (``/usr/local``)::

    lib/kata/<version>-<digest>/site-packages/   the package and the packages it depends on
                    kata/shipped/kata-agent      what `kata guest build` puts into the guest
                    kata/shipped/kata-inspector  what `kata inspect-image` runs in a guest
                    kata/shipped/recipe/         how it makes one: kernel configuration, list of modules
    lib/kata/manifest.json                       every path that was made
    bin/kata                                     a link to site-packages/kata/__main__.py
    bin/kata-agent-ctl                           a link to site-packages/kata/agent_ctl/__main__.py
    bin/kata-log-parser                          a link to site-packages/kata/log_parser/__main__.py
    bin/kata-monitor                             a link to site-packages/kata/monitor/__main__.py
    bin/kata-runtime                             a link to site-packages/kata/oci_runtime/__main__.py
    lib/kata/<version>-<digest>/monitor-packages/  the packages that only kata-monitor imports
    lib/kata/<version>-<digest>/share/           manual pages, completion for shells (tools/manpages.py)
    share/man/man1/kata.1, ...                   links to these
    lib/systemd/system/kata-monitor.service      a link to the service, which is neither enabled nor started

A new version goes beside the old one and the links change over at once, so that a running sandbox never
loads modules of two versions. The old one is removed unless a process still runs from it; then the next call
does it.
The guest is built by the installed `kata` in its usual place. Outside PREFIX nothing is edited but the configuration of
containerd and Docker where they are on this machine, by `kata install`, and `kata uninstall` takes that back.

Run by /usr/bin/python3 with the standard library alone.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVICE = ROOT / "deploy/systemd/kata-monitor.service"
AGENT = ROOT / "agent/target/x86_64-unknown-linux-gnu/release/kata-agent"
INSPECTOR = ROOT / "inspector/target/x86_64-unknown-linux-gnu/release/kata-inspector"
COMMANDS = {
    "kata": "kata/__main__.py",
    "kata-agent-ctl": "kata/agent_ctl/__main__.py",
    "kata-log-parser": "kata/log_parser/__main__.py",
    "kata-monitor": "kata/monitor/__main__.py",
    "kata-runtime": "kata/oci_runtime/__main__.py",
    "containerd-shim-kata-v2": "kata/__main__.py",
}
"""Program on the PATH -> file in site-packages that it is a link to."""
OTHERS_COMMANDS = (*COMMANDS, "kata-ctl")
"""Programs of that name which are not ours belong to another Kata."""


SORTS = ("trees", "links", "directories", "guest")
"""What a manifest lists: versions, links, directories that were made for links, files of the guest."""


class Refusal(Exception):
    """The installation or its removal must not go on.

    Args:
        message: What, which, why.
        hint: What to do.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def say(text: str) -> None:
    """Tell the user something, on standard error."""
    print(text, file=sys.stderr, flush=True)


class Place:
    """Where an installation is.

    Args:
        prefix: PREFIX.
        destdir: DESTDIR: put before every path while writing, for those who build packages; often empty.
    """

    def __init__(self, prefix: str, destdir: str) -> None:
        if not prefix.startswith("/"):
            raise Refusal(f"PREFIX '{prefix}' is not an absolute path", "for example PREFIX=/usr/local")
        self.prefix = os.path.normpath(prefix)
        self.destdir = os.path.abspath(destdir) if destdir else ""

    def on_disk(self, path: str) -> Path:
        """Where a path of the installation is now."""
        return Path(self.destdir + path)

    @property
    def library(self) -> str:
        return f"{self.prefix}/lib/kata"

    @property
    def manifest(self) -> Path:
        return self.on_disk(f"{self.library}/manifest.json")

    @property
    def service(self) -> str:
        """The link by which systemd finds the service."""
        return f"{self.prefix}/lib/systemd/system/{SERVICE.name}"

    def link(self, command: str) -> str:
        return f"{self.prefix}/bin/{command}"

    def shared_links(self, name: str) -> dict[str, str]:
        """The links to what the version *name* shares: link -> its target, as far as that version is there."""
        share = self.on_disk(f"{self.library}/{name}/share")
        found = {}
        for path in sorted(share.rglob("*")):
            if path.is_file():
                below = path.relative_to(share)
                up = "../" * len(below.parts)
                found[f"{self.prefix}/share/{below}"] = f"{up}lib/kata/{name}/share/{below}"
        return found


def load_manifest(place: Place) -> dict[str, list[str]]:
    """The paths that were made, by sort; empty when nothing is installed.

    Raises:
        Refusal: There is a manifest, but it cannot be read.
    """
    try:
        found = json.loads(place.manifest.read_text())
        found.setdefault("directories", [])  # an installation from before there were any
        return {sort: [str(path) for path in found[sort]] for sort in SORTS}
    except FileNotFoundError:
        return {sort: [] for sort in SORTS}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refusal(
            f"{place.manifest} cannot be read: {error}", f"remove {place.on_disk(place.library)} by hand"
        ) from error


def save_manifest(place: Place, manifest: dict[str, list[str]]) -> None:
    """Write down what is installed."""
    temporary = place.manifest.with_suffix(".new")
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    temporary.replace(place.manifest)


# ---- what stands in the way ----


def other_katas(place: Place) -> list[str]:
    """Signs of another Kata on this machine, one sentence each."""
    found = []
    with contextlib.suppress(OSError):
        found += [f"/opt/kata/bin/{name}" for name in os.listdir("/opt/kata/bin")][:1]
    ours = os.path.realpath(place.library)
    searched = dict.fromkeys(
        [*os.get_exec_path(), "/usr/local/bin", "/usr/bin", "/usr/local/sbin", "/usr/sbin"]
    )
    for directory in searched:
        for name in OTHERS_COMMANDS:
            path = os.path.join(directory, name)
            if os.path.lexists(path) and not os.path.realpath(path).startswith(ours + "/"):
                found.append(path)
    return list(dict.fromkeys([*found, *other_sandboxes()]))


def other_sandboxes(run: str = "/run/kata", vc: str = "/run/vc") -> list[str]:
    """Directories that only another Kata has made, one phrase for each place.

    Args:
        run: Our run directory, in which the original's newer runtime has a directory for each sandbox.
        vc: Where its older one has its things.
    """
    found = []
    for directory, known in ((run, ("sandboxes", "boots")), (vc, ("sbs",)), (f"{vc}/sbs", ())):
        with contextlib.suppress(OSError):
            strangers = sorted(
                entry.name
                for entry in os.scandir(directory)
                if entry.is_dir() and entry.name not in known and not is_ours(entry.path, run)
            )
            if strangers:
                found.append(f"{directory}, which has {', '.join(strangers[:3])}")
    return found


def is_ours(directory: str, run: str) -> bool:
    """Whether a directory is there for one of our sandboxes: a link to its management socket is in it."""
    with contextlib.suppress(OSError):
        return os.readlink(f"{directory}/shim-monitor.sock").startswith(f"{run}/sandboxes/")
    return False


def check_machine(place: Place, force: bool) -> None:
    """Whether installing may begin.

    Raises:
        Refusal: Another Kata is in use here, or this is not root.
    """
    if place.destdir:
        return
    if os.geteuid() != 0:
        raise Refusal(f"installing below {place.prefix} needs root", "sudo make install")
    others = other_katas(place)
    if others:
        text = "another Kata is on this machine: " + "; ".join(others)
        if not force:
            raise Refusal(text, "remove that one first, or go on beside it with FORCE=1")
        say(f"warning: {text}; going on, as told")


def running_from(directory: str) -> list[int]:
    """Pids of the processes that were started from a file below *directory*."""
    pids = []
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if f"{directory}/" in Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace"):
                pids.append(int(entry))
    return pids


def sandboxes() -> list[str]:
    """Ids of sandboxes that have a run directory on this machine."""
    with contextlib.suppress(OSError):
        return sorted(os.listdir(os.path.join(os.environ.get("KATA_RUN_DIR") or "/run/kata", "sandboxes")))
    return []


# ---- installing ----


def _sources() -> Iterator[Path]:
    for path in sorted((ROOT / "src" / "kata").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path


def _recipes() -> list[Path]:
    return sorted(path for path in (ROOT / "guest").iterdir() if path.is_file())


def digest() -> str:
    """Version and a hash of all that an installation is made from."""
    total = hashlib.sha256(sys.version.encode())
    pinned = [ROOT / "pyproject.toml", ROOT / "tools/constraints.txt", Path(__file__).resolve()]
    pinned += [SERVICE, ROOT / "tools/manpages.py", *sorted((ROOT / "tools/completion").iterdir())]
    for path in [*_sources(), *_recipes(), AGENT, INSPECTOR, *pinned]:
        if path.exists():  # the agent is built by now, but before a dry run
            total.update(f"{path.relative_to(ROOT)}\0{path.stat().st_mode}\0".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    source = (ROOT / "src/kata/__init__.py").read_text()
    version = re.search(r'__version__ = "([^"]+)"', source)
    return f"{version[1] if version else '0'}-{total.hexdigest()[:12]}"


def install_packages(target: Path, requirements: Sequence[str]) -> None:
    """Put Python packages and what they need into a directory of their own, in the versions that are pinned."""
    pip = [f"{ROOT}/.venv/bin/python", "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    where = ["--no-compile", "--target", str(target), "-c", f"{ROOT}/tools/constraints.txt"]
    # Without root's warning: it is about the system's packages, which --target does not touch.
    environment = {**os.environ, "PIP_ROOT_USER_ACTION": "ignore"}
    subprocess.run([*pip, *where, *requirements], check=True, env=environment)
    shutil.rmtree(target / "bin", ignore_errors=True)


def copy_sources(packages: Path) -> None:
    """Copy the package ``kata`` into a directory of packages."""
    for path in _sources():
        target = packages / path.relative_to(ROOT / "src")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        target.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


def ship(package: Path) -> None:
    """Put what the code runs or builds guests from where `kata.paths.shipped` looks for it."""
    shipped = package / "shipped"
    (shipped / "recipe").mkdir(parents=True)
    for program in (AGENT, INSPECTOR):
        shutil.copyfile(program, shipped / program.name)
        (shipped / program.name).chmod(0o755)
    for path in _recipes():
        shutil.copyfile(path, shipped / "recipe" / path.name)


def fill(tree: Path) -> None:
    """Make a version's directory: dependencies, package, byte code, agent."""
    packages = tree / "site-packages"
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    say("  ... install the Python packages that kata needs")
    install_packages(packages, project["dependencies"])
    install_packages(tree / "monitor-packages", project["optional-dependencies"]["monitor"])
    copy_sources(packages)
    # By content, not by time: packages are copied, and a byte code file that looks old is written again.
    compiler = ["-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash"]
    subprocess.run(["/usr/bin/python3", "-I", *compiler, packages, tree / "monitor-packages"], check=True)
    ship(packages / "kata")
    subprocess.run(["/usr/bin/python3", "-I", ROOT / "tools/manpages.py", tree / "share"], check=True)


def tell_systemd(place: Place, *arguments: str) -> None:
    """Have systemd, where it runs, take notice of a service that has come, changed or is to go."""
    if not place.destdir and os.path.isdir("/run/systemd/system"):
        subprocess.run(["systemctl", *arguments], check=False, stderr=subprocess.DEVNULL)


CLIENTS = {"containerd": "containerd", "docker": "dockerd", "podman": "podman", "crio": "crio"}
"""Clients that `kata install` can tell about kata -> their daemon's program, or their own."""


def chosen_clients(text: str) -> list[str]:
    """The clients that CLIENTS names: ``auto`` (those on this machine), ``none``, or their names.

    Raises:
        Refusal: There is no such client.
    """
    if text == "auto":
        # What the tests unpacked in the checkout is no program of this machine.
        found = {name: shutil.which(program) for name, program in CLIENTS.items()}
        return [name for name, path in found.items() if path and not path.startswith(f"{ROOT}/")]
    names = [] if text == "none" else text.replace(",", " ").split()
    for name in names:
        if name not in CLIENTS:
            raise Refusal(f"CLIENTS names {name!r}", "auto, none, or some of: " + ", ".join(CLIENTS))
    return names


def tell_clients(place: Place, clients: Sequence[str], verb: str, *more: str) -> None:
    """Have the installed kata change clients' configuration. One that refuses is left as it is, with a warning."""
    for name in clients:
        if subprocess.run([place.link("kata"), verb, name, *more], check=False).returncode:
            say(f"warning: {name} is left as it is; later: kata {verb} {name}")


def install(place: Place, kernel: str, dry_run: bool, clients: Sequence[str] = ()) -> None:
    """Install this checkout's version, change the links over to it, and tell *clients* of it."""
    name = digest()
    tree = f"{place.library}/{name}"
    manifest = load_manifest(place)
    links = {
        place.link(command): f"../lib/kata/{name}/site-packages/{file}" for command, file in COMMANDS.items()
    }
    present = tree in manifest["trees"] and place.on_disk(tree).is_dir()
    if dry_run:
        kata = [f"{ROOT}/tools/kata"]
        for name in clients if not place.destdir else []:
            subprocess.run([*kata, "install", name, "--dry-run"], check=False)
        say("would install:" if not present else "is installed already:")
        for line in [tree, *(f"{link} -> {target}" for link, target in links.items())]:
            print(f"  {line}")
        print(f"  {place.prefix}/share: manual pages, and completion for bash, zsh and fish")
        for old in manifest["trees"]:
            if old != tree:
                print(f"  {old}: would be removed")
        return
    if not present:
        place.on_disk(place.library).mkdir(parents=True, exist_ok=True)
        shutil.rmtree(place.on_disk(tree), ignore_errors=True)
        working = place.on_disk(f"{place.library}/.{name}.new")
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(mode=0o755)
        try:
            fill(working)
            service = SERVICE.read_text().replace("=/usr/local/bin/", f"={place.prefix}/bin/")
            (working / SERVICE.name).write_text(service)
            working.rename(place.on_disk(tree))
        finally:
            shutil.rmtree(working, ignore_errors=True)
        manifest["trees"].append(tree)
        save_manifest(place, manifest)
    programs = sorted(links)
    links |= place.shared_links(name)
    links[place.service] = f"../../../lib/kata/{name}/{SERVICE.name}"
    make_links(place, manifest, links)
    for old in set(manifest["links"]) - set(links):  # a page of a command that this version has not
        remove(place, place.on_disk(old), dry_run=False)
    manifest["links"] = sorted(links)
    tell_systemd(place, "daemon-reload")
    tell_systemd(place, "try-restart", SERVICE.name)  # or it would run on from the old version
    remove_old_trees(place, manifest, tree)
    save_manifest(place, manifest)
    say(f"  ok  {'is already there' if present else 'installed'}: {', '.join(programs)} ({name})")
    if place.destdir:
        return
    command = place.link("kata")
    status = subprocess.run([command, "guest", "build", "--kernel", kernel], check=False).returncode
    if status:
        raise Refusal(
            f"kata guest build failed with status {status}", f"see above; then {command} guest build"
        )
    guest = os.environ.get("KATA_GUEST_DIR") or os.path.join(
        os.environ.get("KATA_STATE_DIR") or "/var/lib/kata", "guest"
    )
    manifest["guest"] = sorted(os.path.join(guest, name) for name in os.listdir(guest))
    save_manifest(place, manifest)
    tell_clients(place, clients, "install")
    if f"{place.prefix}/bin" not in os.get_exec_path():
        say(f"warning: {place.prefix}/bin is not on your PATH")
    say("Try: kata doctor, then: kata run --rm -it alpine sh")


def make_links(place: Place, manifest: dict[str, list[str]], links: dict[str, str]) -> None:
    """Make links, link -> target, or have those that are there lead elsewhere."""
    for link, target in links.items():
        path = place.on_disk(link)
        make_directories(place, manifest, os.path.dirname(link))
        if not path.is_symlink() or os.readlink(path) != target:
            temporary = path.with_name(f".{path.name}.new")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target)
            temporary.replace(path)


def make_directories(place: Place, manifest: dict[str, list[str]], path: str) -> None:
    """Make a directory for links, and take down in *manifest* which ones were not there."""
    missing = []
    while not place.on_disk(path).is_dir():
        missing.append(path)
        path = os.path.dirname(path)
    for directory in reversed(missing):
        place.on_disk(directory).mkdir(mode=0o755)
        manifest["directories"].append(directory)


def remove_old_trees(place: Place, manifest: dict[str, list[str]], keep: str) -> None:
    """Remove other versions, unless a sandbox still runs from one."""
    for tree in [path for path in manifest["trees"] if path != keep]:
        pids = running_from(tree)
        if pids:
            say(f"warning: {tree} stays: process {pids[0]} runs from it; the next make install removes it")
            continue
        shutil.rmtree(place.on_disk(tree), ignore_errors=True)
        manifest["trees"].remove(tree)


# ---- removing ----


def uninstall(place: Place, force: bool, purge: bool, dry_run: bool, clients: Sequence[str] = ()) -> None:  # noqa: C901, PLR0912
    """Take back what *clients* were told, remove what the manifest names, and with *purge* images, containers and the
    cache too.

    Raises:
        Refusal: Nothing is installed there, sandboxes still run, or this is not root.
    """
    manifest = load_manifest(place)
    if not place.manifest.exists():
        raise Refusal(
            f"nothing is installed below {place.prefix}", "if you chose another, name it: PREFIX=..."
        )
    if os.geteuid() != 0 and not place.destdir:
        raise Refusal(f"removing from {place.prefix} needs root", "sudo make uninstall")
    running = [] if place.destdir else sandboxes()
    if running and not dry_run:
        text = f"{len(running)} sandboxes are still there: {', '.join(running[:5])}"
        if not force:
            raise Refusal(text, "kata ps, kata stop NAME, kata gc; or end them with FORCE=1")
        say(f"warning: {text}; ending them, as told")
        subprocess.run([place.link("kata"), "stop", "-t", "3", *running], check=False)
        subprocess.run([place.link("kata"), "gc"], check=False)
    state = Path(os.environ.get("KATA_STATE_DIR") or "/var/lib/kata")
    cache = Path(os.environ.get("KATA_CACHE_DIR") or "/var/cache/kata")
    doomed = [place.on_disk(path) for sort in ("links", "trees", "guest") for path in manifest[sort]]
    if purge and not place.destdir:
        doomed += [path for path in (state, cache) if path.is_dir()]
        refuse_mounts(doomed)
    if not place.destdir and os.path.exists(place.link("kata")):
        tell_clients(place, clients, "uninstall", *(["--dry-run"] if dry_run else []))
    if not dry_run and os.path.lexists(place.on_disk(place.service)):
        tell_systemd(place, "disable", "--now", SERVICE.name)
    for path in doomed:
        remove(place, path, dry_run)
    if dry_run:
        return
    tell_systemd(place, "daemon-reload")
    place.manifest.unlink()
    run = Path(os.environ.get("KATA_RUN_DIR") or "/run/kata")
    emptied = [place.on_disk(path) for path in (*reversed(manifest["directories"]), place.library)]
    if not place.destdir:
        for path in (*run.glob("*"), *run.glob("boots/*")):
            if path.is_file():  # results of probes and the like; a sandbox's things are in its directory
                path.unlink()
        vc = Path("/run/vc") if str(run) == "/run/kata" else run / "vc"
        emptied += [state / "guest", state, vc / "sbs", vc, run / "boots", run / "sandboxes", run]
    for directory in emptied:
        with contextlib.suppress(OSError):
            directory.rmdir()  # only if empty
    say(f"kata is removed from {place.prefix}.")
    kept = [] if place.destdir else [path for path in (state, cache) if path.is_dir()]
    if kept:
        say(f"Kept: {' and '.join(map(str, kept))} (images, containers, kernels). PURGE=1 removes them too.")
    say("Debian packages that set-up installed stay.")


def refuse_mounts(directories: list[Path]) -> None:
    """Raise a Refusal if something is mounted below a directory that is to be removed."""
    for line in Path("/proc/self/mountinfo").read_bytes().rstrip(b"\n").split(b"\n"):
        point = os.fsdecode(line.split(b" ")[4])
        for directory in directories:
            if point == str(directory) or point.startswith(f"{directory}/"):
                raise Refusal(
                    f"{point} is mounted, so {directory} cannot be removed", f"kata gc, or umount {point}"
                )


def remove(place: Place, path: Path, dry_run: bool) -> None:
    """Remove one path. A link that somebody has pointed elsewhere is no longer ours and stays."""
    if path.is_symlink() and "/lib/kata/" not in f"{os.path.dirname(path)}/{os.readlink(path)}":
        say(f"warning: {path} stays: it is a link to {os.readlink(path)}, not to this kata")
        return
    if not os.path.lexists(path):
        return
    if dry_run:
        print(f"would remove {path}")
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def main() -> int:
    """Parse the arguments and do it; 1 after a refusal, with its words on stderr."""
    parser = argparse.ArgumentParser(description="Install kata on this machine, or remove it.")
    parser.add_argument("action", choices=["check", "install", "uninstall"])
    kernels = ["auto", "small", "distro"]
    option = parser.add_argument
    option("--prefix", default="/usr/local", help="where to install (default %(default)s)")
    option("--destdir", default="", help="put this before every path, to build a package")
    option("--kernel", default="auto", choices=kernels, help="the guest's kernel (default %(default)s)")
    option(
        "--clients",
        default="auto",
        help="whose configuration is changed: auto, none, or names (%(default)s)",
    )
    option("--force", action="store_true", help="go on where another Kata, or a sandbox, is in use")
    option("--purge", action="store_true", help="remove images, containers and cache, too")
    option("--dry-run", action="store_true", help="print what would be done, and do nothing")
    options = parser.parse_args()
    try:
        place = Place(options.prefix, options.destdir)
        clients = chosen_clients(options.clients)
        if options.action == "uninstall":
            # Also of a client that has left this machine: its configuration may still be here.
            clients = list(CLIENTS) if options.clients == "auto" else clients
            uninstall(place, options.force, options.purge, options.dry_run, clients)
            return 0
        check_machine(place, options.force or options.dry_run)
        if options.action == "install":
            install(place, options.kernel, options.dry_run, clients)
            if place.destdir and not options.dry_run:
                say(
                    "  the guest is not part of it: kata guest build, on the machine where this is installed"
                )
    except Refusal as refusal:
        say(f"error: {refusal}\nhint: {refusal.hint}")
        return 1
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"error: {options.action} failed: {error}\nhint: mend that and run it again")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
