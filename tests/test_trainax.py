"""trainax is a second, independent witness: this library reimagines its `Residuum`."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
import trainax

from residuum import Cuts, residuum_loss
from test_residuum import assert_close, FLAGS
from tests.common import also_slow, slow


def trainax_network(name):
    key = jax.random.key(0)
    if name == "mlp":
        network = eqx.nn.MLP(8, 8, 16, 2, jnp.tanh, key=key)
        return eqx.nn.Lambda(lambda u: u + network(u[0])[None])
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv1d(1, 4, 3, padding="SAME", padding_mode="CIRCULAR", key=key),
            eqx.nn.Lambda(jnp.tanh),
            eqx.nn.Conv1d(4, 1, 3, padding="SAME", padding_mode="CIRCULAR", key=key),
        ]
    )


def heat_residuum(u_next, u_prev):
    """Computes the residual of an implicit Euler step of the heat equation, for any batch."""
    neighbours = jnp.roll(u_next, 1, axis=-1) + jnp.roll(u_next, -1, axis=-1)
    return u_next - u_prev - 0.1 * (neighbours - 2 * u_next)


@pytest.mark.parametrize("every", also_slow(2, slowly=[None, 1, 3]))
@pytest.mark.parametrize(
    "network_name, loss_name",
    [
        ("mlp", "MSELoss"),
        pytest.param("mlp", "MAELoss", marks=slow),
        pytest.param("conv", "MSELoss", marks=slow),
    ],
)
def test_trainax_agrees(network_name, loss_name, every):
    network = trainax_network(network_name)
    data = jax.random.normal(jax.random.key(1), (3, 2, 1, 8))
    trainax_loss = getattr(trainax.loss, loss_name)()
    ours = {} if loss_name == "MSELoss" else {"time_level_loss": trainax_loss.single_batch}

    params, static = eqx.partition(network, eqx.is_array)

    def both(params):
        def value_and_grad(loss_fn, *args, **options):
            def loss(params):
                return loss_fn(eqx.combine(params, static), data, *args, **options)

            return jax.value_and_grad(loss)(params)

        for prev, next, weights in itertools.product(
            FLAGS, FLAGS, [None, jnp.array([1.0, -0.5, 0.0, 2.0])]
        ):
            actual = value_and_grad(
                residuum_loss,
                heat_residuum,
                num_rollout_steps=4,
                cuts=Cuts(every or False, prev, next),
                weights=weights,
                **ours,
            )
            reference = trainax.configuration.Residuum(
                4,
                cut_bptt=every is not None,
                cut_bptt_every=every or 1,
                cut_prev=prev,
                cut_next=next,
                time_level_weights=weights,
                time_level_loss=trainax_loss,
            )
            yield actual, value_and_grad(reference, residuum_fn=heat_residuum)

    for actual, expected in jax.jit(lambda params: list(both(params)))(params):
        assert_close(actual, expected)


class ResiduumLossConfiguration(trainax.configuration.BaseConfiguration):
    """Plugs `residuum_loss` into the trainers of trainax."""

    options: dict

    def __call__(self, stepper, data, *, ref_stepper=None, residuum_fn):
        return residuum_loss(stepper, data, residuum_fn, **self.options)


@slow
def test_trainax_trains_with_it():
    data = jax.random.normal(jax.random.key(1), (12, 6, 1, 8))
    training = dict(residuum_fn=heat_residuum, optimizer=optax.adam(1e-2), batch_size=4)
    ours = trainax.GeneralTrainer(
        trainax.TrajectorySubStacker(data, sub_trajectory_len=5),
        ResiduumLossConfiguration(dict(num_rollout_steps=4, cuts=Cuts(bptt=2))),
        num_minibatches=12,
        **training,
    )
    reference = trainax.trainer.ResiduumTrainer(
        data,
        num_rollout_steps=4,
        cut_bptt=True,
        cut_bptt_every=2,
        num_training_steps=12,
        **training,
    )
    network = trainax_network("conv")
    (_, history), (_, expected) = (
        trainer(network, jax.random.key(0), spawn_tqdm=False) for trainer in (ours, reference)
    )
    assert_close(history, expected)
    assert history[-1] < 0.8 * history[0]
