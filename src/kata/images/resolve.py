"""Finds the image that a user names: in the store, or by fetching and converting it.

This module is on the hot path of `kata run`: code that pulls and converts is imported only when an image is missing.
"""

from __future__ import annotations

import os

from kata.errors import ImageError, KataError, NotFoundError
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
    """Find an image, and fetch and convert it if the store does not have it.

    Args:
        image: The name as the user wrote it (see `kata.images.reference`), or the beginning of an image id.
        pull: ``missing``, ``always`` (check the registry for a newer image) or ``never``. Local directories and
            archives are always checked, and read again only if they have changed.
        platform: Platform, e.g. ``linux/amd64``. Without it, the one of this machine; a stored image of that name for
            another platform is used if it runs here.
        progress: Called during fetching and converting. By default a bar is drawn on stderr, if that is a terminal and
            the work takes longer than about a second.

    Returns:
        The stored image.

    Raises:
        UsageError: `image` or `platform` is malformed.
        NotFoundError: `pull` is ``never`` and there is no such image.
        ImageError: The image, archive or registry is at fault.
        ResourceExhaustedError: There is not enough space.
    """
    target = platforms.parse(platform) if platform else platforms.host()
    parsed = _parse_or_id(image)
    index = store.Index()
    if isinstance(parsed, references.LocalImage):
        if parsed.kind == "rootfs":
            return _plain_directory(parsed)
        stored = _stored_local(parsed, index, target)
    else:
        stored = None if pull == "always" else _stored(image, parsed, index, target, is_asked=bool(platform))
    if stored is not None:
        return stored
    if parsed is None:
        raise NotFoundError(f"there is no image with the id {image}", "see `kata images`")
    hint = references.hint_for_path(image) if isinstance(parsed, references.Reference) else ""
    if pull == "never" and isinstance(parsed, references.Reference):
        asked, option = (f" for {target}", f"--platform {target} ") if platform else ("", "")
        raise NotFoundError(
            f"the image {parsed.familiar()} is not in the local store{asked}, and --pull is never",
            hint or f"kata pull {option}{parsed.familiar()}",
        )
    from kata.images import acquire

    try:
        return acquire.acquire(parsed, target, progress)
    except KataError as error:
        error.hint = hint or error.hint
        raise


def _parse_or_id(image: str) -> Reference | LocalImage | None:
    """Parse the reference; None for text that can only be an image id."""
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
    """Find a stored image by name, digest reference or beginning of an id; None if it has to be fetched.

    Args:
        image: The name as the user wrote it.
        parsed: The parsed name; None for what can only be an id.
        index: The store's index.
        wanted: The platform.
        is_asked: Whether the user requested that platform. If so, an image of another platform is not used, even if it
            runs here, unless the registry has it for the requested one.

    Raises:
        ImageError: An image that was named by its id is for another platform.
    """
    if parsed is not None:
        entry = index.names.get(str(parsed))
        digest = parsed.digest or (entry or {}).get("digest", "")
        of_digest = index.digests.get(store.digest_key(digest, wanted))
        image_id = entry["id"] if entry and not (is_asked and digest) else of_digest
        if entry or image_id:
            image_of_id = store.load(image_id, index) if image_id else None
            if image_of_id is None or image_id == of_digest or image_of_id.platform == str(wanted):
                return image_of_id
            return image_of_id if not is_asked and runs_on(image_of_id.platform, wanted) else None
    image_id = store.by_id(image)
    image_of_id = store.load(image_id, index) if image_id else None
    if image_of_id is not None and is_asked and not runs_on(image_of_id.platform, wanted):
        raise ImageError(
            f"the image {image} is built for {image_of_id.platform}, not for {wanted}",
            "name the image rather than its id, or leave --platform out",
        )
    return image_of_id


def runs_on(platform: str, wanted: Platform) -> bool:
    """Whether a machine of the wanted platform can run an image of this platform."""
    return platforms.parse(platform).rank(wanted) >= 0


def _stored_local(local: LocalImage, index: store.Index, wanted: Platform) -> store.Image | None:
    """The stored image of a directory or archive, unless that has changed since."""
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
