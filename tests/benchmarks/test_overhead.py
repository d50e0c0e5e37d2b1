"""The arms of the benchmark of costs are what they are called."""

import numpy as np
import overhead
import pytest

import optax_superconv as osc

pytestmark = pytest.mark.slow


def test_a_held_rate_is_the_one_that_is_applied():
    params = overhead.mlps_of(overhead.make_params(2, 8))
    tx = overhead.dials()["adamw, rate held"]
    _, state = tx.update(params, tx.init(params), params)
    applied = osc.read_hyperparams(state)["learning_rate"]
    np.testing.assert_allclose(applied, overhead.PEAK / 2, rtol=1e-6)


def test_all_but_the_last_of_two_groups_are_frozen():
    params = overhead.mlps_of(overhead.make_params(4, 8))
    labels = overhead.in_groups(params, 2)
    assert [labels[f"block_{k}"]["mlp_up"] for k in range(4)] == [0, 0, 1, 1]
    state = overhead.unfreezing_adamw(labels).init(params)
    applied = osc.read_hyperparams(state)
    assert bool(applied["frozen/0"])
    assert not applied["frozen/1"]


def test_kernels_are_fusions_custom_calls_and_copies():
    program = """
    %fused_computation (param_0: f32[8]) -> f32[8] {
      ROOT %add.1 = f32[8]{0} add(%param_0, %param_0), metadata={op_name="fusion"}
    }
    ENTRY %main (p: f32[8]) -> (f32[8], f32[8]) {
      %p = f32[8]{0} parameter(0)
      %loop_fusion = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused_computation
      %pair = (f32[8]{0}, /*index=1*/f32[8]{0}) fusion(%p), kind=kInput, calls=%f
      %gemm = (f32[8]{0}, s8[4]{0}) custom-call(%p), custom_call_target="gemm"
      %copy.1 = f32[8]{0} copy(%gemm.0)
      ROOT %tuple = (f32[8]{0}, f32[8]{0}) tuple(%loop_fusion, %copy.1)
    }"""
    assert overhead.kernels_in(program) == 4
