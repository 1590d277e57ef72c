"""Writes the tables of benchmarks/RESULTS.md and the figures in benchmarks/results from the CSVs there.

    python -m benchmarks.report [NAME.csv ...]      # default: all in benchmarks/results, the suites' first, then those in TABLES
    python -m benchmarks.report --check             # exit code 1 if the tables of RESULTS.md are not those of the CSVs

The tables are between two marker lines of the page. Every number is a value of a row; what a CSV lacks is left out.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import results_csv
from fastdit.files import replacing, write_atomically

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
PAGE = ROOT / "benchmarks" / "RESULTS.md"
TITLES = {
    "train_step": "Train step", "end_to_end": "Training from images and from latents", "sampling": "Sampling",
    "data": "Data, seconds per image", "checkpoint": "Checkpoints", "blocks": "One block",
    "kernels": "Ops, forward and backward",
}  # fmt: skip
FASTER = ("train_step", "end_to_end", "sampling")  # suites of the first figure
PERCENT = ("mfu", "bound_share", "copy_share")
HEADS = {
    "median_s": "median", "images_per_s": "images/s", "speedup": "", "mfu": "MFU", "bound_share": "share of the bound",
    "parity": "parity", "psnr_db": "PSNR, dB",
}  # fmt: skip
Row = dict[str, str]


def suites_in(rows: list[Row]) -> dict[str, list[Row]]:
    """Return each suite's rows in the order of TITLES, unknown suites last."""
    names = dict.fromkeys((*TITLES, *(row["suite"] for row in rows)))
    by_suite = {suite: [row for row in rows if row["suite"] == suite] for suite in names}
    return {suite: mine for suite, mine in by_suite.items() if mine}


def title(suite: str) -> str:
    return TITLES.get(suite, suite.replace("_", " "))


def all_of(rows: list[Row], column: str) -> str:
    return ", ".join(dict.fromkeys(row.get(column) or "" for row in rows))


def hardware(rows: list[Row]) -> str:
    """Return the device, threads and precision of rows."""
    threads = all_of(rows, "threads")
    return f"{all_of(rows, 'device')}, {threads} thread{'s' * (threads != '1')}, {all_of(rows, 'precision')}"


def duration(seconds: str) -> str:
    """Return seconds with three digits in s, ms or µs."""
    value = float(seconds)
    scale, unit = next(((s, u) for s, u in ((1, "s"), (1e-3, "ms")) if value >= s), (1e-6, "µs"))
    return f"{value / scale:.0f} {unit}" if value >= 100 * scale else f"{value / scale:.3g} {unit}"


def shown(row: Row, column: str) -> str:
    """Return a value as the page shows it."""
    value = row.get(column) or ""
    if not value:
        return ""
    if column == "median_s":
        return duration(value)
    if column == "speedup":
        return f"{float(value):.2f} x"
    if column in PERCENT:
        return f"{100 * float(value):.0f} %"
    return f"{float(value):,.0f}" if column == "images_per_s" and float(value) >= 1000 else value


def markdown(rows: list[dict[str, str]]) -> str:
    """Return a table without the columns that are empty in all rows."""
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row[column].replace("|", "/") for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def differing(rows: list[Row]) -> list[str]:
    """Return the key columns of a table's caption in which its rows differ: they become columns of the table."""
    return [column for column in ("precision", "device", "threads") if len({row.get(column) for row in rows}) > 1]


def plain_table(rows: list[Row]) -> str:
    reference: dict[str, str] = {}
    for row in rows:
        reference.setdefault(row["case"], row["provider"])
    names = set(reference.values())
    heads = HEADS | {"speedup": f"over {names.pop()}" if len(names) == 1 else "over the case's first"}
    table = []
    for row in rows:
        cells = {"case": ", ".join(row[key] for key in ("case", "size") if row.get(key)), "provider": row["provider"]}
        cells |= {column: row.get(column) or "" for column in ("direction", *differing(rows))}
        cells |= {head: shown(row, column) for column, head in heads.items()}
        table.append(cells | {"error": row["error"]})
    return markdown(table)


def complete_ops(rows: list[Row]) -> list[dict[str, Row]]:
    """Return, per op and size, each provider's row of forward and backward together, or of the forward if there is no backward."""
    backward = {row["case"] for row in rows if row.get("direction") == "both"}
    by_case: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row.get("direction") == ("both" if row["case"] in backward else "forward"):
            case = tuple(row.get(key) for key in results_csv.KEYS if key != "provider")
            by_case.setdefault(case, {})[row["provider"]] = row
    return list(by_case.values())


def op_name(row: Row) -> str:
    return f"{row['case']}, forward" if row["direction"] == "forward" else row["case"]


def kernels_table(rows: list[Row]) -> str:
    table = []
    for providers in complete_ops(rows):
        first, *others = providers
        cells = {"op": op_name(providers[first]), **{c: providers[first].get(c) or "" for c in ("size", *differing(rows))}}
        for name in others:
            cells[f"{name} over {first}"] = providers[name]["error"] or shown(providers[name], "speedup")
        for name in others[-1:]:  # fastdit's
            cells[f"{name}: share of copy bandwidth"] = shown(providers[name], "copy_share")
        table.append(cells)
    heads = dict.fromkeys(head for cells in table for head in cells)
    return markdown([{head: cells.get(head, "") for head in heads} for cells in table])


def version(rows: list[Row]) -> str:
    """Return the versions of torch and the code, and the date, of rows."""
    return f"torch {all_of(rows, 'torch')}, commit {all_of(rows, 'commit')}, {all_of(rows, 'date')}"


def link_to(path: Path, page: Path) -> Path:
    """Return the relative link from the page to a file."""
    return Path(os.path.relpath(path, page.parent))


def section(link: Path, rows: list[Row], pictures: Iterable[str]) -> str:
    """Return a CSV's figures and tables in Markdown. link: relative path of the CSV; pictures: names of files beside it."""
    parts = [f"## {all_of(rows, 'device')}"]
    parts += [f"![{name.removesuffix('.png').replace('_', ' ')}]({link.with_name(name)})" for name in pictures]
    for suite, mine in suites_in(rows).items():
        table = kernels_table(mine) if suite == "kernels" and complete_ops(mine) else plain_table(mine)
        parts += [f"**{title(suite)}**: {hardware(mine)}; {version(mine)} ([rows]({link})).", table]
    return "\n\n".join(parts)


def pivot(rows: list[Row], keys: tuple[str, ...], column: str, cell: Callable[[Row], str]) -> str:
    """Return a table with a line per value of the keys and a cell per value of `column`: its rows' cells, or their errors."""
    cells: dict[tuple, dict[str, list[str]]] = {}
    for row in rows:
        line = cells.setdefault(tuple(row[key] for key in keys), {})
        line.setdefault(row[column], []).append(row.get("error") or cell(row))
    heads = dict.fromkeys(row[column] for row in rows)
    lines = [dict(zip(keys, key, strict=True)) | {h: " → ".join(line.get(h, ())) for h in heads} for key, line in cells.items()]
    return markdown(lines)


def host_table(rows: list[Row]) -> tuple[str, str]:
    launches = lambda row: sum(float(row[name]) for name in ("launches", "triton_launches", "graph_launches"))
    sentence = (
        f"**The host's side of a train step on CUDA**, ms of one core (launches), {all_of(rows, 'batch')} images: measured without "
        "a GPU, by torch's CUDA build on stub libraries that run no kernel; what a real driver adds to a launch is not in it. "
        f"None, blocks and graphs are fastdit's train.compile; {all_of(rows, 'device')}"
    )
    return sentence, pivot(rows, ("preset",), "provider", lambda row: f"{float(row['cpu_ms']):.1f} ({launches(row):.0f})")


def block_table(rows: list[Row]) -> tuple[str, str]:
    names = {"fused": "fused ops", "reference": "reference ops, fused by Inductor", "base": "eager reference, compiled"}
    mb = lambda row: f"{float(row['memory_bound_mb']):.0f}"
    first = rows[0]["preset"]
    moved = {(row["version"], row["direction"]): mb(row) for row in rows if row["preset"] == first}
    of = lambda version, direction: f"{moved.get((version, direction), '?')} MB"
    sentence = (
        "**A block under torch.compile for an H100**, MB (launches) of all but matmuls and attention, forward → backward, "
        f"{all_of(rows, 'batch')} images: derived without a GPU from Inductor's schedule, bytes that must move at least once, no "
        f"times. Forward, Inductor's own fusion of the reference ops moves as many as the fused ops ({of('reference', 'forward')} "
        f"against {of('fused', 'forward')} at {first}); the kernels gain backward ({of('fused', 'backward')} against "
        f"{of('base', 'backward')} of the eager reference, and {of('reference', 'backward')} of the reference ops, which sum the "
        "MLP bias's gradient from an fp32 tensor)"
    )
    named = [row | {"version": names.get(row["version"], row["version"])} for row in rows]
    return sentence, pivot(named, ("preset",), "version", lambda row: f"{mb(row)} ({row['launches']})")


def optimizer_table(rows: list[Row]) -> tuple[str, str]:
    sentence = (
        f"**Optimizer step**, ms (GB/s of the bytes that one pass must move), median of {all_of(rows, 'rounds')}: "
        f"{all_of(rows, 'device')}, {all_of(rows, 'threads')} threads"
    )
    cell = lambda row: f"{float(row['wall_ms']):.1f} ({float(row['gb_s']):.0f})"
    return sentence, pivot(rows, ("preset", "precision"), "provider", cell)


def muon_table(rows: list[Row]) -> tuple[str, str]:
    sentence = (
        "**Muon**: CPU time of an optimizer step on one rank, ms (share of a training step), with AdamW and with Muon, median of "
        f"{all_of(rows, 'rounds')}: {all_of(rows, 'device')}, {all_of(rows, 'threads')} threads"
    )
    cell = lambda row: f"{float(row['step_cpu_ms']):.0f} ({float(row['share']):.0%})"
    return sentence, pivot(rows, ("preset", "precision", "tokens"), "optimizer", cell)


def sparse_table(rows: list[Row]) -> tuple[str, str]:
    sentence = (
        "**Sparse blocks**, a quarter of the tokens between the first and the last blocks: CPU time of a forward and backward pass "
        f"of the dense model over the sparse one's, median of {all_of(rows, 'turns')} turns (p20 to p80; share of what the FLOPs "
        f"allow): {hardware(rows)}"
    )
    cell = lambda row: f"{row['speedup']} ({row['speedup_p20']} to {row['speedup_p80']}; {float(row['share']):.0%})"
    return sentence, pivot([row for row in rows if row["provider"] == "sparse"], ("case", "flops"), "precision", cell)


def engine_table(rows: list[Row]) -> tuple[str, str]:
    sentence = (
        "**DeepSpeed's engine on one rank**: CPU time of a train step under it over a plain loop of the same model, median of "
        f"{all_of(rows, 'pairs')} pairs (95 % confidence): {hardware(rows)}"
    )
    cells = lambda row: f"{row['cpu_ratio']} ({row['cpu_low']} to {row['cpu_high']})"
    return sentence, markdown([{"case": row["case"], "CPU time over the plain loop": cells(row)} for row in rows])


def evaluate_table(rows: list[Row]) -> tuple[str, str]:
    sentence = (
        "**Evaluation**: CPU time of `fastdit evaluate` over `fastdit sample` of the same samples, median of "
        f"{all_of(rows, 'pairs')} pairs (range): {all_of(rows, 'device')}, {all_of(rows, 'threads')} threads"
    )
    ratio = lambda row: f"{row['ratio']} ({row['ratio_min']} to {row['ratio_max']})"
    heads = {"samples": "samples", "sample_cpu_s": "sample, CPU s", "evaluate_cpu_s": "evaluate, CPU s"}
    return sentence, markdown([{head: row[key] for key, head in heads.items()} | {"ratio": ratio(row)} for row in rows])


def parquet_table(rows: list[Row]) -> tuple[str, str]:
    sentence = (
        "**Parquet files against tars** of the same photographs: images per second and core, and CPU time per image over that of "
        f"tars, median of {all_of(rows, 'turns')} (range); row groups of {all_of(rows, 'rows_per_group')} images of "
        f"{all_of(rows, 'kb_per_image')} kB: {all_of(rows, 'device')}"
    )
    ratio = lambda row: f"{row['ratio']} ({row['ratio_min']} to {row['ratio_max']})"
    heads = {"case": "case", "tar_images_per_cpu_s": "tar, images/s", "parquet_images_per_cpu_s": "Parquet, images/s"}
    return sentence, markdown(
        [{head: row[key] for key, head in heads.items()} | {"CPU time over tars": ratio(row)} for row in rows]
    )


def prepare_table(rows: list[Row]) -> tuple[str, str]:
    sentence = (
        "**Index of class folders**: CPU seconds of `fastdit prepare` over those of commit d2c3ac2, which knew neither checksums "
        f"of images nor changes of folders, median of {all_of(rows, 'rounds')} rounds (range); of the same command where the index "
        f"exists, and of opening the index: {all_of(rows, 'device')}"
    )
    ratio = lambda row: f"{row['ratio']} ({row['ratio_min']} to {row['ratio_max']})"
    heads = {"files": "files", "folders": "folders", "before_cpu_s": "d2c3ac2, s", "after_cpu_s": "this, s"}
    ends = {"again_s": "again, s", "open_s": "open, s"}
    shown = lambda row, names: {head: row[key] for key, head in names.items()}
    return sentence, markdown([shown(row, heads) | {"ratio": ratio(row)} | shown(row, ends) for row in rows])


def memory_table(rows: list[Row]) -> tuple[str, str]:
    sentence = (
        "**Memory of a train step**: resident memory of real steps over the prediction of `fastdit plan`, with an allocator that "
        f"returns freed blocks and with fastdit's, which keeps them for speed: {hardware(rows)}"
    )
    cell = lambda row: f"{float(row['measured_over_predicted']):.2f} ({float(row['peak_mb']):,.0f} MB)"
    return sentence, pivot(rows, ("case", "size"), "provider", cell)


def quality_table(rows: list[Row]) -> tuple[str, str]:
    sentence = (
        "**Metrics of samples of known quality**: unguided samples of one quickstart run against the training digits; real: "
        f"held-out digits; blur in pixels, noise in 255 levels (standard deviations): {all_of(rows, 'device')}"
    )
    heads = {
        "step": "step", "weights": "weights", "change": "change", "amount": "amount", "seed": "seed", "images": "images",
        "fid": "Fréchet distance", "kid": "KID", "precision": "precision", "recall": "recall", "accuracy": "accuracy",
    }  # fmt: skip
    return sentence, markdown([{head: row[key] for key, head in heads.items()} for row in rows])


def study(sentence: str) -> Callable[[list[Row]], tuple[str, str]]:
    """Return a function of a study's rows that shows all of its own columns."""

    def table(rows: list[Row]) -> tuple[str, str]:
        own = [column for column in rows[0] if column not in results_csv.measured_on(results_csv.CPU)]
        return f"{sentence}: {all_of(rows, 'device')}", markdown([{column: row[column] for column in own} for row in rows])

    return table


# Prefix of the names of CSVs that no suite writes -> their table and the sentence above it.
TABLES = {
    "cuda_host": host_table, "cuda_kernels": block_table, "optimizer_step": optimizer_table, "engine_overhead": engine_table,
    "evaluate_overhead": evaluate_table, "muon_step": muon_table, "parquet_speed": parquet_table, "plan_memory": memory_table,
    "prepare_folders": prepare_table, "quality": quality_table,
    "sparse_speed": sparse_table,
    "decay_digits": study(
        "**A decay phase**: a constant learning rate for 400 steps, 100 steps of decay from its checkpoint, and a cosine of 500"
    ),
    "finetune_digits": study(
        "**Fine-tuning**: five of the ten digits in another order of classes, and at 64 instead of 32 pixels; samples recognised"
    ),
}  # fmt: skip


def table_of(path: Path) -> Callable[[list[Row]], tuple[str, str]] | None:
    return next((table for name, table in TABLES.items() if path.name.startswith(name)), None)


def table_section(link: Path, path: Path) -> str:
    """Return `section` for a CSV of TABLES. Raises ValueError if it lacks what its name promises."""
    rows = results_csv.read(path)
    try:
        sentence, table = table_of(path)(rows)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has no rows, or lacks a value ({error!r}): measure it again") from error
    picture = f"\n\n![{path.stem}]({link.with_suffix('.png')})" if path.with_suffix(".png").exists() else ""
    return f"{sentence}; {version(rows)} ([rows]({link})).\n\n{table}{picture}"


def bars(axes: Axes, rows: list[Row], labels: list[str], column: str) -> None:
    """Draw speed-ups as bars with their values, one colour per value of the column."""
    values = list(dict.fromkeys(row[column] for row in rows))
    colours = [f"C{values.index(row[column]) % 10}" for row in rows]
    drawn = axes.barh(range(len(rows)), [float(row["speedup"]) for row in rows], color=colours)
    axes.bar_label(drawn, [shown(row, "speedup") for row in rows], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_title(f"{title(rows[0]['suite'])}, {hardware(rows)}", fontsize=9)


def speedup_figure(rows: list[Row]) -> Figure | None:
    """Return a figure of every provider over its case's reference, one plot per suite; None without speed-ups."""
    by_suite = {suite: [r for r in mine if r.get("speedup")] for suite, mine in suites_in(rows).items() if suite in FASTER}
    by_suite = {suite: mine for suite, mine in by_suite.items() if mine}
    if not by_suite:
        return None
    sizes = [len(mine) + 2 for mine in by_suite.values()]  # with room for the title
    figure = Figure(figsize=(9, 0.6 + 0.27 * sum(sizes)), layout="constrained")
    plots = figure.subplots(len(by_suite), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for axes, mine in zip(plots, by_suite.values(), strict=True):
        bars(axes, mine, [f"{row['case']}: {row['provider']}" for row in mine], "case")
    plots[-1].set_xlabel("times as fast as the eager reference")
    return figure


def kernels_figure(rows: list[Row]) -> Figure | None:
    """Return a figure of every op's providers over the eager chain; None without speed-ups."""
    ops = complete_ops(suites_in(rows).get("kernels", []))
    timed = [row for providers in ops for row in list(providers.values())[1:] if row.get("speedup")]
    if not timed:
        return None
    figure = Figure(figsize=(9, 1.2 + 0.26 * len(timed)), layout="constrained")
    axes = figure.subplots()
    bars(axes, timed, [f"{op_name(row)} {row.get('size')}: {row['provider']}" for row in timed], "provider")
    axes.set_xlabel("times as fast as the eager chain")
    return figure


def figures(path: Path, rows: list[Row]) -> dict[str, Figure]:
    """Return the figures of a CSV by file name."""
    drawn = {"speedup": speedup_figure(rows), "kernels": kernels_figure(rows)}
    return {f"{path.stem}_{name}.png": figure for name, figure in drawn.items() if figure}


def inserted(text: str, sections: list[str]) -> str:
    """Return the page's text with these sections between the markers. Raises ValueError unless it has each marker once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the page does not have {BEGIN} and then {END}, once each: put both lines where the tables are to go")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    return before + "\n\n".join([BEGIN, *sections, after])


def of_suites(path: Path) -> bool:
    """Return whether a CSV is one of the suites': its rows have a suite and a time."""
    return any({"suite", "median_s"} <= row.keys() for row in results_csv.read(path)[:1])


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "csv", nargs="*", type=Path, metavar="NAME.csv", help="CSV files to show (default: all in benchmarks/results)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page or a figure is out of date")
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown file with the markers (default: benchmarks/RESULTS.md)")
    options = parser.parse_args(words)
    try:
        known = [path for path in sorted(results_csv.RESULTS.glob("*.csv")) if table_of(path) or of_suites(path)]
        paths = options.csv or known
        sections, drawn = [], {}
        for path in (path for path in paths if not table_of(path)):
            rows = results_csv.read_suites(path)
            pictures = figures(path, rows)
            sections.append(section(link_to(path, options.page), rows, pictures))
            drawn |= {path.with_name(name): figure for name, figure in pictures.items()}
        tables = [table_section(link_to(path, options.page), path) for path in paths if table_of(path)]
        sections += ["## Studies", *tables] if tables else []
        old = options.page.read_text()
        new = inserted(old, sections)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.check:
        stale = [str(path) for path, is_old in ((options.page, new != old), *((p, not p.exists()) for p in drawn)) if is_old]
        if stale:
            print(f"{', '.join(stale)}: not what the CSVs give: run python -m benchmarks.report", file=sys.stderr)
        return 1 if stale else 0
    for path, figure in drawn.items():
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=90, metadata={"Software": None})
    write_atomically(options.page, new)
    print("\n".join(map(str, [*drawn, options.page])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
