"""Weights on disk: Hugging Face, Meta and l4jax checkpoints, read and written by one table of names."""
