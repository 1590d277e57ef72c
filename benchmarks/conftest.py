"""`pytest benchmarks`: one test a measurement. The first test of a group measures the whole group, whose providers take turns; each
test then hands its own samples to pytest-benchmark (so --benchmark-json and --benchmark-compare have them) and its row to the CSV.
"""

import functools
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from benchmarks import results_csv
from benchmarks.harness import DEVICE, EXCUSED, PRECISION, THREADS, Group, Result

DEFAULT_CSV = Path("runs/benchmarks.csv")


class Clock:
    """The timer that pytest-benchmark reads: it stands still but for the samples that are played."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, samples: list[float]) -> None:
        self.now += samples.pop(0)


CLOCK = Clock()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="the full sizes: about an hour on 2 cores (default: quick, some 9 minutes)"
    )
    parser.addoption(
        "--csv", type=Path, default=DEFAULT_CSV, help="where the rows go, into those of other suites (default: %(default)s)"
    )


ROWS = pytest.StashKey[dict[str, list[dict]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = defaultdict(list)
    torch.set_num_threads(THREADS)
    config.option.benchmark_quiet = True  # the tables below show more


@functools.cache
def groups(module, full: bool) -> dict[str, Group]:
    return module.groups(full)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "member" in metafunc.fixturenames:
        found = groups(metafunc.module, metafunc.config.getoption("--full"))
        cases = [(name, member) for name, group in found.items() for member in group.members]
        metafunc.parametrize(("group", "member"), cases, ids=[f"{name}-{member}".replace(" ", "_") for name, member in cases])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        item._nodeid = item.nodeid  # which pytest-benchmark before 5.3 reads, and pytest from 9.2 on has no more


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest):
    """results(module, group) -> those of the group's members, measured at the first call."""
    full, reporter = request.config.getoption("--full"), request.config.pluginmanager.getplugin("terminalreporter")

    @functools.cache
    def measured(module, name: str) -> dict[str, Result]:
        def say(text: str) -> None:
            line = f"{module.SUITE} {name}: {text}"
            reporter.rewrite(f"{line:79}", erase=True) if reporter.isatty else reporter.write_line(f"  {line}")

        found = groups(module, full)[name].measure(say)
        request.config.stash[ROWS][module.SUITE] += [result.row() for result in found.values()]  # -k or not: they are compared
        return found

    return measured


@pytest.fixture
def replay(request: pytest.FixtureRequest, benchmark, results):
    """replay(group, member) reports a member. Fails where the provider failed; skips what has no room or no package here."""

    def report(group: str, member: str) -> None:
        result = results(request.module, group)[member]
        benchmark.group = f"{request.module.SUITE} {group}"
        benchmark.extra_info.update(result.row())
        if result.error:
            if result.error.startswith(EXCUSED):
                pytest.skip(result.error)
            pytest.fail(result.error, pytrace=False)
        samples = list(result.samples)
        benchmark.pedantic(CLOCK.play, (samples,), rounds=len(samples))

    return report


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    path = config.getoption("--csv")
    for suite, rows in config.stash[ROWS].items():
        results_csv.merge(path, suite, rows, THREADS, DEVICE)
        terminalreporter.section(f"{suite}, {PRECISION}, {results_csv.device_name(DEVICE)}, {THREADS} threads")
        terminalreporter.write_line(results_csv.table(rows, results_csv.SHOWN))
    if config.stash[ROWS]:
        terminalreporter.write_line(f"\nrows: {path}")
