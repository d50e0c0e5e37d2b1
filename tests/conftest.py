"""Eight CPU devices, and settings that are put back after the test that needs them."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield
