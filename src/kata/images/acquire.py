"""Adds an image to the store: reads its manifest, converts its layers, records its names.

Imported only when an image is missing or to be refreshed; `kata.images.resolve` finds stored ones.
"""

from __future__ import annotations

import os

from kata import paths
from kata.errors import ImageError
from kata.images import archive, changes, layout, manifest, store
from kata.images.convert import Source, make_rootfs
from kata.images.progress import KEPT_AFTER, Terminal
from kata.images.reference import LocalImage, Reference
from kata.storage.layers import limits_from_environment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.images.manifest import Descriptor
    from kata.images.platform import Platform

_MAX_NESTING = 4


def acquire(
    what: Reference | LocalImage, wanted: Platform, progress: store.Progress | None = None
) -> store.Image:
    """Fetch or read an image, convert it and name it.

    Args:
        what: The image; not of the kind ``rootfs``, which is used as it is.
        wanted: The platform to choose.
        progress: See `kata.images.resolve.resolve`.

    Returns:
        The stored image.

    Raises:
        ImageError: The image, archive or registry is at fault.
        HostError: The store cannot be written.
    """
    with Terminal(_title(what)) as terminal, changes.locked("adding", shared=True):
        report = progress or terminal
        if isinstance(what, Reference):
            from kata.images.pull import RegistrySource

            source: Source = RegistrySource(what, report)
        elif what.kind == "oci":
            source = layout.Layout(what.path)
        else:
            source = _open_archive(what.path, report)
        keep = False
        try:
            stamp = store.file_stamp(what.path) if isinstance(what, LocalImage) else None
            tag = what.tag if isinstance(what, LocalImage) else ""
            top = source.choose(tag, wanted)
            return _add(source, top, what, wanted, stamp, report)
        except KEPT_AFTER:
            keep = True  # the next attempt continues from here
            raise
        finally:
            source.close(keep)


def _title(what: Reference | LocalImage) -> str:
    return what.familiar() if isinstance(what, Reference) else os.path.basename(what.path)


def _open_archive(path: str, report: store.Progress) -> Source:
    spool = os.path.join(store.directory(), "rootfs")
    try:
        paths.make_dirs(spool, 0o700)
        limit = limits_from_environment().size
        return archive.Archive(path, spool, limit, lambda done, total: report("open", done, total))
    except OSError as error:
        raise changes.storage_error(error) from error


def _add(
    source: Source, top: Descriptor, what: Reference | LocalImage, wanted: Platform, stamp: list[int] | None,
    report: store.Progress,
) -> store.Image:  # fmt: skip
    index = store.Index()
    known = index.digests.get(store.digest_key(top.digest, wanted))
    image = store.load(known, index) if known else None
    if image is None:
        return _convert_and_record(source, top, what, wanted, stamp, report)
    return _record(image.id, None, source, [top.digest], what, wanted, stamp)


def _convert_and_record(
    source: Source, top: Descriptor, what: Reference | LocalImage, wanted: Platform, stamp: list[int] | None,
    report: store.Progress,
) -> store.Image:  # fmt: skip
    digests = [top.digest]
    name = f"the manifest of {source.name}"
    data = source.read(top)
    content = manifest.document(data, name)
    while manifest.is_index(content):
        if len(digests) > _MAX_NESTING:
            raise ImageError(f"{source.name}: indexes within indexes", "the image is malformed")
        top = manifest.choose(manifest.listed(content, f"the index of {source.name}"), wanted, source.name)
        digests.append(top.digest)
        data = source.read(top)
        content = manifest.document(data, name)
    config_at, layers = manifest.layers(content, name)
    config_data = source.read(config_at)
    config = manifest.configuration(config_data, f"the configuration of {source.name}")
    if config.platform.rank(wanted) < 0:
        raise ImageError(
            f"{source.name} is built for {config.platform}, not for {wanted}",
            "choose an image that is built for this machine",
        )
    if len(config.diff_ids) != len(layers):
        raise ImageError(
            f"{source.name} has {len(layers)} layers, but its configuration names {len(config.diff_ids)}",
            "the image is malformed; have it built or pushed again",
        )
    chain = manifest.chain_id(config.diff_ids)
    size = make_rootfs(source, layers, config.diff_ids, chain, report)
    changes.write_file(store.blob_path(top.digest), data)
    changes.write_file(store.blob_path(config_at.digest), config_data)
    record = {
        "id": config_at.digest,
        "digest": top.digest,
        "platform": str(config.platform),
        "created": config.created,
        "config": config.config,
        "chain": chain,
        "size": size,
        "layers": [{"digest": layer.digest, "size": layer.size} for layer in layers],
    }
    return _record(config_at.digest, record, source, digests, what, wanted, stamp)


def _record(
    image_id: str, record: dict[str, object] | None, source: Source, digests: list[str],
    what: Reference | LocalImage, wanted: Platform, stamp: list[int] | None,
) -> store.Image:  # fmt: skip
    """Record an image's names and digests, and the image itself if it is new."""
    with changes.locked():
        index = store.Index()
        if record is not None:
            changes.write_json(store.record_path(image_id), record)
        for digest in digests:
            index.digests[store.digest_key(digest, wanted)] = image_id
        origin = "registry" if isinstance(what, Reference) else "local"
        index.names[str(what)] = {"id": image_id, "origin": origin, "digest": digests[0]}
        for name in source.names:
            # A name in an archive does not silently replace an image that was pulled under that name.
            if index.names.get(name, {}).get("origin", "local") == "local":
                index.names[name] = {"id": image_id, "origin": "local", "digest": digests[0]}
        if isinstance(what, LocalImage) and what.kind != "oci":
            index.files[f"{what} {wanted}"] = {"id": image_id, "stamp": stamp}
        changes.write_index(index)
        image = store.load(image_id, index)
    if image is None:
        raise ImageError(f"the image {what} was removed while it was added", "try again")
    return image
