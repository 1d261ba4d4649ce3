"""The benchmarks measure what a gradient costs. README.md lists them and says how to run
them."""

import pathlib
import sys


# The examples are imported by the names of their files, as when you run or copy them.
sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
