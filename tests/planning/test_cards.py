"""The table of datasheets: names of devices and of --gpu."""

import pytest

from fastdit.config import InputError
from fastdit.planning import cards


def test_a_devices_card_is_found_by_its_whole_name():
    assert cards.card_of("NVIDIA A100-SXM4-80GB") == cards.CARDS["a100"] and cards.card_of("NVIDIA H200") == cards.CARDS["h200"]
    slower = ("NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    assert not any(map(cards.card_of, (*slower, "AMD EPYC, 2 threads", "")))
    assert len({card.device for card in cards.CARDS.values()}) == len(cards.CARDS)


@pytest.mark.parametrize(("name", "key"), [("h100", "h100"), ("H100", "h100"), ("RTX 4090", "rtx4090"), ("rtx-5090", "rtx5090")])
def test_a_card_is_found_by_its_name_in_any_spelling(name, key):
    assert cards.find_card(name) is cards.CARDS[key]


def test_an_unknown_card_names_the_nearest():
    with pytest.raises(InputError, match="--gpu h1000 is unknown: did you mean 'h100'"):
        cards.find_card("h1000")


def test_the_peak_is_that_of_the_precision():
    card = cards.CARDS["h100"]
    assert (card.peak("bf16"), card.peak("fp32")) == (989.4e12, 67e12)
