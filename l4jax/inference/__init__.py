"""Words out: the engine of prefill and decoding, sampling, streaming, and what `l4jax.load` returns."""
