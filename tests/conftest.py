"""Settings for every test: CPU with eight emulated devices, typed shapes, and the oracles."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import absl.flags
import jax
import pytest
from jaxtyping import install_import_hook

from tests.disks import mount  # noqa: F401, a fixture
from tests.oracle import import_torchvision

# Interpreted kernels call back into jax. On two cores, a test that dispatches the next thing meanwhile could take the
# thread that they wait for, and both would wait for ever.
jax.config.update("jax_cpu_enable_async_dispatch", False)
absl.flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for it
install_import_hook(["l4jax.model", "pallas_kernels"], "beartype.beartype")


def pytest_addoption(parser):
    parser.addoption("--no-oracle", action="store_true", help="leave out what compares with torch and transformers")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--no-oracle"):
        oracle = [item for item in items if item.get_closest_marker("oracle")]
        config.hook.pytest_deselected(items=oracle)
        items[:] = [item for item in items if item not in oracle]


@pytest.fixture(scope="session")
def torchvision():
    return import_torchvision()


@pytest.fixture(autouse=True)
def _oracle_can_be_imported(request):
    """transformers imports torchvision wherever it is installed."""
    if request.node.get_closest_marker("oracle"):
        request.getfixturevalue("torchvision")
