"""Checkpoints stripped for others to use: only the keys that were asked for, and a name that proves the bytes."""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Collection

from distckpt import layout
from distckpt.catalog import Catalog
from distckpt.formats.pth import open_pth, write_stream
from distckpt.formats.stand_ins import NewMemory

_log = logging.getLogger("distckpt")


def publish(catalog: Catalog, place: str, name: str, keys: Collection[str]) -> str:
    """The file ``name``, stripped to ``keys``, is published beside it; the name of the published file. Leader only.

    That name ends in the first 8 hex digits of the sha256 of its bytes, as
    ``torch.hub.load_state_dict_from_url(check_hash=True)`` wants it. The same content gets the same name.

    Args:
        place: the path of the file ``name``.

    Raises:
        DamagedCheckpoint: where the file is not whole, or could only be unpickled.
        OSError, Superseded: where it cannot be written, or may not be any more; nothing is published then.
    """
    catalog.attempt.check()
    file = open_pth(place)
    held = file.value
    if missing := [key for key in keys if key not in held]:
        _log.warning("%s has no %s, so the published file has none either", name, ", ".join(missing))
    if removed := [key for key in held if key not in keys]:
        _log.info("%s is published without %s, which published_keys does not name", name, ", ".join(removed))
    memory = NewMemory()
    kept = memory.replaced({key: value for key, value in held.items() if key in keys})
    file.fill(memory.targets)
    draft = f"{layout.DRAFT_PREFIX}{name}-{secrets.token_hex(4)}"
    digest = hashlib.sha256()
    with catalog.store.create(draft) as sink:
        write_stream(kept, sink, digest)
    published = layout.published_file(name, digest.hexdigest())
    catalog.store.move(draft, published)
    catalog.store.settle()
    return published
