import pytest
from jax.experimental.pallas import tpu as pltpu


@pytest.fixture
def no_races():
    """Fails when kernels that the test interpreted read or write memory that another access may touch meanwhile."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # the verdict is not public

    yield
    try:
        races = interpret_pallas_call.races
        assert races is None or not races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()
