"""The networks of studies/ar_densed_burgers/published_weights.py agree with slow sums in NumPy,
for random weights in the layout of the published ones."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from studies.ar_densed_burgers import published_weights as ar_densed


KURAMOTO_SIVASHINSKY, BURGERS = "Kuramoto–Sivashinsky", "Burgers"
NUM_PAST = {KURAMOTO_SIVASHINSKY: 2, BURGERS: 5}
NUM_PARAMETERS = {KURAMOTO_SIVASHINSKY: 4820, BURGERS: 13_441}  # of the published networks


def random_weights(equation, seed=0):
    rng = np.random.default_rng(seed)
    weights = {}

    def convolution(name, c_in, c_out, kernel_size):
        size = (c_out, c_in, kernel_size)
        weights[f"{name}.weight"] = rng.normal(size=size) / (c_in * kernel_size) ** 0.5

    def normalisation(name, channels):
        for key in ("weight", "bias", "running_mean"):
            weights[f"{name}.{key}"] = rng.normal(size=channels)
        weights[f"{name}.running_var"] = rng.uniform(0.5, 2, size=channels)

    if equation == BURGERS:
        convolution("In_conv", 5, 16, 5)
        normalisation("In_conv_norm", 16)
        convolution("In_conv2", 16, 32, 3)
        normalisation("In_conv_norm2", 32)
        convolution("In_conv3", 32, 64, 3)
        channels, num_layers = 64, 1
    else:
        convolution("In_conv", 2, 32, 7)
        channels, num_layers = 32, 4
    for i in range(num_layers):
        normalisation(f"DecBlock1.denselayer{i + 1}.norm1", channels)
        convolution(f"DecBlock1.denselayer{i + 1}.conv1", channels, 4, 3)
        channels += 4
    outs = (channels // 2, channels // 4, 1)
    ins = (channels, *outs[:2])
    for i, (c_in, c_out, kernel_size) in enumerate(zip(ins, outs, (1, 3, 5), strict=True)):
        normalisation(f"LastTransUp.norm{i + 1}", c_in)
        convolution(f"LastTransUp.conv{i + 1}", c_in, c_out, kernel_size)
    return weights


def slow_convolution(u, kernel, stride=1):
    """Computes out[o, x] = Σ_c Σ_j kernel[o, c, j] u[c, (stride x + j - half) mod X]."""
    num_points, kernel_size = u.shape[-1], kernel.shape[-1]
    out = np.zeros((len(kernel), num_points // stride))
    for x in range(num_points // stride):
        for j in range(kernel_size):
            out[:, x] += (
                kernel[:, :, j] @ u[:, (stride * x + j - kernel_size // 2) % num_points]
            )
    return out


def slow_network(weights, u):
    def activate(name, u):
        scale = weights[f"{name}.weight"] / np.sqrt(weights[f"{name}.running_var"] + 1e-5)
        centred = u - weights[f"{name}.running_mean"][:, None]
        return np.maximum(scale[:, None] * centred + weights[f"{name}.bias"][:, None], 0)

    def layer(block, i, u):
        kernel = weights[f"{block}.conv{i}.weight"]
        return slow_convolution(activate(f"{block}.norm{i}", u), kernel)

    if len(u) == NUM_PAST[BURGERS]:
        u = activate("In_conv_norm", slow_convolution(u, weights["In_conv.weight"]))
        u = activate("In_conv_norm2", slow_convolution(u, weights["In_conv2.weight"]))
        u = slow_convolution(u, weights["In_conv3.weight"], stride=2)
        num_layers = 1
    else:
        u = slow_convolution(u, weights["In_conv.weight"], stride=2)
        num_layers = 4
    for i in range(num_layers):
        u = np.vstack([u, layer(f"DecBlock1.denselayer{i + 1}", 1, u)])
    u = layer("LastTransUp", 1, u)
    u = activate("LastTransUp.norm2", u)
    fine = np.zeros((len(u), 2 * u.shape[-1]))
    fine[:, ::2] = fine[:, 1::2] = u
    u = slow_convolution(fine, weights["LastTransUp.conv2.weight"])
    return layer("LastTransUp", 3, u)


@pytest.fixture(params=NUM_PAST)
def equation(request):
    return request.param


@pytest.fixture
def weights(equation):
    return random_weights(equation)


@pytest.fixture
def u(equation):
    return np.random.default_rng(1).normal(size=(NUM_PAST[equation], 24))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_convolution(kernel_size, stride):
    u = np.random.default_rng(1).normal(size=(2, 24))
    kernel = np.random.default_rng(2).normal(size=(3, 2, kernel_size))
    actual = ar_densed.convolve(jnp.asarray(u), jnp.asarray(kernel), stride)
    np.testing.assert_allclose(actual, slow_convolution(u, kernel, stride), atol=1e-9)


def test_network(weights, u):
    actual = jax.jit(ar_densed.ar_densed)(weights, u)
    assert actual.shape == (1, 24)
    np.testing.assert_allclose(actual, slow_network(weights, u), atol=1e-9)


def test_network_commutes_with_shifts_of_its_coarse_grid_only(weights, u):
    network = jax.jit(lambda shift: ar_densed.ar_densed(weights, jnp.roll(u, shift, -1)))
    np.testing.assert_allclose(network(4), jnp.roll(network(0), 4, -1), atol=1e-9)
    assert jnp.max(jnp.abs(network(1) - jnp.roll(network(0), 1, -1))) > 0.01


def test_the_equation_is_inferred_from_the_weights(equation, weights):
    assert ar_densed.of_burgers(weights) == (equation == BURGERS)


def test_number_of_parameters(equation, weights):
    assert ar_densed.num_parameters(weights) == NUM_PARAMETERS[equation]


def test_a_trajectory_begins_with_a_state_that_stood_still(equation, weights):
    network = jax.jit(ar_densed.ar_densed)
    states = jnp.asarray(np.random.default_rng(3).normal(size=(2, 1, 24)))
    u = ar_densed.trajectories(weights, states, num_steps=3)
    assert u.shape == (2, 4, 1, 24)
    for sample in range(2):
        past = NUM_PAST[equation] * [states[sample, 0]]
        for t in range(3):
            past.append(network(weights, jnp.stack(past[-NUM_PAST[equation] :]))[0])
            np.testing.assert_allclose(u[sample, t + 1, 0], past[-1], atol=1e-9)


def test_weights_are_read_from_the_network_of_the_file(weights, monkeypatch):
    """The weights are read from the network in the file, and not from the moments next to it.
    These tests do not need PyTorch, which reads the file."""
    tensor = lambda x: SimpleNamespace(numpy=lambda: np.asarray(x))
    state = {f"base.model.features.{name}": tensor(x) for name, x in weights.items()}
    state |= {
        "base.model.log_beta": tensor(np.zeros(1)),
        "base.model.features.LastTransUp.norm1.num_batches_tracked": tensor(7),
        "model_features_In_conv_weight_mean": tensor(np.zeros(7)),
    }
    load = lambda path, **_: {"weights.pth": {"epoch": 100, "state_dict": state}}[path]
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(load=load))
    actual = ar_densed.read_weights("weights.pth")
    assert actual.keys() == weights.keys()
    for name, x in weights.items():
        np.testing.assert_array_equal(actual[name], x)
