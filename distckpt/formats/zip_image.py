"""The file that ``torch.save`` would write of a value, laid out before the bytes of its tensors are there."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import xxhash

from distckpt.formats import Image
from distckpt.formats.tensor_pickle import TensorPickler
from distckpt.formats.zip_archive import ZipArchive

# Large tensors begin on a page, so that they can be mapped into memory well. Of small ones most of the file would be
# padding then.
_SMALL_ALIGNMENT, _LARGE_ALIGNMENT = 64, 4096
_LARGE_MEAN_BYTES = 256 * 1024

_SERIAL_BYTES = 40  # of a number for logs. torch makes it of checksums of all data; here it is one of what is no tensor


def lay_out(value: object) -> Image:
    """The image of the file that ``torch.save(value, path)`` would write, had the tensors been contiguous and on the
    host; see `ZipLayout.lay_out`."""
    return ZipLayout().lay_out(value)


class ZipLayout:
    """Lays out values, each faster if it is like the one before: what it remembers depends on the dtypes, shapes and
    number of tensors, but it keeps none of them. Several threads may use it at once.
    """

    def __init__(self) -> None:
        self._pickler = TensorPickler()
        self._records = _Records(0, [])

    def lay_out(self, value: object) -> Image:
        """The image of ``value``, with the path ``""``. What is no tensor is copied.

        Tensors that are tied have one place. A view has one that holds only what it shows. Tensors without elements
        have none.

        Raises:
            TypeError: naming the place of what cannot be saved.
        """
        pickled = self._pickler.pickle(value)
        records = self._records
        if (len(pickled.data), pickled.sizes) != (records.pickle_bytes, records.sizes):
            records = self._records = _Records(len(pickled.data), pickled.sizes)
        serial = str(xxhash.xxh3_128_intdigest(pickled.data)).zfill(_SERIAL_BYTES).encode()
        texts = [*records.archive.texts, (records.pickle_at, pickled.data), (records.serial_at, serial)]
        tensors = [tensor for tensor, size_bytes in zip(pickled.tensors, pickled.sizes, strict=True) if size_bytes]
        archive = records.archive
        return Image("", archive.size_bytes, texts, tensors, records.filled_at, sums=archive.sums)


class _Records:
    """The records that ``torch.save`` writes, in its order, for a pickle and tensors of these sizes."""

    def __init__(self, pickle_bytes: int, sizes: Sequence[int]) -> None:
        self.pickle_bytes = pickle_bytes
        self.sizes = sizes
        is_large = bool(sizes) and sum(sizes) >= _LARGE_MEAN_BYTES * len(sizes)
        alignment = _LARGE_ALIGNMENT if is_large else _SMALL_ALIGNMENT
        self.archive = ZipArchive(alignment)
        self.pickle_at = self.archive.add("data.pkl", pickle_bytes)
        self.archive.add_text(".format_version", b"1")
        self.archive.add_text(".storage_alignment", str(alignment).encode())
        self.archive.add_text("byteorder", sys.byteorder.encode())
        self.tensors_at = [self.archive.add(f"data/{nth}", size_bytes) for nth, size_bytes in enumerate(sizes)]
        self.filled_at = [at for at, size_bytes in zip(self.tensors_at, sizes, strict=True) if size_bytes]
        self.archive.add_text("version", b"3\n")
        self.serial_at = self.archive.add(".data/serialization_id", _SERIAL_BYTES)
        self.archive.finish()
