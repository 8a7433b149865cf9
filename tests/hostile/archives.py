"""Broken image archives and layouts: `kata pull` of each says what is wrong, in one sentence, or takes it."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import child
import image_support as images
import mutate

from kata.cli.main import main as kata

_LAYER = images.layer(
    images.member("etc", "dir"),
    images.member("etc/file", content=b"x" * 700),
    images.member("bin", "symlink", link="usr/bin"),
    images.member("etc/hard", "link", link="etc/file"),
)


def sweep(directory: Path, count: int, seed: int) -> child.Tally:
    """Try so many archives.

    Args:
        directory: For them; KATA_STATE_DIR is another one.
        count: How many.
        seed: Of the choice of damage; input n depends on it and on n alone.
    """
    tally = child.Tally("archives")
    for number in range(count):
        random_ = random.Random(f"{seed}/{number}")
        kind = random_.choice(("oci", "oci-archive", "docker-archive"))
        path = directory / f"image-{number}"
        _write(kind, path, random_)
        name = f"{kind} {number} (seed {seed})"
        tally.add(child.run(name, partial(kata, ["pull", "-q", f"{kind}:{path}"])))
        for made in path.rglob("*") if path.is_dir() else ():
            if made.is_file():
                made.unlink()
        if path.is_file():
            path.unlink()
    return tally


def _write(kind: str, path: Path, random_: random.Random) -> None:
    where = random_.choice(("document", "document", "layer", "layer", "names", "archive"))
    damage = random_.choice((mutate.damaged, mutate.damaged_tar, mutate.damaged_tar))
    layer = damage(_LAYER, random_) if where == "layer" else _LAYER
    if kind == "docker-archive":
        files = _docker_files(layer, random_ if where == "document" else None)
    else:
        files = _oci_files(layer, random_ if where == "document" else None)
    if where == "names":
        files = {_name(name, random_): data for name, data in files.items()}
    if kind == "oci":
        for name, data in files.items():
            target = path / name.replace("\0", "_").lstrip("/")
            if ".." not in target.parts and len(name) < 200:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
        path.mkdir(exist_ok=True)
        return
    archive = _tar(files, random_ if where == "names" else None)
    if where == "archive":
        archive = mutate.damaged_tar(archive, random_)
    if random_.random() < 0.3:
        archive = gzip.compress(archive, 1)
    path.write_bytes(
        mutate.damaged(archive, random_) if where == "archive" and random_.random() < 0.4 else archive
    )


def _name(name: str, random_: random.Random) -> str:
    if random_.random() < 0.6:
        return name
    return random_.choice(
        (
            f"./{name}",
            f"../{name}",
            f"/{name}",
            name.upper(),
            name + "\udcff",
            "a" * 3000 + name,
            f"{name}/x",
        )
    )


def _oci_files(layer: bytes, random_: random.Random | None) -> dict[str, bytes]:
    blobs = images.Blobs()
    top = images.image(blobs, [layer], **images.tagged("latest"))
    index: Any = {"schemaVersion": 2, "manifests": [top]}
    if random_ is not None:
        which = random_.choice(("index", "manifest", "config"))
        if which == "index":
            index = mutate.document(index, random_)
        else:
            manifest = json.loads(blobs[top["digest"]])
            if which == "config":
                config = mutate.document(json.loads(blobs[manifest["config"]["digest"]]), random_)
                manifest["config"] = blobs.put(mutate.encoded(config), images.CONFIG)
            else:
                manifest = mutate.document(manifest, random_)
            index["manifests"] = [
                blobs.put(mutate.encoded(manifest), images.MANIFEST, **images.tagged("latest"))
            ]
    files = {f"blobs/sha256/{digest[7:]}": data for digest, data in blobs.items()}
    return {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": mutate.encoded(index), **files}


def _docker_files(layer: bytes, random_: random.Random | None) -> dict[str, bytes]:
    config: Any = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["sh"], "Env": ["A=b"]},
        "rootfs": {"type": "layers", "diff_ids": [images.sha256(layer)]},
    }
    manifest: Any = [{"Config": "config.json", "RepoTags": ["made:1"], "Layers": ["one/layer.tar"]}]
    if random_ is not None:
        if random_.random() < 0.6:
            manifest = mutate.document(manifest, random_)
        else:
            config = mutate.document(config, random_)
    return {
        "manifest.json": mutate.encoded(manifest),
        "config.json": mutate.encoded(config),
        "one/layer.tar": layer,
    }


def _tar(files: dict[str, bytes], random_: random.Random | None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", errors="surrogateescape", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            if random_ is not None and random_.random() < 0.2:
                link = tarfile.TarInfo(f"{name[:50]}-link")
                link.type = random_.choice(
                    (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
                )
                link.linkname = random_.choice((name, "/etc/passwd", "../../x", "\udcfe", "", link.name))
                tar.addfile(link)
    return out.getvalue()
