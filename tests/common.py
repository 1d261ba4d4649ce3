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

# Slower variants, at length: `-m "not slow"` leaves them out.
slow = pytest.mark.slow


def also_slow(*values, slowly):
    """Parameters of a test, the last ones of which are left out by `-m "not slow"`."""
    return [*values, *(pytest.param(value, marks=slow) for value in slowly)]


#
# Meshes
#

# With one accelerator, the CPU's virtual devices make up the mesh.
MESH_DEVICES = jax.devices() if jax.device_count() > 1 else jax.devices("cpu")

# They exist before, but do not go through `vmap` of a loop.
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
    """Inside a `jax.shard_map`: the same, but typed as different on each device."""
    if hasattr(jax.lax, "pcast"):
        return jax.tree.map(lambda x: jax.lax.pcast(x, axis, to="varying"), tree)
    return jax.tree.map(lambda x: jax.lax.pvary(x, axis), tree)  # before JAX 0.8


#
# Programs: of JAX, and of the project
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
    """All of a jaxpr, those of inner jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def primitives(jaxpr):
    """Names of all primitives in a jaxpr, those of inner jaxprs included."""
    return (eqn.primitive.name for eqn in equations(jaxpr))


def network_problem(name):
    """Params, data and a stepper `(params, u) -> u_next` in float32."""
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
    """For a Python program that imports from the root of the project and from the folders."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *folders)))}
    environment |= {"MPLBACKEND": "agg", "JAX_THREEFRY_PARTITIONABLE": "1"}  # as since JAX 0.5
    environment.pop("XLA_FLAGS", None)  # with this process' number of virtual devices
    return environment


def run_program(path, *arguments, cwd):
    """What a program of the project prints, in a process and a JAX of its own."""
    return run_python(str(ROOT / path), *arguments, cwd=cwd)


def run_module(name, *arguments, cwd):
    """The same for `python -m name`."""
    return run_python("-m", name, *arguments, cwd=cwd)


def run_python(*arguments, cwd):
    command = [sys.executable, *arguments]
    options = dict(env=program_environment(), capture_output=True, text=True, cwd=cwd)
    result = subprocess.run(command, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def run_example(name, *arguments, cwd):
    return run_program(ROOT / "examples" / f"{name}.py", *arguments, cwd=cwd)
