"""Datasheets of GPUs."""

from typing import NamedTuple

from fastdit.config import InputError, nearest


class Card(NamedTuple):
    """Datasheet figures of one GPU."""

    name: str
    device: str  # the name in torch.cuda.get_device_name, of this card only
    bf16: float  # FLOP/s of tensor cores, dense, with fp32 sums
    fp32: float  # FLOP/s without tensor cores
    bandwidth: float  # bytes/s of the memory
    memory: float  # bytes
    link: float  # bytes/s to the other GPUs of the node in one direction: half of the number that NVIDIA prints
    source: str

    def peak(self, precision: str) -> float:
        """Return the FLOP/s in train.precision."""
        return self.bf16 if precision == "bf16" else self.fp32


# If a datasheet gives tensor-core rates with sparsity: half of them.
CARDS = {
    "a100": Card("A100 SXM 80 GB", "NVIDIA A100-SXM4-80GB", 312e12, 19.5e12, 2.039e12, 80e9, 300e9, "NVIDIA A100 datasheet (2021)"),
    "h100": Card("H100 SXM", "NVIDIA H100 80GB HBM3", 989.4e12, 67e12, 3.35e12, 80e9, 450e9, "NVIDIA H100 datasheet (2023)"),
    "h800": Card("H800 SXM", "NVIDIA H800", 989.4e12, 67e12, 3.35e12, 80e9, 200e9,
                 "as H100 SXM, with NVLink cut to 400 GB/s in both directions"),
    "h200": Card("H200 SXM", "NVIDIA H200", 989.4e12, 67e12, 4.8e12, 141e9, 450e9, "NVIDIA H200 datasheet (2024)"),
    "b200": Card("B200 SXM", "NVIDIA B200", 2250e12, 75e12, 8e12, 180e9, 900e9,
                 "NVIDIA HGX B200 datasheet (2025), an eighth of a board"),
    "rtx4090": Card("RTX 4090", "NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12, 1.008e12, 24e9, 32e9,
                    "NVIDIA Ada whitepaper (2022); PCIe 4.0 x16"),
    "rtx5090": Card("RTX 5090", "NVIDIA GeForce RTX 5090", 209.5e12, 104.8e12, 1.792e12, 32e9, 64e9,
                    "NVIDIA RTX Blackwell whitepaper (2025); PCIe 5.0 x16"),
}  # fmt: skip
GPUS_PER_NODE = 8
NETWORK = 50e9  # bytes/s per GPU and direction between nodes: one 400 Gb/s adapter each


def find_card(name: str) -> Card:
    """Return the row of CARDS for a --gpu, in any case, with spaces or hyphens. Raises InputError."""
    key = name.lower().replace(" ", "").replace("-", "")
    if key not in CARDS:
        raise InputError(f"--gpu {name} is unknown: {nearest(key, list(CARDS))}")
    return CARDS[key]


def card_of(device: str) -> Card | None:
    """Return the row of CARDS for a name in torch.cuda.get_device_name, or None. The whole name must be equal, because slower
    relatives share most of it."""
    return next((card for card in CARDS.values() if card.device == device), None)
