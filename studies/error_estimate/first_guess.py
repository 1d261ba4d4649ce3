"""Does an emulator save iterations as the first guess of a solver?

The exact step of the residual is solved by `u - P(residual)`, where P inverts the linear part
of the residual in Fourier space, until the residual is a millionth of that of persistence. The
first guess is persistence, linear extrapolation from two states, or the emulator. The study
counts iterations, and measures the time of a step with its guess, in float64 on one sample.

    python -m studies.error_estimate.first_guess             2 minutes
    python -m studies.error_estimate.first_guess --quick     to see that it runs
"""

from functools import partial

import burgers
import jax
import jax.numpy as jnp
import numpy as np
from canonical_convolutions import canonical_convolutions
from common import to_float64

from benchmarks import machine, tables
from studies import train_and_tabulate
from studies.error_estimate.run import burgers_problem, kuramoto_sivashinsky_problem


TOLERANCE, NUM_STEPS = 1e-6, 50


def burgers_residual(u_next, u_prev):
    """The residual, with the implicit diffusion inverted."""
    symbol = 1 + burgers.DT / 2 * burgers.VISCOSITY * burgers.WAVENUMBERS**2
    return jnp.fft.irfft(jnp.fft.rfft(burgers.crank_nicolson(u_next, u_prev)) / symbol)


def solve(residuum_fn, guess, u_prev):
    """The next state, and the number of iterations."""
    bound = TOLERANCE * jnp.linalg.norm(residuum_fn(u_prev, u_prev))

    def is_unsolved(carry):
        _, residual, count = carry
        return (jnp.linalg.norm(residual) > bound) & (count < 100)

    def iterate(carry):
        u, residual, count = carry
        u = u - residual
        return u, residuum_fn(u, u_prev), count + 1

    carry = guess, residuum_fn(guess, u_prev), 0
    u, _, count = jax.lax.while_loop(is_unsolved, iterate, carry)
    return u, count


def guesses(stepper):
    """Functions of the last two states. The network computes in float32, as it was trained."""

    def emulator(u_prev, _):
        return stepper(u_prev.astype(jnp.float32)).astype(u_prev.dtype)

    return {
        "persistence": lambda u_prev, _: u_prev,
        "extrapolation": lambda u_prev, before: 2 * u_prev - before,
        "emulator": emulator,
    }


def roll_out(residuum_fn, guess, u_0):
    def step(states, _):
        u, count = solve(residuum_fn, guess(*states), states[0])
        return (u, states[0]), count

    return jax.lax.scan(step, (u_0, u_0), length=NUM_STEPS)[1]


def make_rows(name, stepper, residuum_fn, states):
    programs, counts = {}, {}
    for guess_name, guess in guesses(stepper).items():
        f = jax.jit(canonical_convolutions(partial(roll_out, residuum_fn, guess)))
        counts[guess_name] = np.array([f(u)[1:] for u in states])
        compiled = f.lower(states[0]).compile()
        programs[guess_name] = lambda f=compiled: jax.block_until_ready(f(states[0]))
    medians = machine.medians_in_turns(programs, lambda times: len(times) >= 20)
    for guess_name, seconds in medians.items():
        yield {
            "problem": name,
            "first guess": guess_name,
            "iterations": f"{np.mean(counts[guess_name]):.2f}",
            "ms for a step": f"{1e3 * seconds / NUM_STEPS:.3f}",
            "machine": machine.describe("2 cores"),
        }


def markdown(rows):
    columns = ["problem", "first guess", "iterations", "ms for a step"]
    return tables.markdown(columns, [[row[c] for c in columns] for row in rows], num_names=2)


def main():
    parser = tables.make_parser(__doc__, quick="Burgers, hardly trained")
    args = parser.parse_args()
    folder, _ = tables.output_folders(args, __file__)
    residuals = {"Burgers": (burgers_problem, burgers_residual)}
    if not args.quick:
        ks = kuramoto_sivashinsky_problem
        residuals["Kuramoto–Sivashinsky"] = (ks, None)  # is preconditioned already
    rows = []
    for name, (make_problem, residuum_fn) in residuals.items():
        problem = make_problem(args.quick)
        with train_and_tabulate.float64():
            states = to_float64(problem.tests["like training"][0])[:8]
            residuum_fn = residuum_fn or problem.residuum_fn
            rows += make_rows(name, problem.stepper, residuum_fn, states)
    print(markdown(rows))
    tables.write_csv(folder / "first_guess.csv", rows)
    tables.write_table(folder / "first_guess.md", markdown(rows))


if __name__ == "__main__":
    main()
