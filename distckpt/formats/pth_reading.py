"""A file of ``torch.save`` that is read: its directory and its pickle first, then all of it once, straight into
tensors."""

from __future__ import annotations

import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from distckpt.errors import DamagedCheckpoint
from distckpt.formats import Piece
from distckpt.formats.dcp_zip import HEADER, UNPACKED, Record, directory
from distckpt.formats.filling import Span, fill, span_of
from distckpt.formats.hashing import Hash
from distckpt.formats.pth_unpickling import unpickle
from distckpt.formats.stand_ins import replaced, stand_in
from distckpt.formats.streaming import all_of, stream
from distckpt.manifest import FileEntry
from distckpt.stores import Source, Store

if TYPE_CHECKING:
    from typing_extensions import Buffer

try:
    from isal.isal_zlib import crc32
except ImportError:  # an extra: several times as fast
    from zlib import crc32

_TAIL_BYTES = 64 * 1024  # the directory of 900 records
_LONG = 0xFFFFFFFF
_SUM_BYTES, _LONG_SUM_BYTES = 16, 24  # of what follows a record that is not empty


class _Content(NamedTuple):
    """Where the content of a record lies, and its CRC-32."""

    begin: int
    end: int
    checksum: int
    name: str


class PthFile:
    """A file whose directory and pickle were read, and found to agree with the checksums in it.

    Attributes:
        value: what it holds; of each tensor a stand-in, one for all that are tied.

    Args:
        entry: the size and digest of the file that is meant. Without, the checksums in it have to do.

    Raises:
        ValueError, or whatever the reader of pickles does: where it is no such file, or not laid out as ``torch.save``
            does it now, or has tensors that do not simply fill their records. To read it whole is what is left.
        OSError, EOFError: where it cannot be read.
    """

    def __init__(self, store: Store, path: str, entry: FileEntry | None) -> None:
        self._store = store
        self._path = path
        self._place = f"{store.url}/{path}"
        self._entry = entry
        with store.open(path) as source:
            self._size_bytes = source.size_bytes
        if entry is not None and self._size_bytes != entry.size_bytes:
            raise ValueError(f"it has {self._size_bytes} bytes, {entry.size_bytes} were committed")
        records = self._directory()
        contents = _contents(records)
        # torch can be told to work out none.
        self._summed = contents.values() if any(one.checksum for one in records.values()) else ()
        root = min(contents.values()).name.removesuffix("data.pkl")
        self._tensors = sorted(one for name, one in contents.items() if name.startswith(f"{root}data/"))
        self._head = self._read(0, self._tensors[0].begin if self._tensors else self._size_bytes)
        if (order := contents.get(f"{root}byteorder")) and self._text(order) != sys.byteorder.encode():
            raise ValueError("it was written on a machine of another byte order")
        self._prefix = f"{root}data/"
        self._sizes = {one.name: one.end - one.begin for one in self._tensors}
        self._names: dict[int, str] = {}
        self._standing: dict[str, Tensor] = {}
        value = unpickle(self._text(contents[f"{root}data.pkl"]), self._new_storage)
        self.value = replaced(value, self._stand_in)
        if len(self._standing) < len(self._names):
            raise ValueError("some of its tensors are inside of objects")
        self._records = {id(one): name for name, one in self._standing.items()}

    def fill(self, targets: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See `distckpt.formats.Opened.fill`."""
        wanted: defaultdict[str, list[Tensor]] = defaultdict(list)
        for standing, target in targets:
            wanted[self._records[id(standing)]].append(target)
        with self._checked() as (source, digest):
            fill(source, self._spans(lambda name, one: span_of(one.dtype, one.shape, one.nbytes, wanted[name])), digest)

    def pieces(self, standing: Sequence[Tensor]) -> Iterator[Piece]:
        """See `distckpt.formats.Opened.pieces`."""
        chunks = {self._records[id(one)]: [all_of(one)] for one in standing}
        with self._checked() as (source, digest):
            spans = self._spans(lambda name, one: Span(one.nbytes, chunks=chunks.get(name, ())))
            yield from stream(source, spans, digest)

    def _directory(self) -> dict[str, Record]:
        count = _TAIL_BYTES
        while True:
            begin = max(self._size_bytes - count, 0)
            try:
                return directory(self._read(begin, self._size_bytes), begin)
            except ValueError:
                if not begin:
                    raise
            count *= 16

    def _read(self, begin: int, end: int) -> bytes:
        data = bytearray(end - begin)
        with self._store.open(self._path) as source:
            source.expect([(begin, end)])
            source.skip(begin)
            source.read_into(data)
        return bytes(data)

    def _text(self, content: _Content) -> bytes:
        """The content of a record that lies before the tensors."""
        text = self._head[content.begin : content.end]
        if len(text) != content.end - content.begin or (self._summed and crc32(text) != content.checksum):
            raise ValueError(f"its record {ascii(content.name)[:80]} is broken")
        return text

    def _new_storage(self, key: str, size_bytes: int) -> torch.UntypedStorage:
        name = self._prefix + key
        if self._sizes.get(name, 0) != size_bytes:
            raise ValueError(f"its record {ascii(name)[:80]} does not have {size_bytes} bytes")
        storage = torch.UntypedStorage(size_bytes, device="meta")  # type: ignore[no-untyped-call]
        self._names[storage._cdata] = name
        return storage

    def _stand_in(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        name = self._names[storage._cdata]
        standing = self._standing.setdefault(name, stand_in(tuple(tensor.shape), tensor.dtype))
        is_plain = tensor.is_contiguous() and tensor.nbytes == storage.nbytes() and not tensor.is_conj()
        if not is_plain or tensor.is_neg() or (standing.shape, standing.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(f"its record {ascii(name)[:80]} is not simply a tensor")
        return standing

    def _spans(self, span: Callable[[str, Tensor], Span]) -> Iterator[Span]:
        """All that is behind the head."""
        at = len(self._head)
        for begin, end, _, name in self._tensors:
            yield Span(begin - at)
            yield span(name, self._standing[name]) if name in self._standing else Span(end - begin)
            at = end
        yield Span(self._size_bytes - at)

    @contextmanager
    def _checked(self) -> Iterator[tuple[Source, Hash]]:
        """The bytes behind the head; and a digest that is told them, and is right in the end."""
        digest: Any = xxhash.xxh3_128() if self._entry is not None else _Sums(self._place, self._summed)
        head = bytearray(len(self._head))
        with self._store.open(self._path) as source:
            source.expect([(0, source.size_bytes)], by_all=True)
            try:
                source.read_into(head)
                if source.size_bytes != self._size_bytes or bytes(head) != self._head:
                    raise DamagedCheckpoint(f"{self._place} changed while it was read")
                digest.update(head)
                yield source, digest
            except EOFError as error:
                raise DamagedCheckpoint(f"{self._place} changed while it was read: {error}") from error
        if self._entry is not None and digest.hexdigest() != self._entry.xxh3_128:
            raise DamagedCheckpoint(
                f"{self._place}: its bytes changed after the commit (the size is right, the xxh3-128 is not)"
            )


class _Sums:
    """A digest that is told a file from its start, and raises where the content of a record is not what it was."""

    def __init__(self, path: str, contents: Iterable[_Content]) -> None:
        self._path = path
        self._left = deque(sorted(contents))
        self._at = 0
        self._value = 0

    def update(self, data: Buffer) -> None:
        """``data`` comes next."""
        view = memoryview(data).cast("B")
        begin, end = self._at, self._at + len(view)
        self._at = end
        while self._left and self._left[0].begin < end:
            one = self._left[0]
            self._value = crc32(view[max(one.begin - begin, 0) : one.end - begin], self._value)
            if end < one.end:
                return
            if self._value != one.checksum:
                raise DamagedCheckpoint(
                    f"{self._path}: its bytes changed; the checksum of {ascii(one.name)} in it does not match"
                )
            self._value = 0
            self._left.popleft()


def _contents(records: Mapping[str, Record]) -> dict[str, _Content]:
    """Where the records lie that are not empty. Of the last one nobody knows: the directory follows.

    Raises:
        ValueError: where they are not laid out as ``torch.save`` does.
    """
    ordered = sorted(records, key=lambda name: records[name].header_at)
    found: dict[str, _Content] = {}
    for name, following in pairwise(ordered):
        one = records[name]
        is_long = max(one.size_bytes, one.header_at) >= _LONG
        end = records[following].header_at - (_LONG_SUM_BYTES if is_long else _SUM_BYTES)
        begin = end - one.size_bytes
        if one.method != UNPACKED or one.packed_bytes != one.size_bytes:
            raise ValueError(f"its record {ascii(name)[:80]} is compressed")
        if not one.size_bytes:
            continue
        if begin < one.header_at + HEADER.size + len(name.encode()):
            raise ValueError(f"its record {ascii(name)[:80]} has no place")
        found[name] = _Content(begin, end, one.checksum, name)
    return found
