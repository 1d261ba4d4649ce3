"""How much memory and communication does a gradient of a rollout take on TPUs and GPUs?

All programs are compiled, and none is run. XLA can compile for a GPU or TPU that is not
present, and it reports how much memory a program takes on each chip and how the chips
communicate. Run times need the machine itself.

The benchmark compiles the value and gradient of the same loss in two ways: by `residuum_loss`,
with its options, and by a plain `jax.lax.scan` as one writes it by hand, with `stop_gradient`
under a mask where the rollout is cut. Every chip has a batch of the same size, whatever the
number of chips, unless the state is split over chips as well. Several chips are used in these
ways:

- `shard_map`, with parameters that vary: there is one sum over the chips, at the end;
- `jit`, with sharded data, and nothing else;
- `jit, a term a chip`: the loss has one term per chip;
- `jit, space over 4`: groups of 4 chips share one batch, and each chip has a quarter of the
  points.

The rows have these columns:

- `fits` is "no" if a program needs more memory than a chip has. A TPU's compiler refuses such a
  program, and `needed_bytes` is the figure in its message. In all other rows, `needed_bytes` is
  the sum of temporaries, arguments and outputs;
- `temp_bytes` and `argument_bytes` are those of one chip. On a TPU, arrays in the fast memory
  next to the arithmetic units are not counted;
- `loop_collectives` and `once_collectives` count the communication operations in the program,
  in the bodies of loops and outside of them. `loop_bytes` and `once_bytes` are the sizes of
  their results on each chip, for one iteration;
- `instructions` counts the instructions of the compiled program, with which the compile time
  grows;
- `flops` is the compiler's count for one chip, in which the body of a loop counts once;
- `compile_s` is the time for tracing and compiling, on the machine that compiles.

If a compiler is not installed, its targets are left out, and the program says how to install
it. Rows of other targets and networks stay in the output file. Without `--networks`, only the
MLP is compiled for a TPU.

    python -m benchmarks.accelerators.run                      everything, about 10 minutes
    python -m benchmarks.accelerators.run --quick              a selection, a minute
    python -m benchmarks.accelerators.run --target v5e:2x2     one target
    python -m benchmarks.accelerators.draw                     the figure, from the rows
"""

from tqdm import tqdm

from benchmarks import tables
from benchmarks.accelerators.networks import LARGE, NETWORKS, SMALL
from benchmarks.accelerators.programs import (
    Case,
    COMPILERS,
    describe_program,
    has_compiler,
    make_topology,
    TARGETS,
)


STEPS = (10, 100, 1000)
# These networks are compiled with every option. Other networks and targets have few rows.
EVERYTHING = {
    "v5e:2x2": SMALL,
    "v5e:16x16": ("MLP",),
    "H100:1": SMALL,
    "H100:8": SMALL,
}
CHECKPOINT_EVERY = {100: 10, 1000: 25}  # near the square root, and a divisor
FEW = [("plain scan", False, {}), ("residuum", False, dict(checkpoint=True))]
FEW += [("residuum", 1, {})]
FIELDS = ["target", "kind", "chips", "network", "way", "loss", "cut", "options"]
FIELDS += ["num_rollout_steps", "fits", "needed_bytes", "temp_bytes", "argument_bytes"]
FIELDS += ["loop_collectives", "loop_bytes", "once_collectives", "once_bytes"]
FIELDS += ["instructions", "flops", "compile_s", "versions"]


def select_cases(target_name, quick=False):
    num_chips = len(make_topology(target_name).devices)
    way = "one chip" if num_chips == 1 else "shard_map"
    if quick:
        for choice in FEW:
            yield Case("MLP", way, *choice, 100)
        return
    is_main = target_name in EVERYTHING
    for network in SMALL if is_main else ("MLP", "conv 3D"):
        for num_steps in STEPS if is_main else (100,):
            everything = network in EVERYTHING.get(target_name, ())
            for choice in select_options(num_steps) if everything else FEW:
                yield Case(network, way, *choice, num_steps)
    for network in LARGE:
        yield Case(network, way, "residuum", 1, {}, 100)
    if num_chips == 1:
        return
    if is_main:
        for way in ("jit", "jit, a term a chip", "shard_map without pcast"):
            for cut in (False, 1, 5):
                yield Case("MLP", way, "residuum", cut, {}, 100)
        for cut in (False, 1):
            yield Case("MLP", "jit", "plain scan", cut, {}, 100)
    for n in (4, 8, 16):
        if num_chips % n == 0:
            for network in ("conv 3D", *LARGE):
                yield Case(network, f"jit, space over {n}", "residuum", 1, {}, 100)


def select_options(num_steps):
    """Yields loss, cut and options."""
    for k in (False, 1, 5):
        yield "plain scan", k, {}
        yield "residuum", k, {}
        yield "residuum", k, dict(checkpoint=True)
    if num_steps in CHECKPOINT_EVERY:
        yield "residuum", False, dict(checkpoint=CHECKPOINT_EVERY[num_steps])


def default_networks(target_name):
    """Returns only the MLP for a TPU, whose compiler takes up to two minutes for each program
    of the other networks."""
    return ("MLP",) if TARGETS[target_name].platform == "tpu" else tuple(NETWORKS)


def main():
    parser = tables.make_parser(__doc__, quick="the MLP, three rows a target")
    parser.add_argument("--target", nargs="+", choices=tuple(TARGETS), default=tuple(TARGETS))
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS))
    args = parser.parse_args()
    folder, _ = tables.output_folders(args, __file__)
    path = folder / "rows.csv"

    targets = []
    for platform, (_, extra, where) in COMPILERS.items():
        names = [name for name in args.target if TARGETS[name].platform == platform]
        if has_compiler(platform):
            targets += names
        elif names:
            line = f'pip install ".[benchmarks,{extra}]"'
            print(f"Left out, without a compiler: {', '.join(names)}. On {where}: {line}")
    cases = [
        (name, case)
        for name in targets
        for case in select_cases(name, args.quick)
        if case.network in (args.networks or default_networks(name))
    ]
    made = {(name, case.network) for name, case in cases}
    rows = tables.read_csv(path) if path.exists() else []
    rows = [x for x in rows if (x["target"], x["network"]) not in made]
    with tqdm(cases) as progress:
        for name, case in progress:
            progress.set_description(f"{name}, {case.network}, T={case.num_rollout_steps}")
            rows.append(describe_program(name, case))
            tables.write_csv(path, rows, FIELDS)


if __name__ == "__main__":
    main()
