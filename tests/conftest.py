"""Eight CPU devices, programs compiled once, and settings that are put back."""

import gc
import pathlib

import jax
import pytest

# The tests of sharding need eight devices.
jax.config.update("jax_num_cpu_devices", 8)
# Each test, worker and run loads the programs that another one has compiled.
jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".jax_cache")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_finish():
    # Imports are no garbage, and most objects that tracing makes are freed at once. The
    # default thresholds would look for garbage far too often.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield
