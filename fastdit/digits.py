"""The small classifier of the built-in digits: does a generated digit look like the class that was asked for?"""

import argparse
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.data.builtin import mnist5k


def _pixels(images: np.ndarray) -> Tensor:
    """uint8 [n,32,32,1] -> fp32 [n,1,32,32] in [-1,1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_classifier(epochs: int = 8, seed: int = 0) -> nn.Module:
    """A small conv net trained on the real training digits, shifted by up to two pixels: some 10 s on two cores.

    Takes fp32 [n,1,32,32] in [-1,1], returns logits [n,10].
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = mnist5k("train")
    images, labels = _pixels(images), torch.from_numpy(labels)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        widths = (1, 32, 64, 128)
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(widths):
            layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
        net = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 16, 10)).to(memory_format=torch.channels_last)
        batch = 100
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * len(images) // batch)
        for _ in range(epochs):
            for chosen in torch.randperm(len(images), generator=generator).view(-1, batch):
                dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
                x = images[chosen].roll((dy, dx), (2, 3)).contiguous(memory_format=torch.channels_last)
                loss = F.cross_entropy(net(x), labels[chosen], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return net.eval()


@torch.inference_mode()
def accuracy(net: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images (uint8 [n,32,32,1]) that the classifier assigns to their labels (int [n])."""
    hits = [
        (net(x).argmax(1) == y).float()
        for x, y in zip(_pixels(images).split(500), torch.from_numpy(labels).split(500), strict=True)
    ]
    return torch.cat(hits).mean().item()


def main() -> None:
    """python -m fastdit.digits SAMPLES.npz: judge the samples that `fastdit sample --npz` wrote."""
    parser = argparse.ArgumentParser(prog="python -m fastdit.digits", description=main.__doc__)
    parser.add_argument("npz", help="arr_0: images uint8 [n,32,32,1], arr_1: the classes asked for")
    samples = np.load(parser.parse_args().npz)
    net = train_classifier()
    real = accuracy(net, *mnist5k("val"))
    found = accuracy(net, samples["arr_0"], samples["arr_1"])
    print(
        f"{found:.1%} of {len(samples['arr_1'])} samples are recognised as the digit asked for (real held-out digits: {real:.1%})"
    )


if __name__ == "__main__":
    main()
