"""Sources of every kind: the images in them, their labels and sizes, and damaged archives."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

import pictures
from benchmarks import photographs
from commands import complains
from fastdit.data import archives as archives_module
from fastdit.data import prepare
from fastdit.data.index import FILE, open_index


def test_folders_and_tars_give_the_same_images(full_index, tmp_path):
    """As class folders, as one tar of them, and as webdataset tars with .cls and .json files."""
    rows = full_index.rows("train")
    loose, flat, shards = {}, {}, [{}, {}]
    for i, row in enumerate(rows):
        name, label, data = row["name"].decode(), int(row["label"]), full_index.read(row)
        (tmp_path / "folders" / full_index.classes[label]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folders" / full_index.classes[label] / name).write_bytes(data)
        loose[full_index.classes[label], name] = flat[f"./train/{full_index.classes[label]}/{name}"] = data
        beside = {".cls": str(label)} if i % 2 else {".json": json.dumps({"width": 1, "label": label})}
        key = f"{i:04d}"
        items = [(f"{key}.jpg", data), *((key + end, text.encode()) for end, text in beside.items())]
        shards[i % 2] |= dict(items if i % 3 else reversed(items))  # the label may come before the image
    (tmp_path / "flat.tar").write_bytes(photographs.tar_of(flat))
    (tmp_path / "shards").mkdir()
    for i, files in enumerate(shards):
        (tmp_path / "shards" / f"{i}.tar").write_bytes(photographs.tar_of(files))
    wanted = sorted((full_index.classes[int(row["label"])], full_index.read(row)) for row in rows)
    for source in ("folders", "flat.tar", "shards"):
        found = open_index(prepare.prepare([tmp_path / source]))
        names = [str(i) for i in range(5)] if source == "shards" else full_index.classes
        assert found.classes == names and found.class_names is None
        assert found.folder == tmp_path / f"{source}.index"
        assert sorted((full_index.classes[int(row["label"])], found.read(row)) for row in found.rows("train")) == wanted
        for row in found.rows("train"):
            assert Image.open(io.BytesIO(found.read(row))).size == (row["width"], row["height"])


def test_long_names(tmp_path):
    """pax and GNU headers: names beyond the 100 letters of a tar header."""
    name, data = "n" * 120 + "/" + "é" * 90 + ".jpg", photographs.encoded(next(photographs.crops(1)))
    (tmp_path / "long.tar").write_bytes(photographs.tar_of({name: data, "short/a.jpg": data}))
    found = open_index(prepare.prepare([tmp_path / "long.tar"]))
    assert found.classes == ["n" * 120, "short"] and found.rows("train")["name"][0].decode() == name
    assert all(found.read(row) == data for row in found.rows("train"))


def test_splits_inside_of_a_tar_or_a_class_folder_are_not_mixed(tmp_path, capsys):
    names = [f"{split}/{label}/0.jpg" for split in ("train", "valid") for label in "ab"]
    (tmp_path / "t.tar").write_bytes(photographs.tar_of({f"./data/{name}": pictures.encoded(i) for i, name in enumerate(names)}))
    pictures.write(tmp_path, *(f"f/{label}/{split}/0.jpg" for split in ("train", "test") for label in "ab"))
    for source, place in (("t.tar", "t.tar/data holds train/ and valid/"), ("f", "f/a holds train/ and test/")):
        complains(capsys, ["prepare", tmp_path / source], place, "which would be mixed", "--val")
        assert not (tmp_path / f"{source}.index" / FILE).exists()


def test_class_folders_of_a_tar_in_several_folders_are_told(tmp_path, capsys):
    names = ["data/a/x/0.jpg", "data/b/x/0.jpg", "data/c/0.jpg"]
    (tmp_path / "t.tar").write_bytes(photographs.tar_of({name: pictures.encoded(i) for i, name in enumerate(names)}))
    assert open_index(prepare.prepare([tmp_path / "t.tar"])).classes == ["c", "x"]
    assert "innermost folder, also where those lie in several, here data and data/a" in capsys.readouterr().err
    (tmp_path / "u.tar").write_bytes(photographs.tar_of({name: pictures.encoded() for name in ("data/a/0.jpg", "data/b/0.jpg")}))
    prepare.prepare([tmp_path / "u.tar"])
    assert "innermost" not in capsys.readouterr().err


def test_a_tar_without_classes_is_one_class(tmp_path, capsys):
    for split in ("train", "val"):
        files = {f"./{i}.jpg": pictures.encoded(i) for i in range(3)} | {"./1.txt": b"a cat"}
        (tmp_path / f"{split}.tar").write_bytes(photographs.tar_of(files))
    found = open_index(prepare.prepare([tmp_path / "train.tar"], val=tmp_path / "val.tar"))
    assert found.classes == ["images"] and [len(found.rows(split)) for split in ("train", "val")] == [3, 3]
    assert "no train image has a class folder" in capsys.readouterr().err
    pictures.write(tmp_path, "f/a/0.jpg", "f/b/0.jpg")  # of two classes it may be either
    complains(capsys, ["prepare", tmp_path / "f", "--val", tmp_path / "val.tar"], "image ./0.jpg has no class")


def test_links_in_a_tar_are_told_and_suffixes_have_any_case(tmp_path, capsys):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, data in (
            ("0.JPG", pictures.encoded()),
            ("0.CLS", b"3"),
            ("1.jpg", pictures.encoded(1)),
            ("1.Json", b'{"cls": 5}'),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, kind in (("2.jpg", tarfile.LNKTYPE), ("3.jpg", tarfile.SYMTYPE), ("4.cls", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "0.JPG"
            tar.addfile(member)
    assert open_index(prepare.prepare([tmp_path / "t.tar"])).classes == ["3", "5"]
    assert "left out in the archives: 2 links to images;" in capsys.readouterr().err


def test_hidden_files_in_tars_are_neither_images_nor_labels(tmp_path, capsys, monkeypatch):
    """As macOS packs a folder: an AppleDouble file before each file, also between an image and its label."""
    files = {}
    for i in range(5):
        files |= {f"./._{i}.jpg": b"x", f"./{i}.jpg": pictures.encoded(i), f"./._{i}.cls": b"x", f"./{i}.cls": b"7"}
        files |= {f"__MACOSX/._{i}.jpg": b"x", f"./.cache/{i}.jpg": pictures.encoded(i), f"./{i}.gif": b"x", f"./{i}.txt": b"a cat"}
    (tmp_path / "mac.tar").write_bytes(photographs.tar_of(files))
    for chunk in (4096, 2, 1):
        monkeypatch.setattr(archives_module, "CHUNK", chunk)
        found = open_index(prepare.prepare([tmp_path / "mac.tar"], tmp_path / f"{chunk}.index"))
        assert found.classes == ["7"] and [row["name"] for row in found.rows("train")] == [f"./{i}.jpg".encode() for i in range(5)]
        assert json.loads((found.folder / FILE).read_text())["bad_files"] == 0
        said = capsys.readouterr().err
        assert "left out in the archives: 5 .gif, 5 .txt, 5 images in hidden folders; only .bmp" in said, said


def test_hidden_files_before_inner_tars(tmp_path):
    inner = {name: photographs.tar_of({"0.jpg": pictures.encoded()}) for name in ("cat", "dog")}
    files = {"./._cat.tar": b"x", "./cat.tar": inner["cat"], "./._dog.tar": b"x", "dog.tar": inner["dog"], "__MACOSX/z.tar": b"x"}
    (tmp_path / "outer.tar").write_bytes(photographs.tar_of(files))
    assert open_index(prepare.prepare([tmp_path / "outer.tar"])).classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("beside", "name"),
    [
        ({"x.cls": b" 7\n"}, "7"),
        ({"x.json": b'{"label": null, "cls": 3}'}, "3"),
        ({"x.json": b'{"label": 0}'}, "0"),
        ({"x.json": b'{"label": null}'}, "folder"),
        ({"x.json": b"[1]"}, "folder"),
        ({"x.cls": "٣".encode()}, "٣"),
        ({"x.cls": b"9" * 5000}, "9" * 5000),
        ({"x.cls": b"\xff"}, None),
        ({"x.json": b"{"}, None),
        ({"x.json": b'{"label": [1, 2]}'}, None),
        ({"x.json": b'{"label": "\\ud800"}'}, None),
    ],
)
def test_labels_beside_an_image(tmp_path, beside, name):
    """A label that is no name or number makes its image a bad file; one that is missing leaves the folder's name."""
    other = {"folder/y.jpg": pictures.encoded(), "folder/y.cls": b"other"}
    files = {"folder/x.jpg": pictures.encoded(1), **{f"folder/{key}": data for key, data in beside.items()}, **other}
    (tmp_path / "x.tar").write_bytes(photographs.tar_of(files))
    found = open_index(prepare.prepare([tmp_path / "x.tar"]))
    assert set(found.classes) == {"other"} | ({name} if name else set())
    assert json.loads((found.folder / FILE).read_text())["bad_files"] == (name is None)


def test_bad_archives_are_one_sentence(archives, tmp_path, capsys):
    train, val, devkit = archives
    data = train.read_bytes()
    (tmp_path / "half.tar").write_bytes(data[: len(data) // 2])
    complains(capsys, ["prepare", tmp_path / "half.tar"], "half.tar", "cut off or damaged", "fetch it again")
    at = data.rfind(b"_3.JPEG")  # in a header: its checksum is wrong then
    (tmp_path / "header.tar").write_bytes(data[:at] + b"_9" + data[at + 2 :])
    complains(capsys, ["prepare", tmp_path / "header.tar"], "header.tar", "cut off or damaged", "at byte")
    (tmp_path / "text.tar").write_text("no archive" * 1000)
    complains(capsys, ["prepare", tmp_path / "text.tar"], "text.tar is not a tar archive")
    complains(capsys, ["prepare", devkit], "uncompressed .tar")
    complains(capsys, ["prepare", tmp_path / "nowhere.tar"], "nowhere.tar", "cannot be read", "No such file")
    (tmp_path / "empty").mkdir()
    complains(capsys, ["prepare", tmp_path / "empty"], "neither class folders nor .tar, .parquet archives")
    (tmp_path / "folder" / "a").mkdir(parents=True)
    complains(capsys, ["prepare", tmp_path / "folder"], "there are no images")
    complains(capsys, ["prepare", train, "--val", val, "--out", tmp_path / "i"], "has no class", "--devkit")
    complains(capsys, ["prepare", train, "--devkit", train, "--out", tmp_path / "i"], "is not ILSVRC2012_devkit_t12.tar.gz")
    assert not list(tmp_path.glob(f"*/{FILE}"))


def test_another_kind_of_archive_is_one_entry(tmp_path, monkeypatch):
    """Images one after the other, with their lengths in the first line of the file."""

    def containers(number, source):
        yield archives_module.Container(number, 0, source.size, "only")

    def scan(path, container, start):
        data = Path(path).read_bytes()
        at, images = data.index(b"\n") + 1, []
        for i, length in enumerate(json.loads(data[:at])):
            images.append(archives_module.entry(str(i), at, data[at : at + length], container.label))
            at += length
        return archives_module.Chunk(images, [], None)

    monkeypatch.setitem(archives_module.KINDS, "bag", archives_module.Kind(".bag", containers, scan))
    images = [photographs.encoded(image) for image in photographs.crops(3)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.bag").write_bytes(json.dumps([len(data) for data in images]).encode() + b"\n" + b"".join(images))
    index = open_index(prepare.prepare([tmp_path / "in"]))
    assert index.sources[0].kind == "bag" and index.classes == ["only"]
    assert [index.read(row) for row in index.rows("train")] == images
