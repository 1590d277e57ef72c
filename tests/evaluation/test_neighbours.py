"""Likeness to the training set: copies are flagged, new pictures are not; the nearest images are those of a plain search."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from commands import complains
from fastdit import cli, data
from fastdit.data.builtin import mnist5k
from fastdit.distributed import World
from fastdit.evaluation import features, image_sets, metrics, neighbours
from fastdit.evaluation.kept import Kept

ALONE = World(0, 1, torch.device("cpu"), None)
TRAIN, VAL = mnist5k("train")[0], mnist5k("val")[0]


def likeness(samples, training, shown=3):
    network = features.load("digits", ALONE.device)
    network.probe(training.shape[1:])
    vectors = torch.cat([each.features for each in network(samples)])
    ids = list(range(shown))
    summary = metrics.Summary(vectors.mean(0), vectors.T.cov(), features=vectors)
    training = image_sets.of_array(training, None, {})
    return neighbours.likeness(summary, ids, {i: samples[i] for i in ids}, training, False, network, ALONE)


def test_copies_are_flagged_and_new_pictures_are_not():
    """Of held-out digits about the quantile's share is near; of copies with noise all, also if the set holds pictures twice."""
    few = TRAIN[::225]  # 20
    noise = np.random.default_rng(0).normal(0, 8, (60, 32, 32, 1))
    copies = (few[np.arange(60) % 20] + noise).round().clip(0, 255).astype(np.uint8)
    for training in (few, np.concatenate((few, few[:7]))):
        about, picture = likeness(copies, training)
        assert about["repeats"] and about["nearer"] > 0.9, about
    assert picture.size == (2 * 36 + 7 * 34 + 8, 3 * 34 + 2)
    about, _ = likeness(VAL[::2], TRAIN[::15])
    assert not about["repeats"] and about["nearer"] < 0.15, about  # 5 %, of 250: a standard deviation of 2 %


def test_the_nearest_images_are_those_of_a_plain_search(monkeypatch):
    """Mirrored ones too, in batches of any size."""
    monkeypatch.setattr(image_sets, "BATCH", 7)
    training, samples = TRAIN[:900:30], VAL[::100].copy()
    samples[:3] = samples[:3, :, ::-1]
    network = features.load("digits", ALONE.device)
    network.probe(training.shape[1:])
    vectors = lambda images: torch.cat([each.features for each in network(images)]).double()
    gaps = torch.stack([torch.cdist(vectors(samples), vectors(view)) for view in (training, training[:, :, ::-1])])
    source = image_sets.of_array(training, None, {})
    parts, near = neighbours._read(source, network, vectors(samples), True, ALONE)
    assert torch.cat([*parts.values()], 1).shape == (2, 30, 128)
    mirrored = 0
    for row, found in enumerate(near):
        wanted = gaps.amin(0)[row].argsort()[: neighbours.NEAREST]
        assert [each.id for each in found] == wanted.tolist()
        for each in found:
            view = int(gaps[:, row, each.id].argmin())
            mirrored += view
            assert np.array_equal(each.image, training[each.id][:, ::-1] if view else training[each.id])
            assert each.square == pytest.approx(float(gaps[view, row, each.id]) ** 2, rel=1e-5)
    assert 0 < mirrored < 5 * neighbours.NEAREST


def test_evaluate_shows_neighbours_also_after_an_interruption(trained, reference, tmp_path, monkeypatch, capsys):
    digits = image_sets.of_array(TRAIN[::45], None, {"kind": "builtin"})
    monkeypatch.setattr(neighbours, "training_images", lambda config, world: digits)
    words = [
        "evaluate",
        str(trained),
        "--features",
        "digits",
        "--reference",
        str(reference),
        "--samples",
        "150",
        "--labels",
        "random",
    ]
    assert cli.main([*words, "--neighbours", "4", "--out", str(tmp_path / "whole.json")]) == 0
    assert "of the samples are nearer to a training image" in capsys.readouterr().out
    about = json.loads((tmp_path / "whole.json").read_text())["neighbours"]
    assert about["shown"] == 4 and about["training"]["images"] == 100 and 0 <= about["nearer"] <= 1
    write = Kept._write

    def interrupted(self, *arguments):
        write(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Kept, "_write", interrupted)
    again = [*words, "--neighbours", "4", "--out", str(tmp_path / "e.json")]
    assert cli.main(again) == 130
    monkeypatch.setattr(Kept, "_write", write)
    assert cli.main(again) == 0
    assert json.loads((tmp_path / "e.json").read_text())["neighbours"] == about
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.neighbours.png")) for name in ("whole", "e")]
    assert np.array_equal(*pictures) and pictures[0].shape == (4 * 34 + 2, 2 * 36 + 7 * 34 + 8, 3)
    monkeypatch.undo()
    monkeypatch.setattr(data, "locate", lambda config: tmp_path / "gone")
    complains(capsys, [*words, "--neighbours", "4"], f"index {tmp_path / 'gone'} does not exist")
    complains(capsys, [*words, "--neighbours", "0"], "--neighbours 0", "between 1 and 1000")
    complains(capsys, ["evaluate", "mnist5k", *words[2:6], "--neighbours", "4"], "--neighbours is for samples of a checkpoint")


@pytest.mark.slow
def test_a_run_on_20_pictures_is_flagged(tmp_path, capsys):
    """By its own training images, found through its settings. A quickstart run, of 4,500 digits, has 1 to 4 % near."""
    for i, image in enumerate(TRAIN[::225]):
        path = tmp_path / "pictures" / str(i // 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    settings = [
        "model.preset=test/4", f"data.source={tmp_path / 'pictures'}", "data.grey=true", "train.total_steps=1500",
        "train.batch_size=20", "train.lr=4e-3", "train.beta2=0.95", "train.schedule=constant", "train.ema_decay=0.99",
        "train.sample_steps=0", "train.save_steps=1500", f"train.out={tmp_path}", "train.name=few",
    ]  # fmt: skip
    assert cli.main(["train", *settings]) == 0
    words = [
        "--features",
        "digits",
        "--samples",
        "100",
        "--solver",
        "dpm++",
        "--steps",
        "8",
        "--guidance",
        "0",
        "--neighbours",
        "4",
    ]
    assert cli.main(["evaluate", str(tmp_path / "few"), *words, "--out", str(tmp_path / "e.json")]) == 0
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["neighbours"]["repeats"] and result["neighbours"]["training"]["images"] == 20, result["neighbours"]
    assert "the run repeats its training images" in capsys.readouterr().err
