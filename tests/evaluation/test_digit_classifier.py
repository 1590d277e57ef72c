"""The judge of generated digits: its weights are the file's, and it knows real digits."""

import numpy as np
import torch

from fastdit.data.builtin import mnist5k
from fastdit.evaluation import digit_classifier


def test_it_recognises_held_out_digits_and_no_noise():
    net = digit_classifier.load()
    images, labels = mnist5k("val")
    assert digit_classifier.accuracy(net, images, labels) > 0.96
    noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    assert digit_classifier.accuracy(net, noise, labels) < 0.3


def test_features_are_the_mean_of_the_last_maps():
    net = digit_classifier.load()
    images = torch.from_numpy(mnist5k("val")[0][:3]).permute(0, 3, 1, 2)
    features, logits = net(images)
    assert features.shape == (3, digit_classifier.WIDTH) and logits.shape == (3, 10)
    maps = net.layers(images.float() / 127.5 - 1)
    torch.testing.assert_close(features, maps.mean((2, 3)))


def test_training_from_a_seed_gives_a_classifier_that_works():
    net = digit_classifier.train_classifier(epochs=1, seed=1)
    assert digit_classifier.accuracy(net, *mnist5k("val")) > 0.8
