"""When plan calls a run host-bound, and where its figures come from."""

from pathlib import Path

import pytest

from benchmarks import results_csv
from benchmarks.without_gpu import cuda_host
from fastdit import cli
from fastdit.planning import host, plan

CSV = Path(__file__).parent.parent / "benchmarks" / "results" / "cuda_host_epyc_avx512.csv"
TABLE = {
    "blocks": host.Host(1.0, 20.0, 4.0, 100.0),
    "graphs": host.Host(0.0, 0.0, 4.0, 100.0),
    host.BLOCK_GRAPHS: host.Host(0.1, 2.0, 5.0, 100.0),  # 6.4 to 6.8
}  # 12 blocks: 16.7 to 17.7, 4.2 to 4.5


def config(*words):
    return plan.settings(None, ["model.preset=S/2", *words])


def test_the_table_is_the_committed_measurement():
    """Lines through the rows of benchmarks/results/cuda_host_epyc_avx512.csv; no table without rows."""
    assert {name: tuple(row) for name, row in host.HOST.items()} == cuda_host.plan_table(results_csv.read(CSV))


def test_a_launch_takes_the_driver_2_to_5_us(monkeypatch):
    monkeypatch.setattr(host, "HOST", TABLE)
    assert host.seconds(config(), "blocks") == pytest.approx((16e-3 + 340 * 2e-6, 16e-3 + 340 * 5e-6))
    assert host.seconds(config(), "none") is None


@pytest.mark.parametrize(
    ("gpu_ms", "words", "kind"),
    [
        (
            10,
            [],
            "17 to 18 ms per micro-step with compile=blocks against 10 ms of GPU work: host-bound; train.compile=graphs: 4.2 to",
        ),
        (17, [], "17 ms of GPU work: about even; train.compile=graphs"),
        (18, [], "18 ms of GPU work: GPU-bound"),
        (40, ["train.accumulation=4"], "10 ms of GPU work: host-bound"),
        (10, ["train.compile=none"], "compile=none not measured"),
    ],
)
def test_the_line(monkeypatch, gpu_ms, words, kind):
    monkeypatch.setattr(host, "HOST", TABLE)
    found = host.predict(config("train.compile=blocks", *words), 1, gpu_ms / 1e3)
    assert kind in host.describe(found)
    assert ("graphs" in host.describe(found)) == ("GPU-bound" not in kind and "not measured" not in kind)


def test_several_ranks_have_graphs_of_their_own(monkeypatch):
    """A graph for each block, which takes longer than one of the whole model; none under ZeRO 3."""
    monkeypatch.setattr(host, "HOST", TABLE)
    assert "train.compile=graphs: 6.4 to 6.8 ms" in host.describe(host.predict(config("train.compile=blocks"), 8, 0.01))
    assert host.describe(host.predict(config(), 8, 0.01)).startswith("6.4 to 6.8 ms per micro-step with compile=graphs")
    assert "graphs" not in host.describe(host.predict(config("train.compile=none", "zero.stage=3"), 8, 0.01))


def test_plan_prints_it(monkeypatch, capsys):
    monkeypatch.setattr(host, "HOST", TABLE)
    assert cli.main(["plan", "--preset", "S/2", "--gpus", "1", "train.batch_size=32", "train.compile=blocks"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("host  "))
    assert line.split(": ")[1].startswith("host-bound")
