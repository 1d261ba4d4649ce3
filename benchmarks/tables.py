"""Rows of CSV files, Markdown tables of them, and the folders that hold both. Benchmarks and
studies share it."""

import argparse
import csv
import pathlib
import tempfile


ROOT = pathlib.Path(__file__).resolve().parents[1]


#
# Where a program writes
#


def make_parser(description, quick):
    """With the options `--quick`, which `quick` describes, and `--output`."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=style)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        metavar="FOLDER",
        help="for rows, tables and figures, instead of the program's own folder and assets/; "
        "with --quick, a temporary one",
    )
    return parser


def output_folders(args, program):
    """The folder for rows and tables, and the folder for figures. `program` is a `__file__`."""
    if args.output or args.quick:
        folder = args.output or pathlib.Path(tempfile.mkdtemp(prefix="residuum-"))
        folder.mkdir(parents=True, exist_ok=True)
        return folder, folder
    return pathlib.Path(program).parent, ROOT / "assets"


#
# CSV files
#


def write_csv(path, rows, columns=None):
    """Rows `[{column: value}]`, with the columns of the first one unless `columns` are given.

    What a row lacks is left empty. Call it after each row: then a program that is interrupted
    keeps what it has measured.
    """
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


#
# Tables
#


def markdown(columns, rows, num_names=1):
    """A table for the documentation: `num_names` columns of names, then numbers."""
    numbers = ["---:"] * (len(columns) - num_names)
    lines = [columns, ["---"] * num_names + numbers, *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write_table(path, table):
    """Replaces the tables in a Markdown file, which the documentation shows. The text above
    them stays."""
    text = path.read_text() if path.exists() else f"# {path.stem}"
    head = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    path.write_text(f"{head.rstrip()}\n\n{table}\n")


def with_prefix(x, unit):
    """Three digits and a prefix: 1.5 ms, 20 MB."""
    prefixes = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1, "m": 1e-3, "µ": 1e-6}
    for prefix, scale in prefixes.items():
        if x >= 0.9995 * scale or prefix == "µ":
            return f"{x / scale:.3g} {prefix}{unit}"
