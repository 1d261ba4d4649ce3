"""A function to copy, `estimate_error`, tells how wrong an emulator is, without a solver; and a
program shows it for Burgers' equation.

Let v be the trajectory of an emulator, u that of the exact step of the residual r, so that
r(u⁺, u) = 0, and e = v − u the error. To first order in e,

    r(v⁺, v) = ∂r/∂u_next · e⁺ + ∂r/∂u_prev · e,   e⁰ = 0

This is one linear system for e⁺ in each step, at the states of the emulator. The corrected
trajectory v − e is that of one step of Newton's method on the whole rollout at once, so its
error is of second order in e. The estimate is the error against the exact step of *your
residual*, not against the solution of the equation.

    python examples/error_estimate.py             trains, and writes assets/error_estimate.png
    python examples/error_estimate.py --quick     the same in seconds, to see that it runs
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree


def gmres(operator, right_hand_side, **options):
    """Solves `operator(x) = right_hand_side`. `M=preconditioner` is one of the options."""
    options = dict(tol=1e-6, restart=20, maxiter=10) | options
    return jax.scipy.sparse.linalg.gmres(operator, right_hand_side, **options)[0]


def estimate_error(stepper, residuum_fn, u_0, inputs=None, *, num_rollout_steps, solve=gmres):
    """Rolls an emulator out, and estimates its error against the exact step of the residual.

    **Arguments:**

    - `stepper`, `residuum_fn`: as in `residuum_loss`, for one sample.
    - `u_0`: a state of one sample, any PyTree of arrays, without axes for batch and snapshot.
        Use `jax.vmap` for several samples.
    - `inputs`: PyTree of arrays `[num_rollout_steps, ...]`, or `None`.
    - `solve`: `(operator, right_hand_side) -> x`, where the vectors are flat and real, and the
        operator is linear. A complex number counts as two, its real and its imaginary part. The
        default is GMRES; `partial(gmres, M=preconditioner)` preconditions it.

    **Returns:** the states after each step and their estimated errors, PyTrees with leaves
    `[num_rollout_steps, ...]`. Leaves that `stepper` returns as it received them, and leaves
    that are neither real nor complex, have the error 0 and are no unknowns.

    Raises a `ValueError` if the residual does not have as many entries as there are unknowns.
    A step costs one linear solve. In float32, errors below 1e-6 of the state are rounding.
    """
    of_level_0 = [] if inputs is None else [jax.tree.map(lambda x: x[0], inputs)]
    program, u_1 = jax.make_jaxpr(stepper, return_shape=True)(u_0, *of_level_0)
    is_same = [x is y for x, y in zip(program.jaxpr.invars, program.jaxpr.outvars)]  # noqa: B905
    is_inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(u_1)]
    places = [i for i, inexact in enumerate(is_inexact) if inexact and not is_same[i]]
    # `stepper` may return wider dtypes than it received.
    u_0 = jax.tree.map(lambda x, y: x if x.dtype == y.dtype else x.astype(y.dtype), u_0, u_1)

    def unknowns(state):
        leaves = jax.tree.leaves(state)
        return to_real_vector([leaves[i] for i in places])

    def with_unknowns(state, vector):
        leaves, structure = jax.tree.flatten(state)
        new = from_real_vector(vector, [jax.tree.leaves(u_1)[i] for i in places])
        for i, x in zip(places, new, strict=True):
            leaves[i] = x
        return jax.tree.unflatten(structure, leaves)

    def step(carry, inputs_t):
        v, error = carry
        more = [] if inputs is None else [inputs_t]
        v_next = stepper(v, *more)

        def residual(x, y):
            states = with_unknowns(v_next, x), with_unknowns(v, y)
            return to_real_vector(residuum_fn(*states, *more))

        x, y = unknowns(v_next), unknowns(v)
        r, from_previous = jax.jvp(partial(residual, x), (y,), (error,))
        if r.size != x.size:
            text = f"{r.size} entries, but the state has {x.size} unknowns"
            raise ValueError(f"residuum_fn has {text} (complex: two, unchanged leaf: none)")
        operator = jax.linearize(lambda x: residual(x, y), x)[1]
        # The error before the step is the first guess of the error after it.
        new_error = error + solve(operator, r - from_previous - operator(error))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), v_next)
        return (v_next, new_error), (v_next, with_unknowns(zeros, new_error))

    carry = u_0, jnp.zeros_like(unknowns(u_0))
    return jax.lax.scan(step, carry, inputs, length=num_rollout_steps)[1]


def real_parts(x):
    is_complex = jnp.issubdtype(x.dtype, jnp.complexfloating)
    return (jnp.real(x), jnp.imag(x)) if is_complex else (jnp.asarray(x),)


def to_real_vector(tree):
    return ravel_pytree([real_parts(jnp.asarray(x)) for x in jax.tree.leaves(tree)])[0]


def from_real_vector(vector, like):
    zeros = [real_parts(jnp.zeros(x.shape, x.dtype)) for x in like]
    parts = ravel_pytree(zeros)[1](vector)
    return [jax.lax.complex(*pair) if len(pair) == 2 else pair[0] for pair in parts]


#
# Burgers' equation. The functions above need jax alone, so that this file may be copied: here,
# each function imports what else it needs
#

NUM_STEPS, REPORT_STEPS = 50, (1, 10, 50)


def exact_step(u_prev):
    """Solves the residual by Newton's method, for comparison with the estimate."""
    from burgers import crank_nicolson

    u = u_prev
    for _ in range(8):
        residual = lambda u: crank_nicolson(u[None], u_prev)[0]
        u -= jnp.linalg.solve(jax.jacfwd(residual)(u[0]), residual(u[0]))[None]
    return u


def unseen_states(key, num_samples=32):
    """Draws states like those of training, larger ones, and rougher ones."""
    import burgers
    import exponax as ex

    states = burgers.initial_conditions(num_samples, key)
    series = ex.ic.RandomTruncatedFourierSeries(1, cutoff=10, max_one=True)
    rough = ex.build_ic_set(series, num_points=64, num_samples=num_samples, key=key)
    return {"like training": states, "1.5 times as large": 1.5 * states, "rougher": rough}


def main():
    import burgers
    import common
    import matplotlib.pyplot as plt

    from residuum import residuum_loss

    args = common.parse_options(__doc__, "assets/error_estimate.png", updates=(1500, 20))
    keys = jax.random.split(jax.random.key(args.seed), 3)
    options = dict(residuum_fn=burgers.crank_nicolson, num_rollout_steps=5, unroll=True)
    loss_fn = partial(residuum_loss, **options)
    data = burgers.initial_conditions(burgers.NUM_TRAIN, keys[0])[:, None]
    train = partial(burgers.train_emulator, num_updates=args.updates, key=keys[1])
    stepper, _ = train("emulator", loss_fn, data)
    tests = unseen_states(keys[2])

    jax.config.update("jax_enable_x64", True)  # shows how small the corrected error is
    arguments = common.to_float64(stepper), burgers.crank_nicolson
    estimate = partial(estimate_error, *arguments, num_rollout_steps=NUM_STEPS)
    widths = (1, 1, 1, 1, 1.3)
    figure, axes = plt.subplots(
        1, 5, figsize=(15, 3.2), width_ratios=widths, layout="constrained"
    )
    for (name, states), color in zip(tests.items(), common.COLORS[1:], strict=False):
        exact = common.rollout(exact_step, common.to_float64(states), NUM_STEPS)[:, 1:]
        emulated, errors = jax.jit(jax.vmap(estimate))(common.to_float64(states))
        fields = {
            "emulator": emulated,
            "true error": emulated - exact,
            "estimated error": errors,
            "true error, corrected": emulated - errors - exact,
        }
        norm = lambda u: jnp.linalg.norm(u, axis=(2, 3))
        true, estimated, corrected = (norm(u) / norm(exact) for u in list(fields.values())[1:])
        ratio = estimated / true
        rows = {"true nRMSE": true, "estimated": estimated, "corrected": corrected}
        rows = {title: jnp.mean(x, axis=0) for title, x in rows.items()}
        for (_, error), line in zip(rows.items(), ("-", ":", "--"), strict=True):
            times = burgers.DT * jnp.arange(1, NUM_STEPS + 1)
            axes[4].semilogy(times, error, line, color="black" if line == ":" else color)
        axes[4].plot([], color=color, label=name)
        rows |= {
            "ratio, least": jnp.min(ratio, axis=0),
            "ratio, largest": jnp.max(ratio, axis=0),
        }
        cells = {k: [f"{x[n - 1]:.3g}" for n in REPORT_STEPS] for k, x in rows.items()}
        common.print_table(name, [f"step {n}" for n in REPORT_STEPS], cells)
        if name == "like training":
            for axis, (title, u) in zip(axes, fields.items(), strict=False):
                extent = (NUM_STEPS * burgers.DT, burgers.DOMAIN_EXTENT)
                figure.colorbar(common.show(axis, title, u[0, :, 0], extent), ax=axis)
                axis.set(xlabel="time t", ylabel="position x")
    axes[4].set_title("solid: true, dotted: estimated,\ndashed: corrected", fontsize="small")
    axes[4].set(xlabel="time t", ylabel="nRMSE")
    axes[4].legend(fontsize="small")
    common.save_figure(args.output, figure)


if __name__ == "__main__":
    main()
