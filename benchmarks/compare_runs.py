"""Finds what became slower between two CSVs of the suites, taking noise and the machine's drift into account.

    python -m benchmarks.compare_runs BEFORE.csv AFTER.csv [--threshold 10]

Exit code 0: no row became slower. 1: a row did, or fails that did not fail before. 2: bad input, such as files of two devices.

A shared machine may be 30 % slower a day later, and each minute differs. So no time is compared with the other file's directly:

- A provider is compared by `speedup` over the reference of its case (its first provider), which took turns with it.
- The references, and rows without a speedup, are compared by `median_s` over the suite's drift: the median ratio, after over
  before, of its references. If a suite has one reference, that one is the drift, and cannot regress.

A row is slower when that ratio exceeds the threshold and SIGMAS times its noise, and its `median_s` over the drift exceeds the
threshold too: a bad minute of the reference is no regression of the others. Noise, of the ratio's logarithm, is the largest of

1. the standard error of the two medians in the ratio, from the turns' or processes' ratios if rows have them (turns are pairs, so
   they scatter less than the times): 1.253·σ/√n, σ = log(p80 / p20) / 1.683 / (1 − 1.3/n), for normal samples. The last factor
   corrects for percentiles of few samples, which lie too close together: simulated, right to 4 % from n = 4 on;
2. the median of that over the suite's rows, since a few samples may lie together by chance;
3. the scatter between runs, which the samples of one run do not show: 1.483 times the median distance of a suite's rows from the
   median of their provider's rows. A change that slows all of a provider moves that median, and is not scatter.

2 and 3 do not apply to speed-ups of many processes (`processes`), whose spread is that between the processes.

Four sigmas: of 200 normal rows that did not change, one is called slower in 150 comparisons; with three, in four. A row of a
single timing has no noise to judge by: it is counted, and never called slower.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks import results_csv

SIGMAS = 4
SHOWN = ("suite", "case", "provider", "direction", "size", "precision", "threads")
Row = dict[str, str]
Key = tuple[str, ...]


class Pair(NamedTuple):
    """A row of both files.

    against: "reference" or "drift"; slower: log of the row's time, after over before, relative to that; over_drift: the same
    relative to the drift; noise: standard deviation of `slower`. Thresholds of the methods are logarithms too.
    """

    before: Row
    after: Row
    against: str
    slower: float
    over_drift: float
    noise: float

    def limit(self, threshold: float) -> float:
        """Return the value of `slower` above which it is not noise."""
        return max(threshold, SIGMAS * self.noise)

    def changed(self, threshold: float, sign: int) -> bool:
        return sign * self.slower > self.limit(threshold) and sign * self.over_drift > threshold

    def shown(self, threshold: float) -> Row:
        change = {"after / before": f"{math.exp(self.slower):.3f}", "noise up to": f"{math.exp(self.limit(threshold)):.3f}"}
        return (
            self.after | {"before_s": self.before["median_s"], "after_s": self.after["median_s"], "against": self.against} | change
        )


def keyed(rows: Iterable[Row]) -> dict[Key, Row]:
    return {tuple(row.get(key) or "" for key in results_csv.KEYS): row for row in rows}


def references(rows: dict[Key, Row]) -> dict[Key, Key]:
    """Return the key of each row's reference: the first provider of its case, in any precision."""
    first: dict[Key, Key] = {}
    group = lambda row: tuple(row.get(key) or "" for key in ("suite", "case", "direction", "size", "threads"))
    return {key: first.setdefault(group(row), key) for key, row in rows.items()}


def standard_error(row: Row, low: str = "p20_s", high: str = "p80_s", count: str = "samples") -> float:
    """Return the standard error of a median's logarithm from the columns of its percentiles."""
    n = int(row[count])
    if n < 2:
        return math.inf
    sigma = math.log(float(row[high]) / float(row[low])) / 1.683 / (1 - 1.3 / n)
    return 1.253 * sigma / math.sqrt(n)


def log_ratio(before: Row, after: Row, column: str) -> float:
    return math.log(float(after[column]) / float(before[column]))


def pairs_of(before: dict[Key, Row], after: dict[Key, Row]) -> tuple[float, list[Pair]]:
    """Return the drift of a suite, as a ratio, and the rows for which both files have times."""
    timed = [key for key in after if after[key]["median_s"] and before.get(key, {}).get("median_s")]
    if not timed:
        return 1.0, []
    reference = references(after)
    times = {key: log_ratio(before[key], after[key], "median_s") for key in timed}
    drift = statistics.median([times[key] for key in timed if reference[key] == key] or list(times.values()))
    pairs = []
    for key in timed:
        rows, speeds = [before[key], after[key]], [float(row[key].get("speedup") or 0) for row in (before, after)]
        if reference[key] in times and reference[key] != key and min(speeds) > 0:
            rounding = [0.0003 / speed for speed in speeds]  # standard deviation of rounding to three decimals
            against, slower = "reference", math.log(speeds[0] / speeds[1])
            if all(row.get("speedup_p20") for row in rows):
                noise = math.hypot(*(standard_error(row, "speedup_p20", "speedup_p80", "turns") for row in rows), *rounding)
            else:  # older files have no percentiles of the ratios
                rows += [before[reference[key]], after[reference[key]]]
                noise = math.hypot(*map(standard_error, rows), *rounding)
        else:
            against, slower, noise = "drift", times[key] - drift, math.hypot(*map(standard_error, rows))
        pairs.append(Pair(before[key], after[key], against, slower, times[key] - drift, noise))
    return math.exp(drift), with_scatter(pairs)


def with_scatter(pairs: list[Pair]) -> list[Pair]:
    """Return the pairs, except speed-ups of many processes, with at least the noise typical of those compared the same way."""
    single = lambda pair: pair.against == "drift" or not (pair.before.get("processes") and pair.after.get("processes"))
    least = {}
    for against in {pair.against for pair in pairs if single(pair)}:
        alike = [pair for pair in pairs if pair.against == against and single(pair)]
        by_provider = {pair.after["provider"]: [] for pair in alike}
        for pair in alike:
            by_provider[pair.after["provider"]].append(pair.slower)
        away = [abs(x - statistics.median(xs)) for xs in by_provider.values() if len(xs) > 2 for x in xs]
        judged = [pair.noise for pair in alike if math.isfinite(pair.noise)]
        least[against] = max(1.483 * statistics.median(away or [0]), statistics.median(judged or [0]))
    return [pair._replace(noise=max(pair.noise, least[pair.against])) if single(pair) else pair for pair in pairs]


def section(title: str, rows: list[Row], columns: tuple[str, ...]) -> None:
    if rows:
        print(f"\n{title}: {len(rows)}\n{results_csv.table(rows, columns)}")


def compare(before: dict[Key, Row], after: dict[Key, Row], threshold: float) -> int:
    """Print the rows that changed by more than exp(threshold), and return the exit code."""
    suites = [list(dict.fromkeys(row["suite"] for row in rows.values())) for rows in (before, after)]
    slower, faster = [], []
    for suite in [suite for suite in suites[1] if suite in suites[0]]:
        drift, pairs = pairs_of(*({k: row for k, row in rows.items() if row["suite"] == suite} for rows in (before, after)))
        ups = [p.shown(threshold) for p in pairs if p.changed(threshold, 1)]
        downs = [p.shown(threshold) for p in pairs if p.changed(threshold, -1)]
        single = sum(math.isinf(p.noise) for p in pairs)
        noise = math.exp(statistics.median([p.limit(0) for p in pairs] or [0]))
        line = (
            f"{suite}: {len(pairs)} rows, {len(ups)} slower, {len(downs)} faster; drift {drift:.3f}, median noise up to {noise:.3f}"
        )
        print(line + (f"; {single} of a single timing, not judged" if single else ""))
        slower, faster = slower + ups, faster + downs
    for name, mine, theirs in (("after", *suites), ("before", *suites[::-1])):
        if gone := [suite for suite in mine if suite not in theirs]:
            print(f"not in {name}: {', '.join(gone)}")
    failing = [row for key, row in after.items() if row["error"] and key in before and not before[key]["error"]]
    changed = (*SHOWN, "before_s", "after_s", "against", "after / before", "noise up to")
    section("slower", slower, changed)
    section("faster", faster, changed)
    section("fails now", failing, (*SHOWN, "error"))
    for name, mine, theirs in (("after", before, after), ("before", after, before)):
        both = [row for key, row in mine.items() if key not in theirs and row["suite"] in suites[0] and row["suite"] in suites[1]]
        section(f"not in {name}", both, SHOWN)
    return 1 if slower or failing else 0


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE.csv", help="CSV of the suites before a change")
    parser.add_argument("after", type=Path, metavar="AFTER.csv", help="CSV of the suites after it, on the same device")
    parser.add_argument(
        "--threshold", type=float, default=10, help="percentage by which a row may be slower (default: %(default)s)"
    )
    options = parser.parse_args(words)
    if not options.threshold > 0:
        parser.error(f"--threshold {options.threshold:g} is not a percentage above 0: leave it out for 10")
    try:
        before, after = (keyed(results_csv.read_suites(path)) for path in (options.before, options.after))
    except ValueError as error:
        parser.error(str(error))
    devices = [sorted({row["device"] for row in rows.values()}) for rows in (before, after)]
    if devices[0] != devices[1]:
        parser.error(f"{options.before} is of {devices[0]} and {options.after} of {devices[1]}: compare files of the same device")
    if not before.keys() & after.keys():
        parser.error(f"{options.before} and {options.after} have no row in common: measure the same suite, size and precision")
    return compare(before, after, math.log1p(options.threshold / 100))


if __name__ == "__main__":
    sys.exit(main())
