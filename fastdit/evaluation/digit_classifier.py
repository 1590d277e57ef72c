"""A small classifier of the built-in digits: the feature network "digits", and the judge of whether a generated digit is right.

Its weights lie beside this file, so that every machine judges by the same network; `python -m fastdit.evaluation.digit_classifier`
trains them again.
"""

import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdit.data.builtin import mnist5k
from fastdit.files import replacing

WEIGHTS = Path(__file__).with_name("digit_classifier.safetensors")
WIDTH = 128  # feature width


class Classifier(nn.Module):
    """Three convolutions, each halving the image, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise((1, 32, 64, WIDTH)):
            layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers)
        self.output = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(WIDTH * 16, 10))
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]: torch's overloads lack it

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features fp32 [n,WIDTH], the mean of the last activations over the image, and logits fp32 [n,10] of images uint8
        [n,1,32,32]."""
        maps = self.layers((images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last))
        return maps.mean((2, 3)), self.output(maps)


def load() -> Classifier:
    """Return the classifier with its trained weights, in eval mode."""
    net = Classifier()
    net.load_state_dict(load_file(WEIGHTS))
    return net.eval().requires_grad_(False)


def train_classifier(epochs: int = 8, seed: int = 0) -> Classifier:
    """Return a classifier trained on the real training digits, shifted by up to two pixels: some 10 s on two cores."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = mnist5k("train")
    images, labels = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Classifier()
        batch = 100
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * len(images) // batch)
        for _ in range(epochs):
            for chosen in torch.randperm(len(images), generator=generator).view(-1, batch):
                dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
                loss = F.cross_entropy(net(images[chosen].roll((dy, dx), (2, 3)))[1], labels[chosen], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return net.eval()


@torch.inference_mode()
def accuracy(net: Classifier, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of images uint8 [n,32,32,1] that the classifier assigns to their labels, int [n]."""
    guesses = [net(part)[1].argmax(1) for part in torch.from_numpy(images).permute(0, 3, 1, 2).split(500)]
    return (torch.cat(guesses) == torch.from_numpy(labels)).float().mean().item()


def main() -> None:
    """Train the classifier and replace its weights: features of one training are not comparable with those of another."""
    net = train_classifier()
    with replacing(WEIGHTS) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, temporary)
    print(f"{WEIGHTS}: right on {accuracy(net, *mnist5k('val')):.1%} of the held-out digits")


if __name__ == "__main__":
    main()
