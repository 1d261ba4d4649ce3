"""What does one gradient of a rollout cost, with residuum and with its baselines?

The benchmark measures trace and compile time, temporaries (`temp_size_in_bytes`, which is
deterministic) and run time of the value and gradient of the same loss, on the same networks and
data. All programs of a case run in one process and take turns, so that the noise of the machine
affects all of them alike. Run times are medians. Before they are timed, all programs have to
return the same loss.

The column `baseline` of the CSV file has these names:

- `residuum` is `residuum_loss` with its defaults, and with the options that its user would
  choose. Where nothing is cut, these are `checkpoint=True` and, for 50 steps and more,
  `checkpoint=k` with k near the square root of the number of steps. For segments of 5 steps,
  the option is `unroll=5`, and for convolutions on a CPU, it is `unroll=True`;
- `trainax` is `trainax.configuration.Residuum`, a Python loop;
- `scan` is a `jax.lax.scan` as one writes it by hand, with `stop_gradient` under a mask;
- `segments` is what one writes by hand to save memory: a scan over segments, each of which is a
  `jax.checkpoint` of a scan over its steps and ends in `stop_gradient`. Where nothing is cut,
  the segments are as long as the blocks of `checkpoint=k`, or have one step;
- `equinox` is like `scan`, but with `equinox.internal.scan(kind="checkpointed")`;
- `torch` is eager PyTorch, with a `backward()` for each segment, if PyTorch is installed;
- `torch.compile` is `torch` with a compiled time step, i.e., network and residual. Caches of
  earlier runs are not used. The compile time is that of the first call minus that of a later
  one, in a process that has compiled before;
- `limit` is as many calls of a jitted one-step value and gradient as there are steps;
- `..., canonical` is the same program of a convolutional network, but with
  `canonical_convolutions` of `examples/canonical_convolutions.py`. `unroll=True` has no such
  row, since it contains no loop. trainax contains no loop either, but has such a row to show
  that nothing changes.

Other derivatives are measured for the MLP and 50 steps: `forward` is `jax.jvp` of the loss with
respect to the parameters, and `hvp` is a Hessian-vector product, forward over reverse. The
direction is the parameters themselves. The checkpointed scan of Equinox has no forward mode.

The following is left out to save time:

- Python loops and PyTorch with more than 50 steps. For the U-Net, Python loops with more than 5
  steps and all of PyTorch are left out;
- more than 200 steps of convolutions in 2D, and more than 50 steps of the U-Net;
- `bptt=5` for these two networks, and for the others at all lengths but 50.

`--cuts` and `--steps` measure more. A program that would run for more than 20 s, as estimated
from shorter rollouts, is compiled but not run. For convolutions in 2D, only programs with
canonical convolutions run for 50 steps and more.

On two CPU cores, the benchmark shows the following:

- A truncated and streamed gradient needs the memory of one segment, at the same arithmetic as
  the plain scan. Its run time is between two thirds of that of the plain scan and the same
  time, within a few percent. With convolutions that are not canonical, it takes up to 1.15
  times as long.
- A convolution in the body of a loop (jax-ml/jax#12868) costs more than all else. With JAX
  0.12, the ConvNets and the U-Net take 6 to 35 times the run time of `unroll=True`, which
  compiles as long as trainax does. With canonical convolutions, they take 0.9 to 1.2 times the
  run time of `unroll=True`, and compile as fast as any loop.
- In segments of 5 steps, JAX stacks the arrays that each step leaves for the backward pass.
  `unroll=5` is faster for the canonical convolution in 1D, about as fast for the FNO, and
  slower for the MLP and for the convolution that is not canonical.
- `torch.compile` compiles all networks that PyTorch takes part with, without a graph break. It
  has no code for the complex numbers of the FNO, says so, and calls the kernels of eager
  PyTorch there, as it does for convolutions.

    python -m benchmarks.rollout_cost.run            everything, about 45 minutes on two cores
    python -m benchmarks.rollout_cost.run --quick    a selection, a minute (PyTorch: one more)
    python -m benchmarks.rollout_cost.run --baselines residuum scan segments
                                                     only these; the other rows are kept
    python -m benchmarks.rollout_cost.draw           the figure and the tables, from the rows
"""

import collections
import re
import statistics
import time
import warnings
from functools import partial

import jax
import numpy as np
from tqdm import tqdm

from benchmarks import losses, machine, tables
from benchmarks.rollout_cost.baselines import (
    BASELINES,
    compile_baseline,
    select_baselines,
    start_torch_compiler,
    torch,
    torch_programs,
)
from benchmarks.rollout_cost.networks import make_problems, NAMES


CUTS = {"no cut": False, "bptt=1": 1, "bptt=5": 5}
NUM_STEPS = {  # the defaults of `--steps`
    "no cut": (1, 5, 50, 200, 1000),
    "bptt=1": (5, 50, 200, 1000),
    "bptt=5": (50,),
}

# These cases are left out because they take too long or too much memory.
FEW_CUTS = ("conv 2D", "U-Net")  # no `bptt=5`, unless `--cuts` asks for it
MAX_STEPS = {"MLP": 1000, "FNO": 1000, "conv 1D": 1000, "conv 2D": 200, "U-Net": 50}
MAX_TEMPORARIES = 4e9
MAX_RUN_S = 20
ROUNDS = {5: 1, 2: 3, 0: 5}  # run time in seconds: least number of runs


#
# Measuring
#


def flatten(value):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(value)])


def measure(
    name, network, data, cut_name, num_steps, derivative, baselines, limit, seconds, step_s
):
    """Returns a row of the table for each of `baselines`, and for each choice of residuum's
    options.

    `step_s` holds their run times per time step in shorter rollouts, and receives that of this
    rollout.
    """
    k = CUTS[cut_name]
    programs, rows = {}, {}
    for baseline, (loss, transform) in select_baselines(
        name, cut_name, num_steps, derivative
    ).items():
        if baseline.split(",")[0] not in baselines:
            continue
        program, rows[baseline] = compile_baseline(
            loss, network, data, num_steps, k, derivative, transform
        )
        similar = re.sub(r"=\d+", "", baseline)  # with another k
        is_fast = step_s.get(similar, 0) * num_steps <= MAX_RUN_S
        if is_fast and rows[baseline]["temp_bytes"] <= MAX_TEMPORARIES:
            programs[baseline] = program
    for baseline, program in torch_programs(
        name, network, data, num_steps, k, derivative
    ).items():
        if baseline in baselines:
            programs[baseline], rows[baseline] = program, {}
    if "torch.compile" in programs:
        calls = [machine.time_of(programs["torch.compile"]) for _ in range(3)]
        rows["torch.compile"]["compile_s"] = calls[0] - calls[-1]

    values = {baseline: flatten(program()) for baseline, program in programs.items()}
    # An untrained network diverges in a longer rollout, and then nothing can be compared.
    for baseline, value in values.items() if num_steps <= 50 else ():
        expected = next(iter(values.values()))
        error = np.linalg.norm(value - expected) / np.linalg.norm(expected)
        if not error < 1e-3:
            raise AssertionError(f"{baseline} has a relative error of {error} in {derivative}")

    limit_steps = min(num_steps, 10)
    if derivative == "gradient" and "limit" in baselines:
        programs["limit"], rows["limit"] = lambda: [limit() for _ in range(limit_steps)], {}
    deadline = time.perf_counter() + seconds
    medians = machine.medians_in_turns(programs, partial(is_measured, deadline))
    for baseline, median in medians.items():
        rows[baseline]["run_s"] = median
        step_s[re.sub(r"=\d+", "", baseline)] = rows[baseline]["run_s"] / num_steps
    if "limit" in rows:
        rows["limit"]["run_s"] *= num_steps / limit_steps
    case = dict(network=name, cut=cut_name, num_rollout_steps=num_steps, derivative=derivative)
    return [case | dict(baseline=baseline, **row) for baseline, row in rows.items()]


def is_measured(deadline, samples):
    run_time = statistics.median(samples or [0])
    num_rounds = next(rounds for seconds, rounds in ROUNDS.items() if run_time >= seconds)
    time_is_up = time.perf_counter() > deadline
    return len(samples) >= num_rounds and (time_is_up or len(samples) >= 50)


CASE = ["network", "cut", "num_rollout_steps", "derivative"]
FIELDS = [*CASE, "baseline", "trace_s", "compile_s", "temp_bytes", "run_s", "machine"]


def merge(old_rows, new_rows):
    """Replaces old rows of the same case and baseline. Other new rows go to the end of their
    case."""
    case = lambda row: tuple(str(row[field]) for field in CASE)
    rows = {(case(row), row["baseline"]): row for row in [*old_rows, *new_rows]}
    cases = list(dict.fromkeys(map(case, rows.values())))
    return sorted(rows.values(), key=lambda row: cases.index(case(row)))


def select_cases(name, cuts, steps):
    """Yields cut, number of steps and derivative of everything that is measured for a network.

    Options that are `None` get defaults with which everything takes half an hour.
    """
    for cut in cuts or CUTS:
        if cuts is None and cut == "bptt=5" and name in FEW_CUTS:
            continue
        for num_steps in steps or NUM_STEPS[cut]:
            if num_steps > (CUTS[cut] or 0) and num_steps <= MAX_STEPS[name]:
                yield cut, num_steps, "gradient"
                if name == "MLP" and num_steps == 50 and cut != "bptt=5":
                    yield cut, num_steps, "forward"
                    yield cut, num_steps, "hvp"


def main():
    parser = tables.make_parser(__doc__, quick="MLP and FNO, few steps")
    parser.add_argument("--networks", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--cuts", nargs="+", choices=tuple(CUTS))
    parser.add_argument("--steps", nargs="+", type=int)
    help = "measure these, and keep the other rows of the output"
    parser.add_argument("--baselines", nargs="+", choices=BASELINES, help=help)
    parser.add_argument("--seconds", type=float, default=1.0, help="of runs for each row")
    args = parser.parse_args()
    folder, _ = tables.output_folders(args, __file__)
    path = folder / "rows.csv"
    if args.quick:
        args.networks, args.steps, args.seconds = ("MLP", "FNO"), (1, 10), 0.5
    cases = {name: list(select_cases(name, args.cuts, args.steps)) for name in args.networks}

    name_of_machine = machine.describe(machine.all_cores(), *([torch] if torch else []))
    print(name_of_machine)
    if torch is not None:
        warnings.filterwarnings("ignore", module="torch")  # on complex numbers, see above
        start_torch_compiler()
    keep = args.baselines and path.exists()
    all_rows = tables.read_csv(path) if keep else []
    with tqdm(total=sum(map(len, cases.values()))) as progress:
        for name, network, data in make_problems(args.networks):
            limit, _ = compile_baseline(losses.with_residuum, network, data, 1, False)
            step_s = collections.defaultdict(dict)
            for case in cases[name]:
                cut, num_steps, derivative = case
                progress.set_description(f"{name}, {cut}, {num_steps} steps, {derivative}")
                rows = measure(
                    name,
                    network,
                    data,
                    *case,
                    args.baselines or BASELINES,
                    limit,
                    args.seconds,
                    step_s[cut, derivative],
                )
                all_rows = merge(
                    all_rows, [row | dict(machine=name_of_machine) for row in rows]
                )
                tables.write_csv(path, all_rows, FIELDS)
                progress.update()


if __name__ == "__main__":
    main()
