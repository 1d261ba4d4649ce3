"""What a gradient costs. README.md lists the benchmarks, and how to run them."""

import pathlib
import sys


# The examples are imported as they are run and copied: by the names of their files.
sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
