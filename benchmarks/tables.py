"""Writes rows to CSV files and makes Markdown tables from them, in the folders that hold both.
Benchmarks and studies share these functions."""

import argparse
import csv
import pathlib
import tempfile


ROOT = pathlib.Path(__file__).resolve().parents[1]


#
# The folders where a program writes
#


def make_parser(description, quick):
    """Makes a parser with the options `--quick`, which `quick` describes, and `--output`."""
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
    """Returns the folder for rows and tables, and the folder for figures. `program` is a
    `__file__`."""
    if args.output or args.quick:
        folder = args.output or pathlib.Path(tempfile.mkdtemp(prefix="residuum-"))
        folder.mkdir(parents=True, exist_ok=True)
        return folder, folder
    return pathlib.Path(program).parent, ROOT / "assets"


#
# CSV files
#


def write_csv(path, rows, columns=None):
    """Writes rows `[{column: value}]`, with the columns of the first row unless `columns` are
    given.

    A column that a row lacks is left empty. Call this function after each row: then an
    interrupted program keeps all rows that it has measured.
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
    """Makes a table for the documentation, with `num_names` columns of names, then numbers."""
    numbers = ["---:"] * (len(columns) - num_names)
    lines = [columns, ["---"] * num_names + numbers, *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write_table(path, table):
    """Replaces the tables in a Markdown file, which the documentation shows. The text above the
    tables stays."""
    text = path.read_text() if path.exists() else f"# {path.stem}"
    head = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    path.write_text(f"{head.rstrip()}\n\n{table}\n")


def with_prefix(x, unit):
    """Writes a number with three digits and a prefix, such as 1.5 ms or 20 MB."""
    prefixes = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1, "m": 1e-3, "µ": 1e-6}
    for prefix, scale in prefixes.items():
        if x >= 0.9995 * scale or prefix == "µ":
            return f"{x / scale:.3g} {prefix}{unit}"
