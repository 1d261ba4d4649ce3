"""Helpers that several test files need. The oracle and its problem are in test_residuum.py."""

import contextlib
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding


ROOT = pathlib.Path(__file__).parent.parent


#
# Slow tests
#

# These tests are slower variants of other tests. `-m "not slow"` leaves them out.
slow = pytest.mark.slow


def also_slow(*values, slowly):
    """Returns parameters for a test. The last ones are slow variants, which `-m "not slow"`
    leaves out."""
    return [*values, *(pytest.param(value, marks=slow) for value in slowly)]


#
# Meshes
#

# With a single accelerator, the mesh consists of the CPU's virtual devices.
MESH_DEVICES = jax.devices() if jax.device_count() > 1 else jax.devices("cpu")

# Older versions of JAX have explicit axes too, but cannot `vmap` a loop over them.
needs_explicit_axes = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="needs a newer JAX"
)
needs_shard_map = pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="needs a newer JAX")


def make_mesh(axes=("batch",), *, explicit=False):
    shape = (-1, *[2] * (len(axes) - 1))
    devices = np.array(MESH_DEVICES).reshape(shape)
    if explicit:
        return Mesh(devices, axes, axis_types=(jax.sharding.AxisType.Explicit,) * len(axes))
    return Mesh(devices, axes)


def shard(mesh, spec, tree):
    return jax.device_put(tree, NamedSharding(mesh, spec))


def vary(tree, axis="batch"):
    """Returns the same arrays inside a `jax.shard_map`, but typed as varying over the
    devices."""
    if hasattr(jax.lax, "pcast"):
        return jax.tree.map(lambda x: jax.lax.pcast(x, axis, to="varying"), tree)
    return jax.tree.map(lambda x: jax.lax.pvary(x, axis), tree)  # before JAX 0.8


#
# Programs of JAX and of this project
#


@contextlib.contextmanager
def config(name, value):
    before = jax.config.values[name]
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


def equations(jaxpr):
    """Returns all equations of a jaxpr, including those of its inner jaxprs."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def primitives(jaxpr):
    """Returns the names of all primitives in a jaxpr, including those of its inner jaxprs."""
    return (eqn.primitive.name for eqn in equations(jaxpr))


def network_problem(name):
    """Returns params, data and a stepper `(params, u) -> u_next`, all in float32."""
    keys = jax.random.split(jax.random.key(0), 4)
    if name == "mlp":
        shapes, num_points = [(64, 64), (64, 64)], 64
        layer = lambda u, w: w @ u
    else:
        shapes, num_points = [(8, 1, 5), (8, 8, 5), (1, 8, 5)], 64
        layer = lambda u, w: jax.lax.conv_general_dilated(u[None], w, (1,), "SAME")[0]
    params = [jax.random.normal(k, s, jnp.float32) / 8 for k, s in zip(keys, shapes)]  # noqa: B905
    state_shape = (num_points,) if name == "mlp" else (1, num_points)
    data = jax.random.normal(keys[-1], (8, 1, *state_shape), jnp.float32)

    def stepper(params, u):
        hidden = u
        for w in params:
            hidden = jnp.tanh(layer(hidden, w))
        return u + hidden

    return params, data, stepper


def program_environment(*folders):
    """Returns the environment for a Python program that imports from the root of the project
    and from these folders."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *folders)))}
    environment |= {"MPLBACKEND": "agg", "JAX_THREEFRY_PARTITIONABLE": "1"}  # as since JAX 0.5
    environment.pop("XLA_FLAGS", None)  # it holds the number of virtual devices of this process
    return environment


def run_program(path, *arguments, cwd):
    """Runs a program of this project in a separate process, with a fresh JAX, and returns its
    output."""
    return run_python(str(ROOT / path), *arguments, cwd=cwd)


def run_module(name, *arguments, cwd):
    """Runs `python -m name` in a separate process, with a fresh JAX, and returns its output."""
    return run_python("-m", name, *arguments, cwd=cwd)


def run_python(*arguments, cwd):
    command = [sys.executable, *arguments]
    options = dict(env=program_environment(), capture_output=True, text=True, cwd=cwd)
    result = subprocess.run(command, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def run_example(name, *arguments, cwd):
    return run_program(ROOT / "examples" / f"{name}.py", *arguments, cwd=cwd)


def read_picture(path):
    """Returns red, green and blue in [0, 1], `[height, width, 3]`."""
    import matplotlib.image

    return matplotlib.image.imread(path)[..., :3]


def num_pixels(picture, color):
    """Counts the pixels of a color `#RRGGBB`."""
    from matplotlib.colors import to_rgb

    return int(np.sum(np.all(np.abs(picture - to_rgb(color)) < 0.01, axis=-1)))
