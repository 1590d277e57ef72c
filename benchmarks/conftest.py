"""`python -m pytest benchmarks`: one test per measurement. The first test of a group measures all of it, as its providers take
turns; each test then plays its samples to pytest-benchmark (for --benchmark-json and --benchmark-compare). Rows go to a CSV.
"""

import functools
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from benchmarks import results_csv
from benchmarks.harness import CSV, DEVICE, EXCUSED, PRECISION, THREADS, Group, Result
from fastdit.config import InputError


class Clock:
    """The timer that pytest-benchmark reads: it advances only by the samples that are played."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, samples: list[float]) -> None:
        self.now += samples.pop(0)


CLOCK = Clock()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="full sizes: an hour on 2 cores (default: quick sizes, 9 minutes)")
    parser.addoption(
        "--csv", type=Path, help=f"CSV file that receives the rows, beside other suites' (default: runs/{CSV}_MACHINE.csv)"
    )
    parser.addoption("--allow-dirty", action="store_true", help="measure although the checkout has uncommitted changes")


ROWS = pytest.StashKey[dict[str, list[dict]]]()


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.collectonly:
        try:
            results_csv.refuse_dirty({results_csv.commit()}, config.getoption("--allow-dirty"))
        except InputError as error:
            raise pytest.UsageError(str(error)) from error
    config.stash[ROWS] = defaultdict(list)
    torch.set_num_threads(THREADS)
    config.option.benchmark_quiet = True  # the tables below show more


@functools.cache
def groups(module, full: bool) -> dict[str, Group]:
    return module.groups(full)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "member" in metafunc.fixturenames:
        by_name = groups(metafunc.module, metafunc.config.getoption("--full"))
        cases = [(name, member) for name, group in by_name.items() for member in group.members]
        metafunc.parametrize(("group", "member"), cases, ids=[f"{name}-{member}".replace(" ", "_") for name, member in cases])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        item._nodeid = item.nodeid  # read by pytest-benchmark before 5.3, gone in pytest 9.2


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest):
    """results(module, group) returns the results of the group's members, measured at the first call."""
    full, reporter = request.config.getoption("--full"), request.config.pluginmanager.getplugin("terminalreporter")

    @functools.cache
    def measured(module, name: str) -> dict[str, Result]:
        def say(text: str) -> None:
            line = f"{module.SUITE} {name}: {text}"
            reporter.rewrite(f"{line:79}", erase=True) if reporter.isatty else reporter.write_line(f"  {line}")

        by_member = groups(module, full)[name].measure(say)
        # all members, even those that -k leaves out: they are compared with each other
        request.config.stash[ROWS][module.SUITE] += [result.row() for result in by_member.values()]
        return by_member

    return measured


@pytest.fixture
def replay(request: pytest.FixtureRequest, benchmark, results):
    """replay(group, member) reports a member. Fails if the provider failed; skips if this machine lacks memory or a package."""

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
    path = config.getoption("--csv") or Path("runs") / results_csv.path_of(CSV, DEVICE).name
    for suite, rows in config.stash[ROWS].items():
        results_csv.merge(path, suite, rows, THREADS, DEVICE, config.getoption("--allow-dirty"))
        terminalreporter.section(f"{suite}, {PRECISION}, {results_csv.hardware(DEVICE)}, {THREADS} threads")
        terminalreporter.write_line(results_csv.table(rows, results_csv.SHOWN))
    if config.stash[ROWS]:
        terminalreporter.write_line(f"\nrows: {path}")
