"""The launch table, how a backward is cut into programs, and the script that times candidates (without a GPU: its logic)."""

import hashlib
import importlib
import sys

import pytest
import torch

from fastdit.kernels import tuning

CPU = torch.device("cpu")
KERNELS = [f"{op}_{d}" for op in ("modulate", "gated_residual", "gated_residual_modulate") for d in ("forward", "backward")]


@pytest.fixture(autouse=True)
def any_machine(monkeypatch):
    """The launches of the interpreter, sm_90's, on a machine with a GPU too."""
    monkeypatch.setattr(tuning, "INTERPRETED", True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("width", [1, 64, 123, 384, 768, 1024, 1088, 1152, 1536, 2048, 8192])
def test_every_width_has_a_launch(kernel, width):
    """Powers of two that cover the row, eight elements a thread or more, and a table entry that goes first."""
    for arch in tuning.MULTIPROCESSORS:
        config = tuning.default_launch(kernel, width, arch)
        assert all(n & (n - 1) == 0 for n in (config.tile, config.tail, config.warps, config.rows))
        assert 1 <= config.warps <= 16 and config.blocks >= 1 and config.stages >= 1
        if "modulate" in kernel:
            assert config.tile + config.tail >= width and (not config.tail or config.tile < width)


# VERSION -> digest of the table
DIGESTS = {2: "fee8b3adb2ce1f0d"}


def table_digest() -> str:
    """SHA-256 of the launch parameters of every kernel, width and architecture, and of what else decides how sums are cut."""
    digest = hashlib.sha256(repr((sorted(tuning.TUNED.items()), tuning.MULTIPROCESSORS)).encode())
    for kernel in KERNELS:
        for arch in tuning.MULTIPROCESSORS:
            digest.update(repr([tuple(tuning.default_launch(kernel, width, arch)) for width in range(1, 8193)]).encode())
    return digest.hexdigest()[:16]


def test_a_change_of_the_table_raises_its_version():
    digest = table_digest()
    assert DIGESTS.get(tuning.VERSION) == digest, (
        f"the launch table has changed: raise tuning.VERSION and add {{VERSION: {digest!r}}} to DIGESTS"
    )


def test_a_kernel_without_launch_parameters_is_named():
    with pytest.raises(
        ValueError, match=r"^layer_norm_forward: kernels/tuning.py has no launch parameters for this kernel: add it"
    ):
        tuning.default_launch("layer_norm_forward", 384, 90)


def test_the_presets_have_no_dead_lanes_where_it_pays():
    assert tuning.two_tiles(1152) == (1024, 128) and tuning.two_tiles(1088) == (1024, 64)
    assert tuning.two_tiles(768) == (1024, 0) and tuning.two_tiles(384) == (512, 0)
    assert [tuning.column_tile(width) for width in (384, 768, 1088, 1152)] == [128, 256, 64, 128]


def test_a_tuned_launch_goes_before_the_default(monkeypatch):
    config = tuning.LaunchConfig(512, warps=1)
    monkeypatch.setattr(tuning, "TUNED", {("modulate_forward", 384, tuning.architecture(CPU)): config})
    tuning.launch_for.cache_clear()
    assert tuning.launch_for("modulate_forward", 384, CPU) is config
    assert tuning.launch_for("modulate_forward", 768, CPU) == tuning.default_launch("modulate_forward", 768, 90)
    tuning.launch_for.cache_clear()


def test_one_wave():
    """One full wave of programs, at least 8 rows each; one part, or four waves, for batches that fill the card by themselves."""
    for batch, tokens, blocks in ((8, 256, 4), (16, 256, 5), (32, 256, 5), (64, 256, 4), (256, 256, 7), (1, 7, 5), (5, 1024, 4)):
        parts, rows = tuning.chunks(batch, tokens, blocks, CPU)
        assert batch * parts <= tuning.MULTIPROCESSORS[90] * blocks
        assert (parts - 1) * rows < tokens <= parts * rows
        assert rows >= 8 or tokens < 8
    assert tuning.chunks(32, 256, 4, CPU) == (16, 16)
    assert tuning.chunks(600, 256, 4, CPU)[0] == 4
    assert tuning.chunks(5000, 256, 4, CPU)[0] == 1


def test_sums_do_not_depend_on_the_card(monkeypatch):
    """An H100 PCIe (114 multiprocessors) cuts as an H100 SXM (132): the table has one count for an architecture."""
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    for capability, arch in (
        ((8, 0), 80),
        ((8, 9), 80),
        ((9, 0), 90),
        ((10, 0), 100),
        ((10, 3), 100),
        ((12, 0), 120),
        ((7, 5), 80),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        tuning.architecture.cache_clear()
        assert tuning.architecture(torch.device("cuda", 0)) == arch
    tuning.architecture.cache_clear()


@pytest.fixture
def tune_kernels():
    return importlib.import_module("benchmarks.tune_kernels")


@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates(tune_kernels, kernel):
    found = list(tune_kernels.candidates(kernel, 1152, 90))
    assert found[0] == tuning.default_launch(kernel, 1152, 90)
    assert len(found) == len(set(found)) > 5


def test_the_fastest_candidate_wins_only_by_more_than_noise(monkeypatch, tune_kernels):
    """Timing is replaced by a table: a launch that is 1 % faster than the default loses to it, one that is 10 % faster wins."""
    default = tuning.default_launch("modulate_forward", 1152, 90)
    for milliseconds, wins in ((0.99, False), (0.9, True)):
        timed = lambda op, direction, width, batch, ms=milliseconds: (
            ms if tuning.TUNED[f"{op}_{direction}", width, 90].warps == 2 * default.warps else 1.0
        )
        monkeypatch.setattr(tune_kernels, "milliseconds", timed)
        best, fastest, base = tune_kernels.tune("modulate", "forward", 1152, 32, 90)
        assert (best.warps == 2 * default.warps) is wins and fastest == milliseconds and base == 1.0
    assert not tuning.TUNED


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time on")
def test_timing_without_a_gpu_is_refused(monkeypatch, capsys, tune_kernels):
    monkeypatch.setattr(sys, "argv", ["tune_kernels.py", "--ops", "modulate"])
    with pytest.raises(SystemExit):
        tune_kernels.main()
    assert "there is no GPU to time on" in capsys.readouterr().err
