"""The air-pollution chemistry POLLU (Verwer, 1994; a problem of the test set for IVP solvers):
20 species and 25 reactions, in ppm and minutes, with photolysis that follows the sun.

A state is an array `[20, ...]`; further axes are cells. Everything is written out species by
species, so that each operation is vectorised over the cells, as in the code that KPP generates
for air-quality models: a sparse Jacobian, and its LU factorisation without pivots.

The emulator of chemistry.py needs the residual of a Radau step, the correction of Newton's
method, and the cheap first-order scheme that it corrects. studies/chemistry/solvers.py builds
solvers from the same functions.
"""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


# The published solution of the test set after 60 minutes under constant light.
AFTER_AN_HOUR = dict(
    NO2=0.05646255480022769, NO=0.1342484130422339, O3P=0.4139734331099427e-8,
    O3=0.5523140207484359e-2, HO2=0.2018977262302196e-6, OH=0.1464541863493966e-6,
    HCHO=0.7784249118997964e-1, CO=0.3245075353396018, ALD=0.7494013383880406e-2,
    MEO2=0.1622293157301561e-7, C2O3=0.1135863833257075e-7, CO2=0.2230505975721359e-2,
    PAN=0.2087162882798630e-3, CH3O=0.1396921016840158e-4, HNO3=0.8964884856898295e-2,
    O1D=0.4352846369330103e-17, SO2=0.6899219696263405e-2, SO4=0.1007803037365946e-3,
    NO3=0.1772146513969984e-5, N2O5=0.5682943292316392e-4,
)  # fmt: skip
SPECIES = list(AFTER_AN_HOUR)
REACTIONS = [  # with rate constants; those of photolysis are for the sun in the zenith
    ("NO2 > NO O3P", 0.35, "photolysis"),
    ("NO O3 > NO2", 26.6, ""),
    ("HO2 NO > NO2 OH", 1.23e4, ""),
    ("HCHO > HO2 HO2 CO", 8.6e-4, "photolysis"),
    ("HCHO > CO", 8.2e-4, "photolysis"),
    ("HCHO OH > HO2 CO", 1.5e4, ""),
    ("ALD > MEO2 HO2 CO", 1.3e-4, "photolysis"),
    ("ALD OH > C2O3", 2.4e4, ""),
    ("C2O3 NO > NO2 MEO2 CO2", 1.65e4, ""),
    ("C2O3 NO2 > PAN", 9.0e3, ""),
    ("PAN > C2O3 NO2", 0.022, ""),
    ("MEO2 NO > CH3O NO2", 1.2e4, ""),
    ("CH3O > HCHO HO2", 1.88, ""),
    ("NO2 OH > HNO3", 1.63e4, ""),
    ("O3P > O3", 4.8e6, ""),
    ("O3 > O1D", 3.5e-4, "photolysis"),
    ("O3 > O3P", 0.0175, "photolysis"),
    ("O1D > OH OH", 1.0e8, ""),
    ("O1D > O3P", 4.44e11, ""),
    ("SO2 OH > SO4 HO2", 1.24e3, ""),
    ("NO3 > NO", 2.1, "photolysis"),
    ("NO3 > NO2 O3P", 5.78, "photolysis"),
    ("NO2 O3 > NO3", 0.0474, ""),
    ("NO3 NO2 > N2O5", 1.78e3, ""),
    ("N2O5 > NO3 NO2", 3.12, ""),
]
REFERENCE_STATE = dict(NO=0.2, O3=0.04, HCHO=0.1, CO=0.3, ALD=0.01, SO2=0.007)
FAMILIES = {  # atoms per molecule, conserved by all reactions
    "nitrogen": dict(NO2=1, NO=1, PAN=1, HNO3=1, NO3=1, N2O5=2),
    "carbon": dict(HCHO=1, CO=1, ALD=2, MEO2=1, C2O3=2, CO2=1, PAN=2, CH3O=1),
    "sulphur": dict(SO2=1, SO4=1),
}
REPORTED = ["NO2", "NO", "O3", "HCHO", "CO", "ALD", "PAN", "HNO3"]
DT = 5.0  # minutes


def indices_of(side):
    return [SPECIES.index(name) for name in side.split()]


REACTANTS = [indices_of(text.split(">")[0]) for text, *_ in REACTIONS]
PRODUCTS = [indices_of(text.split(">")[1]) for text, *_ in REACTIONS]
CONSTANTS = [k for _, k, _ in REACTIONS]
NEEDS_SUN = [kind == "photolysis" for *_, kind in REACTIONS]


def stoichiometry():
    """Returns the matrix `[species, reaction]` of molecules made minus molecules used."""
    matrix = np.zeros((len(SPECIES), len(REACTIONS)))
    for j, (reactants, products) in enumerate(zip(REACTANTS, PRODUCTS, strict=True)):
        np.add.at(matrix[:, j], products, 1)
        np.add.at(matrix[:, j], reactants, -1)
    return matrix


def vector(concentrations):
    """Returns an array `[20]` from `{species: number}`."""
    return np.array([concentrations.get(name, 0.0) for name in SPECIES])


STOICHIOMETRY = stoichiometry()
TYPICAL = vector(AFTER_AN_HOUR)
FLOOR = 0.03 * TYPICAL  # errors are relative to concentrations plus this
ATOMS = np.stack([vector(family) for family in FAMILIES.values()])


#
# Conservation
#


def like(y, x):
    """Returns the constants `[20]` as an array with the axes and the dtype of y."""
    return jnp.asarray(x, y.dtype).reshape(-1, *[1] * (y.ndim - 1))


PAN = SPECIES.index("PAN")
OTHERS = ATOMS * (np.arange(len(SPECIES)) != PAN)


def conserve(y, y_prev):
    """Scales the species of each family such that y has the atoms of y_prev. PAN is in two
    families. It keeps its value, unless it has more than half the atoms of one of them."""
    atoms = jnp.tensordot(jnp.asarray(ATOMS, y.dtype), y_prev, 1)
    pan = jnp.minimum(y[PAN], 0.5 * jnp.min(atoms[:2] / like(y, ATOMS[:2, PAN]), axis=0))
    left = atoms - like(y, ATOMS[:, PAN]) * pan
    factors = left / jnp.tensordot(jnp.asarray(OTHERS, y.dtype), y, 1)
    for family, factor in zip(OTHERS, factors, strict=True):
        y = jnp.where(like(y, family) > 0, factor * y, y)
    return y.at[PAN].set(pan)


#
# The sun
#


class Day(NamedTuple):
    """A time, and a place and season: the sine of the sun's elevation is `mean + swing ·
    cos(2π (minute − noon) / day)`."""

    minute: jax.Array  # since midnight
    mean: jax.Array
    swing: jax.Array


def sun(day, delay=0.0):
    """Returns the strength of photolysis after a `delay` in minutes. It is 1 for the sun in the
    zenith."""
    angle = 2 * jnp.pi * (day.minute + delay) / 1440
    elevation = day.mean - day.swing * jnp.cos(angle)
    is_day = elevation > 0.01
    # Along a slanted path, the air absorbs light. The factor is smooth at sunrise.
    light = jnp.exp(0.4 - 0.4 / jnp.where(is_day, elevation, 1.0))
    return computed_once(jnp.where(is_day, light, 0.0))


#
# Rates and their sparse Jacobian
#


def add(terms):
    """Returns the sum of number · array over `[(number, array)]`."""
    total = None
    for number, x in terms:
        term = x if abs(number) == 1 else abs(number) * x
        if total is None:
            total = term if number > 0 else -term
        else:
            total = total + term if number > 0 else total - term
    return total


def rate_constants(light):
    return [k * light if s else k for k, s in zip(CONSTANTS, NEEDS_SUN, strict=True)]


def reaction_rates(y, light):
    """Returns the list of 25 rates of reaction for species `y`, a list of 20 or `[20, ...]`."""
    rates = []
    for k, reactants in zip(rate_constants(light), REACTANTS, strict=True):
        for i in reactants:
            k = k * y[i]
        rates.append(k)
    return rates


def tendency(y, light):
    """Returns dy/dt as a list of 20 arrays."""
    rates = reaction_rates(y, light)
    return [add([(row[j], rates[j]) for j in np.flatnonzero(row)]) for row in STOICHIOMETRY]


def jacobian(y, light):
    """Returns the entries of ∂(dy/dt)/∂y that are not always 0, as `{(row, column): array}`."""
    terms: dict = {}
    for j, (k, reactants) in enumerate(zip(rate_constants(light), REACTANTS, strict=True)):
        for place, column in enumerate(reactants):
            others = [y[i] for i in reactants[:place] + reactants[place + 1 :]]
            derivative = k * others[0] if others else jnp.broadcast_to(k, jnp.shape(y[0]))
            for row in np.flatnonzero(STOICHIOMETRY[:, j]):
                terms.setdefault((row, column), []).append((STOICHIOMETRY[row, j], derivative))
    return {place: add(x) for place, x in terms.items()}


#
# Sparse linear systems. No pivoting is needed: the diagonal of 1/(γh) − ∂f/∂y dominates
#


def elimination_order(pattern, size):
    """Orders the unknowns such that elimination makes few new entries (Markowitz)."""
    pattern, left, order = set(pattern), set(range(size)), []
    while left:
        rows = {p: [i for i in left - {p} if (i, p) in pattern] for p in left}
        columns = {p: [j for j in left - {p} if (p, j) in pattern] for p in left}
        costs = {p: len(rows[p]) * len(columns[p]) for p in sorted(left)}
        pivot = min(costs, key=lambda p: costs[p])
        order.append(pivot)
        left.remove(pivot)
        pattern |= set(itertools.product(rows[pivot], columns[pivot]))
    return order


PATTERN = set(jacobian(np.ones(len(SPECIES)), 1.0))
ORDER = elimination_order(PATTERN, len(SPECIES))


def factorise(matrix, order=None):
    """Returns the LU factors of a matrix `{(row, column): array}`, with inverted pivots."""
    matrix, order = dict(matrix), order or ORDER
    for step, p in enumerate(order):
        later = order[step + 1 :]
        matrix[p, p] = 1 / matrix[p, p]
        for i in (i for i in later if (i, p) in matrix):
            factor = matrix[i, p] = matrix[i, p] * matrix[p, p]
            for j in (j for j in later if (p, j) in matrix):
                product = factor * matrix[p, j]
                matrix[i, j] = matrix[i, j] - product if (i, j) in matrix else -product
        if step % 4 == 3:
            matrix = computed_once(matrix)
    return matrix


def solve(factors, x, order=None):
    """Solves with the result of `factorise`. The right-hand side is a list of arrays."""
    x, order = list(x), order or ORDER
    for step, p in enumerate(order):
        for i in (i for i in order[step + 1 :] if (i, p) in factors):
            x[i] = x[i] - factors[i, p] * x[p]
        if step % 4 == 3:
            x = computed_once(x)
    for step, p in reversed(list(enumerate(order))):
        for j in (j for j in order[step + 1 :] if (p, j) in factors):
            x[p] = x[p] - factors[p, j] * x[j]
        x[p] = x[p] * factors[p, p]
        if step % 4 == 3:
            x = computed_once(x)
    return x


# XLA would fuse each operation with all that use its result, and compute it again in each of
# them. Without these barriers, the steps take several times as long.
computed_once = jax.lax.optimization_barrier


#
# The two-stage Radau IIA method, of third order
#

NODES = (1 / 3, 1.0)
RADAU = np.array([[5 / 12, -1 / 12], [3 / 4, 1 / 4]])


def radau_residual(stages, y, day, h=DT):
    """Returns the residuals of both stages, a list of 40 arrays. The stages are `[2, 20, ...]`,
    and the second one is the state after the step."""
    rates = [tendency(x, sun(day, c * h)) for x, c in zip(stages, NODES, strict=True)]
    return [
        x[i] - y[i] - h * (a * rates[0][i] + b * rates[1][i])
        for x, (a, b) in zip(stages, RADAU, strict=True)
        for i in range(len(SPECIES))
    ]


def newton_matrix(stages, day, h=DT):
    """Returns the derivative of `radau_residual` by the stages, a sparse matrix of 40 rows."""
    n, matrix = len(SPECIES), {}
    for column, (x, c) in enumerate(zip(stages, NODES, strict=True)):
        for (i, j), entry in jacobian(x, sun(day, c * h)).items():
            for row in range(2):
                matrix[row * n + i, column * n + j] = -h * RADAU[row, column] * entry
    return matrix | {(i, i): 1 + matrix.get((i, i), 0.0) for i in range(2 * n)}


RADAU_ORDER = [i + k * len(SPECIES) for i in ORDER for k in (0, 1)]


def newton_correction(residual, stages, day, h=DT):
    """Solves with the Newton matrix. Returns `[2, 20, ...]`."""
    factors = factorise(computed_once(newton_matrix(stages, day, h)), RADAU_ORDER)
    solution = jnp.stack(solve(factors, residual, RADAU_ORDER))
    return solution.reshape(2, len(SPECIES), *solution.shape[1:])


def relative_error(stages, y, day):
    """Returns the corrections `[2, 20, ...]` that Newton's method would make to both stages,
    relative to the concentrations."""
    correction = newton_correction(radau_residual(stages, y, day), stages, day)
    # With a constant Newton matrix, the derivative of the correction by the stages is the
    # identity. No gradient then has to pass through the solution of the linear system.
    constant = jax.lax.stop_gradient
    correction = constant(correction) + stages - constant(stages)
    return correction / constant(stages + like(y, FLOOR))


#
# Euler backward iterative (EBI), the first-order scheme of Hertel et al. (1993): sweeps over
# groups of species that are solved exactly, with the latest values of all others
#

GROUPS = (["O1D"], ["O3P"], ["HO2", "OH"], ["NO3", "N2O5"], ["C2O3", "PAN"], ["MEO2"], ["CH3O"],
          ["HCHO"], ["ALD"], ["SO2"], ["NO2", "NO", "O3"])  # fmt: skip
AT_THE_END = (["CO"], ["CO2"], ["HNO3"], ["SO4"])  # which react no further
NO2_LIGHT, NO_O3, O3P_O3, TO_N2O5, FROM_N2O5 = 0, 1, 14, 23, 24  # indices of reactions


def euler_backward(y, light, h=DT, num_sweeps=2, guess=None):
    """Advances `[20, ...]` by h minutes. The result is positive, but mass is conserved only
    after many sweeps. The sweeps start from y, or from a guess."""
    u = list(y if guess is None else guess)
    solvers = {1: _solve_one, 2: _solve_two, 3: _solve_nitrogen_oxides_and_ozone}
    for groups in num_sweeps * [GROUPS] + [AT_THE_END]:
        for group in groups:
            indices = [SPECIES.index(name) for name in group]
            solutions = solvers[len(group)](indices, y, u, light, h)
            for i, x in zip(indices, solutions, strict=True):
                u[i] = x
        u = list(computed_once(u))
    return jnp.stack(u)


def gain_and_loss(i, u, light, partner=None, skip=()):
    """Returns g, l and c such that du[i]/dt = g + c · u[partner] − l · u[i], without the
    reactions to skip."""
    gain, loss, coupling = [(0.0, u[i])], [(0.0, u[i])], [(0.0, u[i])]
    constants = rate_constants(light)
    for j in (j for j in np.flatnonzero(STOICHIOMETRY[i]) if j not in skip):
        terms, divisor = gain, None
        if i in REACTANTS[j]:
            terms, divisor = loss, i
        elif partner in REACTANTS[j]:
            terms, divisor = coupling, partner
        rate = constants[j]
        for k in (k for k in REACTANTS[j] if k != divisor):
            rate = rate * u[k]
        terms.append((abs(STOICHIOMETRY[i, j]), rate))
    return tuple(add(terms[1:]) if terms[1:] else 0.0 for terms in (gain, loss, coupling))


def _solve_one(indices, y, u, light, h):
    (i,) = indices
    gain, loss, _ = gain_and_loss(i, u, light)
    return [(y[i] + h * gain) / (1 + h * loss)]


def _solve_two(indices, y, u, light, h):
    """Solves for two species that turn into each other."""
    i, j = indices
    gain_i, loss_i, from_j = gain_and_loss(i, u, light, partner=j)
    gain_j, loss_j, from_i = gain_and_loss(j, u, light, partner=i)
    right_i, right_j = y[i] + h * gain_i, y[j] + h * gain_j
    divisor_i, divisor_j = 1 + h * loss_i, 1 + h * loss_j
    determinant = divisor_i * divisor_j - h * from_j * h * from_i
    x = (right_i * divisor_j + h * from_j * right_j) / determinant
    return [x, (right_j + h * from_i * x) / divisor_j]


def _solve_nitrogen_oxides_and_ozone(indices, y, u, light, h):
    """Solves for NO2, NO and O3, which light and the reaction NO + O3 > NO2 keep in balance.
    The unknown is the amount of NO2 that these two make, the root of a quadratic."""
    no2, no, o3 = indices
    constants = rate_constants(light)
    split, join = h * constants[NO2_LIGHT], h * constants[NO_O3]
    right, divisors = {}, {}
    for i in indices:
        skip = (NO2_LIGHT, NO_O3, O3P_O3, TO_N2O5, FROM_N2O5)
        gain, loss, _ = gain_and_loss(i, u, light, skip=skip)
        right[i], divisors[i] = y[i] + h * gain, 1 + h * loss
    # N2O5 and NO3 are in balance. Only the net amount of NO2 that they exchange counts.
    n2o5 = SPECIES.index("N2O5")
    taken = u[n2o5] - y[n2o5]
    right[no2] = right[no2] - jnp.minimum(taken, 0.0)
    divisors[no2] = divisors[no2] + jnp.maximum(taken, 0.0) / jnp.maximum(u[no2], 1e-20)
    # O3P turns into O3 at once. The O3P that NO2 makes is part of the balance below.
    other_o3p, _, _ = gain_and_loss(SPECIES.index("O3P"), u, light, skip=(NO2_LIGHT,))
    right[o3] = right[o3] + h * other_o3p
    a, b = split / divisors[no2], join / (divisors[no] * divisors[o3])
    q = 1 + a + b * (right[no] + right[o3])
    c = b * right[no] * right[o3] - a * right[no2]
    made = 2 * c / (q + jnp.sqrt(jnp.maximum(q * q - 4 * b * c, 0.0)))
    x_no2 = jnp.maximum(right[no2] + made, 1e-6 * right[no2]) / divisors[no2]
    # For the rarer one of NO and O3, a difference is inaccurate. Its balance is accurate.
    balance = lambda i, other: (right[i] + split * x_no2) / (divisors[i] + join * other)
    more_no = right[no] > right[o3]
    common = jnp.where(more_no, right[no] - made, right[o3] - made)
    common = common / jnp.where(more_no, divisors[no], divisors[o3])
    rare = jnp.where(more_no, balance(o3, common), balance(no, common))
    return [x_no2, jnp.where(more_no, common, rare), jnp.where(more_no, rare, common)]


def refined_solution(y, day, num_substeps=50):
    """Advances y by five minutes, accurately: small steps of EBI, extrapolated to second order.
    Needs float64."""

    def advance(n):
        def substep(i, y):
            return euler_backward(y, sun(day, DT * (i + 1) / n), DT / n, num_sweeps=6)

        return jax.lax.fori_loop(0, n, substep, y)

    return 2 * advance(2 * num_substeps) - advance(num_substeps)


def cheap_stages(y, day):
    """Returns approximate stages of a Radau step, by EBI."""
    light = [sun(day, c * DT) for c in NODES]
    return [euler_backward(y, x, c * DT) for x, c in zip(light, NODES, strict=True)]


#
# Initial states and days
#

FAST = ["O3P", "HO2", "OH", "MEO2", "C2O3", "CH3O", "O1D", "NO3", "N2O5"]


def random_cells(key, num_cells):
    """Draws states `[20, num_cells]`: the published solution, times exp(0.6 n) for slow
    species and exp(n) for fast ones, where n is a normal random number."""
    spread = np.array([1.0 if name in FAST else 0.6 for name in SPECIES])[:, None]
    noise = jax.random.normal(key, (len(SPECIES), num_cells))
    return TYPICAL[:, None] * jnp.exp(spread * noise)


def random_days(key, num_days):
    """Draws times, latitudes up to 60° and seasons."""
    keys = jax.random.split(key, 3)
    latitude = jax.random.uniform(keys[0], (num_days,), maxval=np.pi / 3)
    declination = 0.41 * jnp.sin(jax.random.uniform(keys[1], (num_days,), maxval=2 * np.pi))
    minute = DT * jax.random.randint(keys[2], (num_days,), 0, 288)
    mean = jnp.sin(latitude) * jnp.sin(declination)
    return Day(minute.astype(mean.dtype), mean, jnp.cos(latitude) * jnp.cos(declination))


def nrmse(y, solution):
    """Returns the errors `[time, species]` of the reported species, over all cells."""
    indices = [SPECIES.index(name) for name in REPORTED]
    norm = lambda x: np.linalg.norm(np.asarray(x, np.float64)[:, indices], axis=2)
    return norm(y - solution) / norm(solution)


def later(day, num_steps):
    return day._replace(minute=day.minute + DT * num_steps)


@partial(jax.jit, static_argnums=(0, 3))
def rollout(step, y, day, num_steps):
    """Returns states `[num_steps, 20, ...]` after each step `y, day -> y` of five minutes."""

    def next_step(y, n):
        y = step(y, later(day, n))
        return y, y

    return jax.lax.scan(next_step, y, jnp.arange(num_steps))[1]
