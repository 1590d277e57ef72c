"""Images in Parquet files, as the Hugging Face Hub stores data sets: a column of images, and a column of their labels.

An image column is a struct with a field "bytes", or plain bytes. A label column holds whole numbers, whose names are in the file's
schema (the key "huggingface", which the library `datasets` writes) or in the data set's card, README.md; or it holds text. An image
is found by its row in the file. Parquet has no access to a single row: reading one decodes its row group, of which the last ones
are kept. Imports nothing of the package but config; pyarrow is imported when the first file is opened.
"""

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml

from fastdit.config import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

CACHE = 1 << 29  # bytes of decoded row groups that a process keeps
BATCH = 64  # rows that are decoded at a time when a file is scanned
ONE_CLASS = "images"  # class of all images of a file without labels
LFS_POINTER = b"version https://git-lfs"  # what lies in place of a file that was cloned without Git LFS

# Names of columns, in the order in which they are preferred
IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
LABEL_NAMES = (
    "label", "labels", "class", "class_label", "class_id", "class_name", "cls", "fine_label", "category", "species", "target",
    "digit", "y", "coarse_label",
)  # fmt: skip


class Columns(NamedTuple):
    """The columns of a file that are read. Files of one data set must agree in them."""

    image: str  # path of the bytes in the schema: "image.bytes", or "image" if the column holds plain bytes
    label: str | None  # None if there is none: all images are one class
    names: tuple[str, ...] | None  # of the labels 0, 1, …, None if they are unknown or the labels are text


@dataclass(frozen=True)
class Footer:
    """What the footer of a Parquet file says."""

    metadata: "pq.FileMetaData"
    starts: np.ndarray  # int64 [row groups + 1]: the first row of each row group, and the number of rows
    columns: Columns
    notes: tuple[str, ...]  # sentences on what is used and what is not


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn pyarrow's errors on the contents of a file into an InputError. An OSError of the system, with its errno, passes."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise InputError(f"{path} is a Git LFS pointer, not the Parquet file: run `git lfs pull` in its folder") from error
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"Parquet file {path} is cut off or damaged ({reason}): fetch it again") from error


def _chosen(path: str, content: str, candidates: list[str], preferred: tuple[str, ...]) -> tuple[str | None, str | None]:
    """Return the column of some candidates that is used, None without one, and what to say if there are others. Raises InputError
    if no candidate is preferred."""
    if len(candidates) < 2:
        return next(iter(candidates), None), None
    by_rank = sorted(candidates, key=lambda name: preferred.index(name.lower()) if name.lower() in preferred else len(preferred))
    if by_rank[0].lower() not in preferred:
        raise InputError(
            f"{path} has several columns of {content}, {', '.join(candidates)}: rename the one that is meant to {preferred[0]!r}"
        )
    return by_rank[0], f"{content} are read from column {by_rank[0]!r} of {path}, not from {', '.join(map(repr, by_rank[1:]))}"


def _features(schema: "pa.Schema") -> dict[str, Any]:
    """Return the features by column that the library `datasets` wrote into a schema, {} without them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)} if isinstance(features, dict) else {}


def _image_path(column: "pa.Field") -> str | None:
    """Return the path of the bytes in a column of images, None if it holds none."""
    from pyarrow import types

    is_bytes = lambda kind: types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    if is_bytes(column.type):
        return column.name
    if types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0 and is_bytes(column.type.field("bytes").type):
        return f"{column.name}.bytes"
    return None


def _is_label(kind: "pa.DataType") -> bool:
    """Whether a column of this type names one class per row: by whole numbers or text."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _columns(path: str, schema: "pa.Schema") -> tuple[Columns, list[str]]:
    """Return the columns that are read, and what to say of the others. Raises InputError if they are missing or ambiguous."""
    from pyarrow import types

    features = _features(schema)
    images = {column.name: leaf for column in schema if (leaf := _image_path(column))}
    image, other_images = _chosen(path, "images", list(images), IMAGE_NAMES)
    if image is None:
        listed = ", ".join(f"{column.name} ({column.type})" for column in schema) or "none"
        raise InputError(
            f"{path} has no column of encoded images, bytes or a struct with a field 'bytes': its columns are {listed}"
        )
    labels = [
        column.name
        for column in schema
        if column.name not in images
        and (column.name.lower() in LABEL_NAMES or features.get(column.name, {}).get("_type") == "ClassLabel")
    ]
    label, other_labels = _chosen(path, "labels", labels, LABEL_NAMES)
    notes = [note for note in (other_images, other_labels) if note]
    if label is None:
        others = [column.name for column in schema if column.name not in images]
        unused = f", its columns {', '.join(others)} are not used" if others else ""
        notes.append(f"{path} has no column of labels ({', '.join(LABEL_NAMES[:3])}, …): its images are one class{unused}")
        return Columns(images[image], None, None), notes
    kind = schema.field(label).type
    if not _is_label(kind):
        raise InputError(f"column {label!r} of {path} has the type {kind}: labels are whole numbers or text, one per image")
    names = None
    if types.is_integer(kind):
        names = features.get(label, {}).get("names")
        if names is None:
            names, note = _card_names(Path(path), label)
            notes += [note] if note else []
    return Columns(images[image], label, tuple(map(str, names)) if names else None), notes


def _card_names(path: Path, label: str) -> tuple[list[str] | None, str | None]:
    """Return the names of a file's labels from the card of its data set, None without one, and what to say of a card of no use."""
    card = next((file for folder in list(path.parents)[:3] if (file := folder / "README.md").is_file()), None)
    if card is None:
        return None, None
    found = []
    try:
        _, head, *_ = card.read_text(errors="replace").split("---\n", 2)
        configs = yaml.load(head, Loader=yaml.BaseLoader)["dataset_info"]  # every scalar as text: a class may be called "no"
        for config in configs if isinstance(configs, list) else [configs]:
            for feature in config["features"]:
                if feature["name"] == label and "class_label" in feature["dtype"]:
                    names = feature["dtype"]["class_label"]["names"]
                    found.append([names[str(i)] for i in range(len(names))] if isinstance(names, dict) else names)
    except (ValueError, KeyError, TypeError, yaml.YAMLError):
        return None, f"{card} names no classes in dataset_info: they are shown as numbers"
    if any(names != found[0] for names in found):
        return None, f"{card} names the classes of column {label!r} in several ways: they are shown as numbers"
    return (found[0], None) if found else (None, None)


@lru_cache(maxsize=1024)  # files: some 100 KB each
def _footer(path: str, mtime_ns: int) -> Footer:
    """Read the footer of the file as it was at a time. Raises InputError, and OSError if the file cannot be opened."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(f"{path} is a Parquet file, which needs pyarrow: pip install pyarrow") from error
    with _reading(path), pa.OSFile(path) as file:
        opened = pq.ParquetFile(file)
        metadata = opened.metadata
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        schema = opened.schema_arrow
    columns, notes = _columns(path, schema)
    largest = max((metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)), default=0)
    if largest > CACHE:
        notes.append(
            f"{path} has row groups of up to {largest / 2**30:.1f} GiB, of which reading one image holds one in memory: write it "
            "again with smaller ones (row_group_size=100 of pyarrow.parquet.write_table), or use tars"
        )
    return Footer(metadata, np.cumsum([0, *counts]), columns, tuple(notes))


def _footer_now(path: str) -> Footer:
    return _footer(path, os.stat(path).st_mtime_ns)


def describe(paths: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return the class names by label of some files, {} if they are unknown, and what to say of their columns.

    Raises InputError if one is damaged or ambiguous, or if the files differ in their columns or class names.
    """
    if not paths:
        return {}, []
    first = _footer_now(paths[0])
    for path in paths[1:]:
        for key, mine, others in zip(Columns._fields, first.columns, _footer_now(path).columns, strict=True):
            if mine != others:
                word = {"image": "images in", "label": "labels in", "names": "classes named"}[key]
                raise InputError(
                    f"{paths[0]} has its {word} {_short(mine)}, {path} has its {word} {_short(others)}: give one data set at a time"
                )
    return {str(i): name for i, name in enumerate(first.columns.names or ())}, list(first.notes)


def _short(value: str | tuple[str, ...] | None) -> str:
    text = ", ".join(value) if isinstance(value, tuple) else value or "no column"
    return text if len(text) < 60 else f"{text[:59]}…"


def next_start(path: str, first: int, rows: int) -> int | None:
    """Return the first row of the row group that begins at least `rows` rows behind row `first`, None if that is the end."""
    starts = _footer_now(path).starts
    group = int(np.searchsorted(starts, first + rows))
    return int(starts[group]) if group < len(starts) - 1 else None


def scan(path: str, first: int, end: int | None) -> Iterator[tuple[int, bytes | None, str | int | None]]:
    """Yield (row, encoded image, label) of the row groups from row `first` to `end`, or to the last; None for what is null.

    The row groups are read page by page: of each, the memory holds some MB. Raises InputError.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    footer = _footer_now(path)
    groups = list(range(*np.searchsorted(footer.starts, [first, footer.starts[-1] if end is None else end])))
    leaf, label, names = footer.columns
    with _reading(path), pa.OSFile(path) as file:
        opened = pq.ParquetFile(file, metadata=footer.metadata, buffer_size=1 << 20)
        for batch in opened.iter_batches(BATCH, groups, [leaf, label] if label else [leaf], use_threads=False):
            at = batch.schema.get_field_index(label) if label else 1  # columns come in the order of the file
            images = _bytes_of(batch.column(1 - at))
            labels = batch.column(at).to_pylist() if label else [ONE_CLASS] * len(images)
            for image, value in zip(images, labels, strict=True):
                if names and isinstance(value, int) and value >= len(names):
                    raise InputError(
                        f"row {first} of {path} has the label {value}, but only {len(names)} classes have names: repair the names "
                        "in the file's schema or in the data set's README.md"
                    )
                yield first, image.as_py(), value
                first += 1


def _bytes_of(column: Any) -> Any:
    """Return the bytes of a column of images, an Array or a ChunkedArray."""
    import pyarrow.compute as pc
    from pyarrow import types

    return pc.call_function("struct_field", [column], pc.StructFieldOptions("bytes")) if types.is_struct(column.type) else column


@dataclass
class _Group:
    """A row group's images, which the first thread that needs them decodes."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    images: Any = None  # ChunkedArray of bytes, None before it is decoded


_groups: OrderedDict[tuple[str, int, int], _Group] = OrderedDict()  # (path, mtime, row group), the last one used at the end
_groups_lock = threading.Lock()


def read(path: str, mtime_ns: int, row: int) -> bytes:
    """Return the encoded image of a row; threads may call it at once. Raises InputError if the file is damaged, and OSError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    footer = _footer(path, mtime_ns)
    number = int(np.searchsorted(footer.starts, row, side="right")) - 1
    with _groups_lock:
        group = _groups.setdefault((path, mtime_ns, number), _Group())
        _groups.move_to_end((path, mtime_ns, number))
    with group.lock:
        if group.images is None:
            with _reading(path), pa.OSFile(path) as file:
                table = pq.ParquetFile(file, metadata=footer.metadata).read_row_group(
                    number, columns=[footer.columns.image], use_threads=False
                )
            group.images = _bytes_of(table.column(0))
            _drop_groups()
        images = group.images
    return images[row - int(footer.starts[number])].as_py() or b""


def clear() -> None:
    """Forget the decoded row groups."""
    with _groups_lock:
        _groups.clear()


def _drop_groups() -> None:
    """Drop the row groups whose last use is longest ago, down to CACHE bytes. A thread that still reads from one holds it."""
    with _groups_lock:
        sizes = {key: group.images.nbytes for key, group in _groups.items() if group.images is not None}
        total = sum(sizes.values())
        for key, size in list(sizes.items())[:-1]:
            if total <= CACHE:
                return
            del _groups[key]
            total -= size
