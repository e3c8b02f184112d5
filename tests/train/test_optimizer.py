import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l4jax.train.balance import update_router_bias
from l4jax.train.config import OptimizerConfig
from l4jax.train.optimizer import decays, learning_rate_schedule, make_optimizer

CONFIG = OptimizerConfig(learning_rate=0.01, warmup_steps=5, weight_decay=0.1, clip_norm=1.0)


def test_learning_rate_rises_and_falls():
    rate = learning_rate_schedule(CONFIG, steps=100)
    assert [float(rate(step)) for step in (0, 5, 100)] == pytest.approx([0.0, 0.01, 0.001])
    assert float(rate(3)) == pytest.approx(0.006)


@pytest.mark.oracle
def test_twenty_steps_equal_torch_adamw():
    import torch

    rng = np.random.default_rng(0)
    start = {"q_proj": {"kernel": rng.normal(size=(4, 3))}, "norm": {"scale": rng.normal(size=3)}}
    grads = [jax.tree.map(lambda x: rng.normal(size=x.shape) * 2, start) for _ in range(20)]

    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    optimizer = make_optimizer(CONFIG, steps=20)
    state = optimizer.init(params)
    for grad in grads:
        updates, state = optimizer.update(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grad), state, params)
        params = optax.apply_updates(params, updates)

    matrix, scale = (torch.nn.Parameter(torch.tensor(x)) for x in (start["q_proj"]["kernel"], start["norm"]["scale"]))
    groups = [{"params": [matrix], "weight_decay": 0.1}, {"params": [scale], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    rate = learning_rate_schedule(CONFIG, steps=20)
    for step, grad in enumerate(grads):
        matrix.grad, scale.grad = torch.tensor(grad["q_proj"]["kernel"]), torch.tensor(grad["norm"]["scale"])
        torch.nn.utils.clip_grad_norm_([matrix, scale], 1.0)
        for group in adamw.param_groups:
            group["lr"] = float(rate(step))
        adamw.step()
    np.testing.assert_allclose(params["q_proj"]["kernel"], matrix.detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(params["norm"]["scale"], scale.detach().numpy(), atol=1e-4)


def test_matrices_decay_and_nothing_else():
    params = {
        "embed_tokens": {"embedding": 0},
        "norm": {"scale": 0},
        "layers": {"cycle": {0: {"input_layernorm": {"scale": 0}, "self_attn": {"q_proj": {"kernel": 0, "bias": 0}}}}},
        "experts": {"gate_proj": 0},
        "vision_model": {"class_embedding": 0, "positional_embedding_vlm": 0},
    }
    kept = [jax.tree_util.keystr(path) for path, decay in jax.tree.leaves_with_path(decays(params)) if decay]
    assert kept == ["['experts']['gate_proj']", "['layers']['cycle'][0]['self_attn']['q_proj']['kernel']"]


def test_busy_experts_lose_and_idle_ones_gain():
    bias = update_router_bias(jnp.zeros((1, 4)), jnp.array([[10, 2, 4, 4]]), rate=0.1)
    assert bias[0, 0] < 0 < bias[0, 1]
    np.testing.assert_allclose(bias.sum(), 0, atol=1e-7)


def test_even_load_moves_nothing():
    assert not update_router_bias(jnp.zeros((2, 4)), jnp.full((2, 4), 7), rate=0.1).any()
