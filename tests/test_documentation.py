"""README and the pages of docs/: every block runs, every link leads somewhere."""

import importlib.util
import io
import os
import re
import tomllib
import unittest

import chex
import jax
import jax.numpy as jnp
import pytest
from common import ROOT

from residuum import Cuts, residuum_loss


README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
# In which each block goes on from all those before it. Elsewhere a block goes on from the
# first block of its page (of its section, in README), and can be copied together with that.
WALKS = ("first_steps.md", "scaling_out.md")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def python_blocks(page):
    """Name, blocks that come before, block, for each block of a page."""
    text = page.read_text()
    for section in re.split(r"^## ", text, flags=re.MULTILINE) if page == README else [text]:
        blocks = BLOCK.findall(section)
        for i, block in enumerate(blocks):
            title = section.splitlines()[0] if page == README else f"block {i}"
            yield f"{page.name}, {title}", blocks[:1] if i else [], block


def programs():
    """Name and list of blocks of what a reader would run in one go."""
    for page in PAGES:
        if page.name in WALKS:
            yield page.name, BLOCK.findall(page.read_text())
        else:
            for name, before, block in python_blocks(page):
                yield name, [*before, block]


PROGRAMS = list(programs())


def run(name, program):
    """Runs the blocks of a program one after the other: in float32, as a reader would."""
    text = "".join(program)
    for package in set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    if "jax.shard_map" in text and not hasattr(jax, "shard_map"):
        pytest.skip("needs a newer JAX")
    namespace = {"__name__": "__main__"}
    was_double = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    try:
        for block in program:
            exec(compile(block, name, "exec"), namespace)
    finally:
        jax.config.update("jax_enable_x64", was_double)
    return namespace


#
# What the text says of a block is true; found by a word that is in no other block
#

CLAIMS = {}


def claim(word):
    def register(function):
        CLAIMS[word] = function
        return function

    return register


@claim("print(value)  # 7e-6, from 1.0 before training")
def example_trains(*, value, loss, data, **_):
    assert value < 1e-5
    assert 0.9 < loss(jnp.zeros(9), data) < 1.1


@claim("right, rollout = check(")
def the_solver_has_no_residuum(*, right, wrong, rollout, **_):
    assert right < 1e-13 and wrong > 1
    assert rollout.final_state.shape == (64, 32)


@claim("swapped")
def first_steps_find_mistakes_and_train(
    *, check, data, solver_step, heat_residuum, swapped, wrong_sign, **names
):
    assert check(solver_step, data, heat_residuum) < 1e-13
    assert check(solver_step, data, swapped) > 1
    assert check(solver_step, data, wrong_sign) > 0.5
    loss_of_explicit_step = names["loss_of_explicit_step"]
    for sign, ratio in ((1.0, 16), (-1.0, 4)):
        losses = [loss_of_explicit_step(dt, sign) for dt in (0.05, 0.025)]
        assert abs(losses[0] / losses[1] - ratio) < 0.1 * ratio
    assert names["history"][-1] < 0.1 * names["history"][0]
    assert names["errors"].shape == (10,)


@claim('params["diffusion"]')
def recipe_learns_the_physical_parameter(*, params, **_):
    assert abs(params["diffusion"] - 0.5) < 1e-3


@claim("navier_stokes_residuum")
def recipe_of_the_differential_algebraic_equation_trains(*, check, history, **_):
    assert check() < 1e-9
    assert history[-1] < history[0]


@claim("eqx.nn.BatchNorm")
@claim("nnx.BatchStat")
def recipe_gives_back_new_batch_statistics(*, statistics, grads, **_):
    mean, variance = [x for x in jax.tree.leaves(statistics) if x.shape == (64,)]
    assert jnp.any(mean != 0) and jnp.any(variance != 1)
    assert any(jnp.any(g != 0) for g in jax.tree.leaves(grads))


@claim("checkpointer.restore")
@claim("tree_deserialise_leaves")
def recipe_brings_back_what_was_saved(*, keys, states, data, **_):
    assert (states["key"] == keys).all()
    assert (states["u"] == data).all()


@pytest.mark.parametrize(
    "name, program",
    [
        pytest.param(name, program, marks=() if name.startswith("README") else pytest.mark.slow)
        for name, program in PROGRAMS
    ],
    ids=[f"{i}: {name}" for i, (name, _) in enumerate(PROGRAMS)],
)
def test_block_runs_and_does_what_is_said(name, program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = run(name, program)
    for word, function in CLAIMS.items():
        if any(word in block for block in program[-1:] + program * (name in WALKS)):
            function(**namespace)
    for value in list(namespace.values()):
        if isinstance(value, type) and issubclass(value, chex.TestCase):
            tests = unittest.defaultTestLoader.loadTestsFromTestCase(value)
            result = unittest.TextTestRunner(stream=io.StringIO()).run(tests)
            assert result.wasSuccessful() and result.testsRun > 0


@pytest.mark.parametrize("word", CLAIMS)
def test_claim_has_its_block(word):
    assert any(word in block for _, program in PROGRAMS for block in program)


#
# The messages of the FAQ are those that a user meets
#

ONES = jnp.ones((16, 1, 32))


def difference(u_next, u_prev):
    return u_next - u_prev


def loss(stepper=lambda u: u, data=ONES, **options):
    return residuum_loss(stepper, data, options.pop("residuum_fn", difference), **options)


def close_over_a_ref():
    if not hasattr(jax, "new_ref"):
        pytest.skip("needs a newer JAX")
    ref = jax.new_ref(jnp.array(1.0))
    loss(lambda u: ref[...] * u)


def close_over_a_batch_norm_of_equinox():
    eqx = import_module("equinox")
    norm, statistics = eqx.nn.make_with_state(eqx.nn.BatchNorm)(32, "batch")
    loss(lambda u: norm(u, statistics)[0])


def close_over_a_batch_norm_of_flax():
    nnx = import_module("flax.nnx")
    norm = nnx.BatchNorm(32, rngs=nnx.Rngs(0))
    loss(lambda u: norm(u))


def forget_has_aux_in_a_gradient():
    jax.grad(lambda scale: loss(lambda u: scale * u, has_aux=True))(1.0)


def rematerialise_a_module():
    eqx = import_module("equinox")
    network = eqx.nn.Linear(32, 32, key=jax.random.key(0))
    loss(lambda u: jax.checkpoint(network)(u))


MESSAGES = {
    "data: batch 16, num_snapshots 32, one sample float32[]": lambda: loss(
        lambda u: jnp.ones((32, 32)) @ u, jnp.ones((16, 32), jnp.float32)
    ),
    "stepper must return the next state only": lambda: loss(lambda u: (u, u)),
    "stepper must return a state of the shapes and dtypes of its input": lambda: loss(
        lambda u: u[1:]
    ),
    "must be of shape [batch, num_snapshots, ...]": lambda: loss(data=jnp.ones(32)),
    "must agree with the other leaves on [batch, num_snapshots]": lambda: loss(
        data={"u": ONES, "viscosity": jnp.ones((1, 1))}
    ),
    "of samples make one array, by jnp.stack": lambda: loss(data=[jnp.ones(32)] * 3),
    "cuts must be a Cuts(bptt, prev, next)": lambda: loss(cuts=True),
    "make it static in jax.jit": lambda: jax.jit(
        lambda cuts: loss(num_rollout_steps=10, cuts=cuts)
    )(Cuts(bptt=5)),
    "num_rollout_steps must be a static int": lambda: jax.jit(
        lambda n: loss(num_rollout_steps=n)
    )(3),
    "weights must be a real array of shape [num_rollout_steps]": lambda: loss(
        weights=[1.0, 2.0]
    ),
    "must return at least one array": lambda: loss(residuum_fn=lambda u_next, u_prev: None),
    "time_level_loss must return a real scalar": lambda: loss(time_level_loss=jnp.square),
    "Gradient only defined for scalar-output functions": forget_has_aux_in_a_gradient,
    "Found an unbound axis name": close_over_a_batch_norm_of_equinox,
    "Cannot mutate BatchStat from a different trace level": close_over_a_batch_norm_of_flax,
    "A jax.Ref cannot be closed over": close_over_a_ref,
    "unhashable type, from jax.checkpoint": rematerialise_a_module,
}


def import_module(name):
    return pytest.importorskip(name, reason=f"needs {name}")


@pytest.mark.parametrize(
    "message",
    [
        # What other packages say may differ from version to version.
        pytest.param(m, marks=pytest.mark.slow if "_a_" in provoke.__name__ else ())
        for m, provoke in MESSAGES.items()
    ],
)
def test_message_is_as_in_the_faq(message):
    with pytest.raises(Exception) as raised:
        MESSAGES[message]()
    text = "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert message.split(", from")[0] in text


def test_faq_has_these_messages():
    text = (ROOT / "docs" / "faq.md").read_text()
    messages = text.split("## Messages\n")[1].split("\n## Questions\n")[0]
    assert re.findall(r"^### (.*)$", messages, re.MULTILINE) == list(MESSAGES)


#
# README is complete, and the same as the front page
#


def test_readme_names_every_parameter():
    code = residuum_loss.__kwdefaults__ or residuum_loss.__wrapped__.__kwdefaults__
    for name in ("stepper", "data", "residuum_fn", *code):
        assert f"`{name}`" in README.read_text()


def test_front_page_and_readme_show_the_same_example():
    index = ROOT / "docs" / "index.md"
    assert BLOCK.findall(index.read_text())[0] == BLOCK.findall(README.read_text())[0]


#
# Form
#


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 250


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_fits_the_page(page):
    for block in BLOCK.findall(page.read_text()):
        assert all(len(line) <= 88 for line in block.splitlines()), block


def slug(title):
    """The anchor of a title, on which forges and mkdocs agree for the titles here."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def anchors(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slug(title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_and_sections_that_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"""(?:\]\(|href=")([^)"]+)""", text)
    links = [link for link in links if not link.startswith("http")]
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    listed = re.findall(r"(\w+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in PAGES if page != README)


def test_every_figure_is_shown():
    text = "".join(page.read_text() for page in PAGES)
    assert all(f"assets/{name}" in text for name in os.listdir(ROOT / "assets"))


def test_the_packages_of_the_blocks_are_those_of_the_tests():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = {re.split(r"\W", name)[0] for name in extras["test"] + extras["examples"]}
    known = {"functools", "pathlib", "jax", "numpy", "convolutions_on_cpu", *names}
    text = "".join(block for _, program in PROGRAMS for block in program)
    assert set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)) <= known
