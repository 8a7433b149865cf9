"""Registries that answer wrongly: `kata pull` of each says what is wrong, and ends."""

from __future__ import annotations

import json
import random
import time
from functools import partial
from pathlib import Path

import child
import image_support as images
import mutate
from registry_support import Fake, Handler

from kata.cli.main import main as kata


def sweep(directory: Path, count: int, seed: int) -> child.Tally:
    """Try so many registries.

    Args:
        directory: Unused; the store is in KATA_STATE_DIR.
        count: How many.
        seed: Of the choice of damage.
    """
    tally = child.Tally("registries")
    fake = Fake()
    fake.server.handle_error = lambda request, client_address: None  # type: ignore[method-assign] # clients that give up
    try:
        for number in range(count):
            random_ = random.Random(f"{seed}/{number}")
            fake.blobs.clear()
            fake.requests.clear()
            _fill(fake, number, random_)
            name = f"registry {number} (seed {seed})"
            tally.add(child.run(name, partial(_pull, f"{fake.host}/x/y:{number}")))
    finally:
        fake.stop()
    return tally


def _pull(reference: str) -> int:
    time.sleep = lambda seconds: None  # between its attempts the client waits
    return kata(["pull", "-q", reference])


def _fill(fake: Fake, number: int, random_: random.Random) -> None:
    """An image, and damage to it or to the way in which it is served."""
    blobs = images.Blobs()
    layer = images.layer(images.member("file", content=random_.randbytes(2000)))
    top = images.image(blobs, [layer], how=random_.choice(("plain", "gzip", "zstd")))
    fake.blobs |= blobs
    fake.blobs[str(number)] = blobs[top["digest"]]
    how = random_.randrange(4)
    if how == 0:
        manifest = mutate.document(json.loads(blobs[top["digest"]]), random_)
        fake.blobs[str(number)] = mutate.encoded(manifest)
    elif how == 1:
        digest = random_.choice(list(blobs))
        fake.blobs[digest] = mutate.damaged(blobs[digest], random_)
    status = random_.choice((200, 200, 204, 206, 301, 302, 307, 400, 401, 403, 404, 416, 429, 500, 503, 299))
    headers = random_.choice(
        (
            {},
            {
                "Location": random_.choice(
                    ("/", "//", "http://127.0.0.1:1/x", "file:///etc/passwd", "\x7f", "http://[::1")
                )
            },
            {
                "WWW_Authenticate": random_.choice(
                    ("Bearer", 'Bearer realm="', 'Bearer realm="http://127.0.0.1:1/t"', "Basic", "x=,")
                )
            },
            {
                "Content_Type": random_.choice(
                    ("", "text/html", "application/vnd.oci.image.index.v1+json", "x" * 3000)
                )
            },
            {"Docker_Content_Digest": "sha256:" + "0" * 64},
            {
                "Content_Range": random_.choice(
                    ("bytes 0-1/2", "bytes 5-1/2", "x", f"bytes 0-{1 << 70}/{1 << 70}")
                )
            },
            {"Retry_After": random_.choice(("0", "-1", "x"))},
        )
    )
    wrong = random_.random()
    fated = random_.randrange(4)
    cut = mutate.damaged(b'{"errors":[{"code":"X","message":"no"}],"token":"t"}', random_)

    def hook(handler: Handler) -> bool:
        if how < 2 or len(fake.requests) - 1 < fated:
            return False
        if wrong < 0.2:
            handler.wfile.write(cut)  # no status line
            handler.close_connection = True
            return True
        handler.answer(status, b"" if status in (204, 304) else cut, **headers)
        return True

    fake.hook = hook
