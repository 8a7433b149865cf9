"""Makes what can be installed without this checkout: a Debian package and a wheel (`make dist`; docs/packages.md).

Both hold the code, the agent, the inspector, the recipe of guests, and the guest that `tools/setup test` has built, all
of it where `kata.paths.shipped` looks. The Debian package is what `make install DESTDIR=...` makes below ``/usr``, with
the Python packages that it needs, and the scripts in deploy/debian; so it is for the Debian release on which it is
made. The wheel leaves the Python packages to pip.

Run by the checkout's .venv. Usage: dist.py DIRECTORY [deb] [wheel] [notes]
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "src")]

import installer  # noqa: E402
import release_notes  # noqa: E402

from kata import __version__  # noqa: E402
from kata.errors import KataError  # noqa: E402
from kata.guest import manifest  # noqa: E402

GUEST = ROOT / "build/guest"
DEBIAN = ROOT / "deploy/debian"
SCRIPTS = ("preinst", "postinst", "prerm", "postrm")
PLATFORM = "manylinux_2_17_x86_64"
"""What the wheel runs on: its two programs are static, the rest is Python."""


def ship_guest(package: Path) -> None:
    """Put the guest that this checkout has built into a copy of the package.

    Args:
        package: The directory ``kata``, after `installer.ship`.
    """
    guest = manifest.load(str(GUEST))
    if guest.kernel_kind != "small":
        raise installer.Refusal(f"the guest in {GUEST} has a distribution's kernel", "tools/setup test")
    content = json.loads((GUEST / manifest.NAME).read_text())
    # Extensions are for the machine that wants them; where the agent was built is nobody's business.
    content.pop("extensions", None)
    content["initrd"]["agent_path"] = "shipped/kata-agent"
    agent = hashlib.sha256((package / "shipped/kata-agent").read_bytes()).hexdigest()
    if agent != content["initrd"]["agent_sha256"]:
        raise installer.Refusal(f"the guest in {GUEST} has another agent", "tools/setup test")
    target = package / "shipped/guest"
    target.mkdir()
    for path in (guest.kernel, guest.initrd):
        shutil.copyfile(path, target / os.path.basename(path))
    (target / manifest.NAME).write_text(json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def working() -> Iterator[Path]:
    """A directory for the time of the block."""
    directory = Path(tempfile.mkdtemp(prefix="kata-dist-"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def make_wheel(target: Path, guest: bool = True) -> Path:
    """Make the wheel, by setuptools as pyproject.toml has it.

    Args:
        target: Directory that it is put into.
        guest: Whether the guest is part of it; it is most of its size.

    Returns:
        Its path.
    """
    with working() as stage:
        installer.copy_sources(stage / "src")
        installer.ship(stage / "src/kata")
        if guest:
            ship_guest(stage / "src/kata")
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copyfile(ROOT / name, stage / name)
        option = f"--build-option=--plat-name={PLATFORM}"
        # setuptools comes with the development packages: nothing is fetched.
        how = [
            "--no-deps",
            "--no-build-isolation",
            "--disable-pip-version-check",
            "-q",
            f"--config-settings={option}",
        ]
        made = stage / "made"
        subprocess.run([sys.executable, "-m", "pip", "wheel", *how, "-w", made, stage], check=True)
        (wheel,) = made.glob("*.whl")
        return Path(shutil.move(wheel, target / wheel.name))


def debian_release() -> str:
    """The number of this machine's Debian release.

    Raises:
        installer.Refusal: It is none.
    """
    with contextlib.suppress(OSError):
        facts = dict(
            line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
        )
        if facts.get("ID") == "debian" and facts.get("VERSION_ID"):
            return facts["VERSION_ID"].strip('"')
    raise installer.Refusal(
        "a Debian package is made on the Debian release that it is for", "make dist A=wheel"
    )


def make_deb(target: Path) -> Path:
    """Make the Debian package, by dpkg-deb.

    Args:
        target: Directory that it is put into.

    Returns:
        Its path.
    """
    release = debian_release()
    version = f"{__version__}-1~deb{release}"
    with working() as stage:
        place = installer.Place("/usr", str(stage))
        (stage / "usr").mkdir()
        installer.install(place, "auto", dry_run=False)
        (tree,) = (path.parent for path in place.on_disk(place.library).glob("*/site-packages"))
        ship_guest(tree / "site-packages/kata")
        place.manifest.unlink()  # dpkg has a list of its own
        documents = stage / "usr/share/doc/kata"
        documents.mkdir(parents=True)
        for name, source in (
            ("copyright", "LICENSE"),
            ("changelog", "CHANGELOG.md"),
            ("README.md", "README.md"),
        ):
            shutil.copyfile(ROOT / source, documents / name)
        size = sum(path.lstat().st_size for path in stage.rglob("*") if path.is_file()) // 1024
        major, minor = sys.version_info[:2]
        values = {
            "VERSION": version,
            "SIZE": str(size),
            "PYTHON": f"{major}.{minor}",
            "NEXT_PYTHON": f"{major}.{minor + 1}",
            "TREE": tree.name,
            # Until 7.2 it was a part of QEMU's packages.
            "VIRTIOFSD": "qemu-system-common" if release == "12" else "virtiofsd",
        }
        (stage / "DEBIAN").mkdir()
        for name in ("control", *SCRIPTS):
            text = (DEBIAN / name).read_text()
            for key, value in values.items():
                text = text.replace(f"@{key}@", value)
            path = stage / "DEBIAN" / name
            path.write_text(text)
            path.chmod(0o755 if name in SCRIPTS else 0o644)
        made = target / f"kata_{version}_amd64.deb"
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", "-Zxz", "--build", stage, made], check=True, stdout=2
        )
        return made


def make_notes(target: Path) -> Path:
    """Write the release's notes.

    Raises:
        installer.Refusal: The changelog says nothing of this version.
    """
    path = target / "release-notes.md"
    try:
        path.write_text(release_notes.notes(release_notes.CHANGELOG.read_text(), __version__))
    except LookupError as error:
        raise installer.Refusal(str(error), "tools/release_notes.py --check") from None
    return path


MAKERS = {"deb": make_deb, "wheel": make_wheel, "notes": make_notes}


def main() -> int:
    """Make what is asked for, or all, and the sums of what is there; 1 after a refusal, with its words on stderr."""
    if len(sys.argv) < 2 or not set(sys.argv[2:]) <= set(MAKERS):
        print(__doc__, file=sys.stderr)
        return 2
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    try:
        made = [MAKERS[name](target) for name in sys.argv[2:] or MAKERS]
    except installer.Refusal as refusal:
        print(f"error: {refusal}\nhint: {refusal.hint}", file=sys.stderr)
        return 1
    except KataError as error:  # of the guest
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return 1
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    sums = target / "SHA256SUMS"
    listed = sorted(path for path in target.iterdir() if path.is_file() and path != sums)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in listed]
    sums.write_text("".join(lines))
    for path in made:
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
