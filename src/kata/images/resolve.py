"""From what a user calls an image to the image: found in the store, or fetched and converted into it.

This module is on the hot path of `kata run`: what pulls and converts is imported when an image is missing.
"""

from __future__ import annotations

import os

from kata.errors import ImageError, NotFoundError
from kata.images import platform as platforms
from kata.images import reference as references
from kata.images import store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata.images.platform import Platform
    from kata.images.reference import LocalImage, Reference


def resolve(
    image: str, *, pull: str = "missing", platform: str | None = None, progress: store.Progress | None = None
) -> store.Image:
    """Find an image, and fetch and convert it if it is not there.

    Args:
        image: What the user wrote; see `kata.images.reference`. The beginning of an image id also counts.
        pull: ``missing``, ``always`` (ask the registry whether there is a newer one) or ``never``. Local
            directories and archives are always looked at: unchanged ones are not read again.
        platform: ``linux/amd64`` or the like. By default this machine's; then one that is stored under the name and
            runs here is taken as it is.
        progress: Called while something is fetched or converted. By default a bar is drawn on stderr, if
            that is a terminal and the work takes over a second.

    Raises:
        UsageError: `image` or `platform` is malformed.
        NotFoundError: `pull` is ``never`` and there is no such image.
        ImageError: The image, archive or registry is at fault.
        ResourceExhaustedError: No space.
    """
    wanted = platforms.parse(platform) if platform else platforms.host()
    parsed = _parse_or_id(image)
    index = store.Index()
    if isinstance(parsed, references.LocalImage):
        if parsed.kind == "rootfs":
            return _plain_directory(parsed)
        found = _stored_local(parsed, index, wanted)
    else:
        found = None if pull == "always" else _stored(image, parsed, index, wanted, is_asked=bool(platform))
    if found is not None:
        return found
    if parsed is None:
        raise NotFoundError(f"there is no image with the id {image}", "see `kata images`")
    if pull == "never" and isinstance(parsed, references.Reference):
        asked, option = (f" for {wanted}", f"--platform {wanted} ") if platform else ("", "")
        raise NotFoundError(
            f"the image {parsed.familiar()} is not in the local store{asked}, and --pull is never",
            f"kata pull {option}{parsed.familiar()}",
        )
    from kata.images import acquire

    return acquire.acquire(parsed, wanted, progress)


def _parse_or_id(image: str) -> Reference | LocalImage | None:
    """The reference, or None for what can only be an image id."""
    if image.startswith("sha256:") and len(image) >= 11 and not image[7:].strip("0123456789abcdef"):
        return None
    return references.parse(image)


def _plain_directory(local: LocalImage) -> store.Image:
    if not os.access(local.path, os.R_OK | os.X_OK):
        raise ImageError(
            f"the directory {local.path} cannot be read", "check its permissions, or run as root"
        )
    record = {
        "id": "", "digest": "", "platform": str(platforms.host()), "config": {}, "created": "", "size": 0,
        "chain": "", "rootfs_dir": local.path,
    }  # fmt: skip
    return store.Image(record, [str(local)])


def _stored(
    image: str, parsed: Reference | None, index: store.Index, wanted: Platform, *, is_asked: bool
) -> store.Image | None:
    """The image of a name, digest reference or beginning of an id; None if it has to be fetched.

    Args:
        image: What the user wrote.
        parsed: The same, taken apart; None for what can only be an id.
        index: The store's.
        wanted: The platform.
        is_asked: Whether the user has named it: then another one that runs here as well does not stand for it, unless
            it is what the registry has for it.

    Raises:
        ImageError: An image that was named by its id is of another platform.
    """
    if parsed is not None:
        entry = index.names.get(str(parsed))
        digest = parsed.digest or (entry or {}).get("digest", "")
        of_digest = index.digests.get(store.digest_key(digest, wanted))
        image_id = entry["id"] if entry and not (is_asked and digest) else of_digest
        if entry or image_id:
            found = store.load(image_id, index) if image_id else None
            if found is None or image_id == of_digest or found.platform == str(wanted):
                return found
            return found if not is_asked and runs_on(found.platform, wanted) else None
    image_id = store.by_id(image)
    found = store.load(image_id, index) if image_id else None
    if found is not None and is_asked and not runs_on(found.platform, wanted):
        raise ImageError(
            f"the image {image} is built for {found.platform}, not for {wanted}",
            "name the image rather than its id, or leave --platform out",
        )
    return found


def runs_on(platform: str, wanted: Platform) -> bool:
    """Whether an image of this platform serves the wanted one."""
    return platforms.parse(platform).rank(wanted) >= 0


def _stored_local(local: LocalImage, index: store.Index, wanted: Platform) -> store.Image | None:
    """The image that was made of a directory or archive, if that has not changed since."""
    key = f"{local} {wanted}"
    if local.kind == "oci":
        from kata.images import layout

        digest = layout.Layout(local.path).choose(local.tag, wanted).digest
        image_id = index.digests.get(store.digest_key(digest, wanted))
        entry = index.names.get(str(local))
        if image_id is None or entry is None or entry["id"] != image_id:
            return None
        return store.load(image_id, index)
    seen = index.files.get(key)
    if seen is None or seen["stamp"] != store.file_stamp(local.path):
        return None
    return store.load(seen["id"], index)
