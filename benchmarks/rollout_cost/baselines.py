"""Compiles residuum and its baselines."""

import os
import time
from functools import partial

import equinox as eqx
import equinox.internal as eqxi
import jax
import numpy as np
import trainax
from canonical_convolutions import canonical_convolutions

from benchmarks import losses
from benchmarks.rollout_cost.networks import heat_residuum


# PyTorch's idle threads would spin for a while and disturb the program that runs next.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
try:
    import torch
except ImportError:
    torch = None


BASELINES = ("residuum", "trainax", "scan", "segments", "equinox")
BASELINES += ("torch", "torch.compile", "limit")
CONVOLUTIONAL = ("FNO", "conv 1D", "conv 2D", "U-Net")  # an FNO has pointwise (width-1) ones
CHECKPOINT_EVERY = {50: 10, 200: 20, 1000: 25}  # near the square root, and a divisor
# Longer rollouts are left out because they take too long.
MAX_PYTHON_LOOP = {"MLP": 50, "FNO": 50, "conv 1D": 50, "conv 2D": 50, "U-Net": 5}
MAX_TORCH = 50


#
# In JAX. Each loss takes `(stepper, data, residuum_fn, num_steps, k)`
#


def with_trainax(stepper, data, residuum_fn, num_steps, k):
    options = dict(cut_bptt=k is not False, cut_bptt_every=k or 1)
    configuration = trainax.configuration.Residuum(num_steps, **options)
    return configuration(stepper, data, residuum_fn=jax.vmap(residuum_fn))


def equinox_scan(step, init, xs):
    return eqxi.scan(step, init, xs, kind="checkpointed")


def select_baselines(network_name, cut_name, num_steps, derivative):
    """Returns the losses of residuum and of each baseline, each with a transformation of its
    derivative."""
    baselines = {"residuum": losses.with_residuum}
    if num_steps > 1:
        if cut_name == "no cut":
            baselines["residuum, checkpoint"] = partial(losses.with_residuum, checkpoint=True)
            if num_steps in CHECKPOINT_EVERY:
                k = CHECKPOINT_EVERY[num_steps]
                baselines[f"residuum, checkpoint={k}"] = partial(
                    losses.with_residuum, checkpoint=k
                )
        if cut_name == "bptt=5" and num_steps > 5:
            baselines["residuum, unroll=5"] = partial(losses.with_residuum, unroll=5)
        if network_name in CONVOLUTIONAL and num_steps <= MAX_PYTHON_LOOP[network_name]:
            baselines["residuum, unroll=True"] = partial(losses.with_residuum, unroll=True)
    if num_steps <= MAX_PYTHON_LOOP[network_name]:
        baselines["trainax"] = with_trainax
    baselines["scan"] = losses.with_plain_scan
    length = CHECKPOINT_EVERY.get(num_steps, 1)
    baselines["segments"] = partial(losses.with_checkpointed_segments, length=length)
    if derivative != "forward":
        baselines["equinox"] = partial(losses.with_plain_scan, scan=equinox_scan)

    selected = {baseline: (loss, lambda fun: fun) for baseline, loss in baselines.items()}
    if network_name in CONVOLUTIONAL and num_steps > 1:
        for baseline, loss in baselines.items():
            if baseline != "residuum, unroll=True":
                selected[f"{baseline}, canonical"] = (loss, canonical_convolutions)
    return selected


# These are derivatives of a function `loss` of the parameters. The first result is compared
# between the baselines before their run times are measured.
DERIVATIVES = {
    "gradient": lambda loss, params: jax.value_and_grad(loss)(params),
    "forward": lambda loss, params: jax.jvp(loss, (params,), (params,))[::-1],
    "hvp": lambda loss, params: jax.jvp(jax.grad(loss), (params,), (params,))[::-1],
}


def compile_baseline(
    loss, network, data, num_steps, k, derivative="gradient", transform=lambda fun: fun
):
    """Returns a program of no arguments, and its trace time, compile time and memory."""
    params, static = eqx.partition(network, eqx.is_array)

    def differentiate(params, data):
        return DERIVATIVES[derivative](
            lambda params: loss(eqx.combine(params, static), data, heat_residuum, num_steps, k),
            params,
        )

    start = time.perf_counter()
    lowered = jax.jit(transform(differentiate)).lower(params, data)
    traced = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    costs = dict(
        trace_s=traced - start,
        compile_s=end - traced,
        temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
    )
    return lambda: jax.block_until_ready(compiled(params, data))[0], costs


#
# PyTorch: the same networks with the same parameters
#


def torch_step(name):
    """Returns the time step as a function of network and state. The step returns the next state
    and its loss."""
    nn = torch.nn.functional

    def convolve(layer, x):
        dims = x.ndim - 2
        pad = (layer.kernel_size[0] // 2,) * (2 * dims)
        x = nn.pad(x, pad, mode="circular") if any(pad) else x
        return (nn.conv1d if dims == 1 else nn.conv2d)(x, layer.weight, layer.bias.flatten())

    def stepper(twin, u):
        if name == "FNO":
            hidden = convolve(twin.lift, u)
            num_modes = twin.spectral_weights.shape[-1]
            for (real, imag), bypass in zip(twin.spectral_weights, twin.bypasses, strict=True):
                modes = torch.fft.rfft(hidden)[..., :num_modes]
                modes = torch.einsum("iom,bim->bom", torch.complex(real, imag), modes)
                spectral = torch.fft.irfft(modes, n=hidden.shape[-1])
                hidden = torch.relu(spectral + convolve(bypass, hidden))
            return u + convolve(twin.project, hidden)
        if name == "MLP":
            apply = lambda layer, x: nn.linear(x, layer.weight, layer.bias)
        else:
            apply = convolve
        hidden = u
        for layer in twin.layers[:-1]:
            hidden = torch.relu(apply(layer, hidden))
        return u + apply(twin.layers[-1], hidden)

    def step(twin, u_prev):
        u_next = stepper(twin, u_prev)
        residuum = heat_residuum(u_next, u_prev, roll=torch.roll)
        return u_next, torch.mean(residuum**2)

    return step


def torch_programs(name, network, data, num_steps, k, derivative):
    """Returns the programs of PyTorch, or none if the network has no PyTorch twin or the
    rollout is long."""
    if torch is None or name == "U-Net" or num_steps > MAX_TORCH:
        return {}
    params, static = eqx.partition(network, eqx.is_array)
    leaves, treedef = jax.tree.flatten(params)
    params = [torch.tensor(np.asarray(x), requires_grad=True) for x in leaves]
    u_0 = torch.tensor(np.asarray(data[:, 0]))
    step = torch_step(name)

    def segments(step, params):
        """Yields the loss of one segment after the other."""
        twin = eqx.combine(jax.tree.unflatten(treedef, params), static)
        segment_loss, u_prev = 0.0, u_0
        for t in range(num_steps):
            u_prev, level_loss = step(twin, u_prev)
            segment_loss = segment_loss + level_loss
            if t == num_steps - 1 or (k is not False and (t + 1) % k == 0):
                yield segment_loss
                segment_loss, u_prev = 0.0, u_prev.detach()

    def gradient(step):
        total = 0.0
        for x in params:
            x.grad = None
        for segment_loss in segments(step, params):
            segment_loss.backward()
            total += segment_loss.item()
        return total

    if derivative == "gradient":
        # The code of `step`, which is the same for all networks, would keep what was compiled
        # before.
        torch.compiler.reset()
        compiled_step = torch.compile(step)
        return {
            "torch": lambda: gradient(step),
            "torch.compile": lambda: gradient(compiled_step),
        }

    loss = lambda params: sum(segments(step, params))
    fun = loss if derivative == "forward" else torch.func.grad(loss)
    direction = [x.detach() for x in params]
    return {"torch": lambda: torch.func.jvp(fun, (direction,), (direction,))[1]}


def start_torch_compiler():
    """Compiles once, because the first compilation of a process takes seconds longer than any
    other."""
    x = torch.ones(8, requires_grad=True)
    torch.compile(lambda x: torch.sum(x**2))(x).backward()
