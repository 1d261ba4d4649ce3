"""benchmarks/on_device.py runs on any device, and makes its table from its rows."""

from benchmarks import on_device, tables
from tests.common import ROOT, run_program, slow


PROGRAM = ROOT / "benchmarks" / "on_device.py"


@slow
def test_a_quick_run_has_rows_of_every_part(tmp_path):
    output = run_program(PROGRAM, "--quick", "--output", str(tmp_path), cwd=tmp_path)
    rows = {part: tables.read_csv(path) for part, path in on_device.files_of(tmp_path).items()}
    assert rows.keys() == on_device.PARTS.keys()
    assert all(row["device"] for part in rows.values() for row in part)
    assert [(x["file"], x["failed"]) for x in rows["tests"]] == [("test_residuum.py", "0")]
    assert int(rows["tests"][0]["passed"]) >= 3
    ways = [row["way"] for row in rows["memory"]]
    assert sorted(ways) == sorted(
        ["bptt=1", "bptt=5", "checkpoint=True", "checkpoint=25", "plain scan"]
    )
    needed = [int(row["needed_bytes"]) for row in rows["memory"]]
    assert needed == sorted(needed) and ways[0] == "bptt=1"
    assert {"residuum", "plain scan", "segments", "one step, T times"} < {
        row["way"] for row in rows["time"]
    }
    assert {row["what"] for row in rows["largest"]} == {"steps", "points"}
    table = on_device.table_of(tmp_path)
    assert table in output and table in (tmp_path / "table.md").read_text()


def test_without_rows_there_is_no_table(tmp_path):
    assert on_device.table_of(tmp_path) == ""


def test_the_documentation_has_the_table_of_the_rows():
    folder = PROGRAM.with_suffix("")
    page = (folder / "table.md").read_text()
    assert (on_device.table_of(folder) or "No row has been measured") in page


def test_the_limits_of_the_parts_are_less_than_eight_minutes_in_all():
    assert sum(limit + 10 for limit in on_device.SECONDS.values()) <= 480
