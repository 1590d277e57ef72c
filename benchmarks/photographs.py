"""Real photographs that installed packages carry, cut to about 500x375 pixels like ImageNet's, and archives of them."""

import importlib.metadata
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

FILES = {
    "scikit-image": [
        f"skimage/data/{name}"
        for name in ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "motorcycle_left.png", "rocket.jpg")
    ],
    "scikit-learn": ["sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg"],
}


def photographs() -> list[Image.Image]:
    """Return the photographs as RGB images, without importing the packages."""
    paths = [importlib.metadata.distribution(package).locate_file(file) for package, files in FILES.items() for file in files]
    return [Image.open(path).convert("RGB") for path in paths]


def crops(count: int, seed: int = 0) -> Iterator[Image.Image]:
    """Yield `count` cuts of 300 to 500 pixels per side, landscape and portrait, odd sizes too."""
    random, originals = np.random.default_rng(seed), photographs()
    for i in range(count):
        original = originals[i % len(originals)]
        long, short = random.integers(440, 501), random.integers(330, 376)
        width, height = (long, short) if i % 3 else (short, long)
        width, height = min(width, original.width), min(height, original.height)
        left, top = random.integers(original.width - width + 1), random.integers(original.height - height + 1)
        yield original.crop((left, top, left + width, top + height))


def encoded(image: Image.Image, **options) -> bytes:
    """Return an image as a JPEG of quality 90, or as `options` of Image.save say."""
    file = io.BytesIO()
    image.save(file, **{"format": "JPEG", "quality": 90, **options})
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def tar_of(files: dict[str, bytes]) -> bytes:
    """Return a tar archive of files by name."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            add(tar, name, data)
    return out.getvalue()


def write_parquet(path: Path, images: list[bytes | None], labels: list[int | None], names: list[str] | None, rows: int) -> None:
    """Write images as the library `datasets` does, in row groups of `rows` images. names: of the classes, in the schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    label = {"names": names, "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    structs = [None if data is None else {"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images)]
    kinds = {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()}
    table = pa.table({"image": structs, "label": labels}, pa.schema(kinds, {"huggingface": json.dumps(info)}))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)


def odd_files(images: Iterator[Image.Image]) -> dict[str, bytes]:
    """Return unusual files as ImageNet holds some, by a word for the name; those that begin with "bad" cannot be decoded."""
    jpeg = encoded(next(images))
    return {
        "png": encoded(next(images), format="PNG"), "cmyk": encoded(next(images).convert("CMYK")),
        "grey": encoded(next(images).convert("L")), "progressive": encoded(next(images), progressive=True),
        "trailing": encoded(next(images)) + b"\0\0garbage", "bad_truncated": jpeg[: len(jpeg) // 2], "bad_empty": b"",
        "bad_text": b"no image at all", "bad_end": jpeg[:-2],
    }  # fmt: skip


def imagenet(folder: Path, classes: int = 5, each: int = 6, val: int = 8) -> tuple[Path, Path, Path]:
    """Write a train archive, a validation archive and a development kit in ImageNet's format; the odd files are in class 1.

    Class i has wnid n{(i*7+3) % 10:08d}…, so that the order in the archive is not that of the labels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wnids = [f"n{(i * 7 + 3) % 10:02d}{i:06d}" for i in range(classes)]
    images = crops(10_000)
    inner = {}
    for i, wnid in enumerate(wnids):
        files = {f"{wnid}_{j}.JPEG": encoded(next(images)) for j in range(each)}
        if i == 1:
            files |= {f"{wnid}_{word}.JPEG": data for word, data in odd_files(images).items()}
        inner[f"{wnid}.tar"] = tar_of(files)
    train, val_tar, devkit = folder / "ILSVRC2012_img_train.tar", folder / "ILSVRC2012_img_val.tar", folder / "devkit_t12.tar.gz"
    train.write_bytes(tar_of(inner))
    val_tar.write_bytes(tar_of({f"ILSVRC2012_val_{i + 1:08d}.JPEG": encoded(next(images)) for i in range(val)}))
    kind = [
        ("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "f8"), ("children", "O"),
        ("wordnet_height", "f8"), ("num_train_images", "f8"),
    ]  # fmt: skip
    rows = [(i + 1, wnid, f"thing {i}, item {i}", "a thing", 0, np.zeros((1, 0)), 0, each) for i, wnid in enumerate(wnids)]
    rows.append((classes + 1, "n99999999", "entity", "the root", classes, np.arange(1, classes + 1), 9, 0))
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array(rows, kind).reshape(-1, 1)}, do_compression=True)
    truth = "".join(f"{i * 3 % classes + 1}\n" for i in range(val)).encode()
    with tarfile.open(devkit, "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth)
    return train, val_tar, devkit


def kaggle(folder: Path, classes: int = 3, each: int = 2, val: int = 6) -> Path:
    """Write ImageNet as Kaggle's archive holds it, unzipped, and return its CLS-LOC. Validation image i has class i % classes."""
    data, images = folder / "ILSVRC/Data/CLS-LOC", crops(10_000)
    wnids = [f"n{i * 7 % 10:02d}{i:06d}" for i in range(classes)]
    files = {data / f"train/{wnid}/{wnid}_{j}.JPEG": encoded(next(images)) for wnid in wnids for j in range(each)}
    name = "ILSVRC2012_{}_{:08d}"
    files |= {data / f"val/{name.format('val', i)}.JPEG": encoded(next(images)) for i in range(1, val + 1)}
    files |= {data / f"test/{name.format('test', i)}.JPEG": encoded(next(images)) for i in range(1, 3)}
    files[folder / "ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml"] = b"<annotation/>"
    files[folder / "ILSVRC/ImageSets/CLS-LOC/val.txt"] = b"ILSVRC2012_val_00000001 1\n"
    truth = [f"{name.format('val', i)},{wnids[i % classes]} 1 2 30 40 {wnids[i % classes]} 5 6 70 80 \n" for i in range(val, 0, -1)]
    files[folder / "LOC_val_solution.csv"] = "".join(["ImageId,PredictionString\n", *truth]).encode()
    files[folder / "LOC_synset_mapping.txt"] = "".join(f"{wnid} thing {i}, item {i}\n" for i, wnid in enumerate(wnids)).encode()
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return data
