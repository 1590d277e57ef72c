"""ImageNet's class names."""

from fastdit.data import imagenet


def test_shipped_names_are_those_of_imagenet():
    names = imagenet.imagenet_names()
    assert len(names) == 1000 and names[0].startswith("tench") and names[207] == "golden retriever"
    wnids = [imagenet.FIRST, *(f"n02{i:06d}" for i in range(998)), imagenet.LAST]
    assert imagenet.are_imagenet(wnids) and not imagenet.are_imagenet(wnids[:-1])
