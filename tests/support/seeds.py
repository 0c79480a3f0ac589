"""A pytest plugin for random tests: fresh inputs in every run, and the same again with `--seed`.

A run has one seed, which its last lines name. Every test begins with random generators of its own seed, which
follows from the run's and the test's name; so does every fixture that outlives a test. A test alone therefore
draws what it drew in the whole run, in whatever worker: `pytest --seed N tests/unit/test_fastv.py`.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

_SEED = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="draw what the run with this seed drew; default: a fresh one")


def pytest_configure(config: pytest.Config) -> None:
    given = getattr(config, "workerinput", {}).get("run_seed", config.getoption("--seed"))
    config.stash[_SEED] = random.SystemRandom().randrange(1 << 32) if given is None else given


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Gives a worker of pytest-xdist the run's seed."""
    node.workerinput["run_seed"] = node.config.stash[_SEED]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"random inputs of --seed {terminalreporter.config.stash[_SEED]}")


def derived(config: pytest.Config, name: str) -> int:
    """The seed, 0 .. 2**31 - 1, of a test or fixture by name."""
    name_in_run = f"{config.stash[_SEED]} {name}".encode()
    return int.from_bytes(hashlib.blake2b(name_in_run, digest_size=4).digest(), "big") >> 1


def seed_generators(value: int) -> None:
    """Seed the generators that modules share."""
    random.seed(value)
    np.random.seed(value)
    # A test that does not import torch draws nothing from it.
    if torch := sys.modules.get("torch"):
        torch.manual_seed(value)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    seed_generators(derived(item.config, f"{item.nodeid} setup"))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Iterator[None]:
    if fixturedef.scope == "function":
        return (yield)
    # Whether it is made for this test or was there before, what follows draws the same.
    states = random.getstate(), np.random.get_state()
    torch_state = sys.modules["torch"].get_rng_state() if "torch" in sys.modules else None
    name = f"{request.node.nodeid} {fixturedef.argname} {getattr(request, 'param_index', 0)}"
    seed_generators(derived(request.config, name))
    try:
        return (yield)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        if torch_state is not None:
            sys.modules["torch"].set_rng_state(torch_state)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    seed_generators(derived(item.config, f"{item.nodeid} call"))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The test's own seed."""
    return derived(request.config, request.node.nodeid)


@pytest.fixture
def draw(seed: int) -> random.Random:
    """A generator of the test's own seed."""
    return random.Random(seed)


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """NumPy's generator of the test's own seed."""
    return np.random.default_rng(seed)
