"""The encoder's first stage: pictures and captions find each other among all of a batch (CLIP, arXiv 2103.00020).

Meta based Llama 4's encoder on MetaCLIP, and published of it what is in that paper (arXiv 2309.16671): the data are
balanced over metadata (`l4jax/data/balance.py`), the loss is CLIP's. The module that trains is a small Llama 4: its
vision tower is what the next stage takes over, its text decoder reads captions alone, and two heads map both into one
space. A document is a pair: the mean of its pictures' features, and its last word.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from l4jax.config import Llama4Config
from l4jax.model.linear import Linear, constant
from l4jax.model.llama4 import Llama4
from l4jax.train.config import ContrastiveConfig, ParallelConfig
from l4jax.train.objective import Rows, computing_model

INITIAL_SCALE = 1 / 0.07


class Pairs(NamedTuple):
    """Pictures and captions in the common space, n of them."""

    images_ND: Float[Array, "N D"]
    """Of length 1, float32; so are the texts."""
    texts_ND: Float[Array, "N D"]
    valid_N: Bool[Array, "N"]
    """Which are pairs at all; rows have room for more than there are."""


def tokens_of_documents(segment_ids: Int[Array, "B T"], count: int) -> Bool[Array, "B P T"]:
    """Returns which tokens belong to each of the first `count` documents of a row."""
    return segment_ids[:, None, :] == jnp.arange(1, count + 1)[:, None]


class ContrastiveModel(nnx.Module):
    """Two towers: the vision model and the text decoder of one Llama 4, a head on each, and the scale."""

    def __init__(self, config: Llama4Config, settings: ContrastiveConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.settings = settings
        self.llama = Llama4(config, rngs=rngs, dtype=dtype)
        seen, read = config.vision_config.vision_output_dim, config.text_config.hidden_size
        self.image_head = Linear("BPD,DF->BPF", (seen, settings.width), ("embed", None), rngs=rngs, dtype=dtype)
        self.text_head = Linear("BPD,DF->BPF", (read, settings.width), ("embed", None), rngs=rngs, dtype=dtype)
        self.log_scale = constant(math.log(INITIAL_SCALE), (), (), dtype)

    def __call__(self, rows: Rows, remat: str = "none") -> Pairs:
        """Returns the pairs of some rows: their first `pairs_per_row` documents that have pictures and text."""
        ids, tiles, segment_ids = rows["ids"], rows["tiles"], rows["segment_ids"]
        of_pair = tokens_of_documents(segment_ids, self.settings.pairs_per_row)
        features = self.llama.vision_model(tiles.reshape(-1, *tiles.shape[2:]), remat)
        features = features.reshape(tiles.shape[0], -1, features.shape[-1])
        is_patch = ids == self.llama.config.image_token_index
        row = jnp.clip(jnp.cumsum(is_patch, axis=1) - 1, 0, features.shape[1] - 1)
        seen = jnp.take_along_axis(features, row[..., None], axis=1)
        shares = (of_pair & is_patch[:, None]).astype(jnp.float32)
        num_patches = shares.sum(-1, keepdims=True)
        images = jnp.einsum("BPT,BTD->BPD", shares / jnp.maximum(num_patches, 1), seen.astype(jnp.float32))

        # Captions alone: that a picture has many tiles must not give it away.
        is_text = rows["loss_mask"] & (segment_ids > 0)
        positions = jnp.einsum("BPT,BPT->BT", of_pair, jnp.cumsum(of_pair & is_text[:, None], axis=-1) - 1)
        read, _, _ = self.llama.hidden(
            ids,
            positions=jnp.maximum(positions, 0).astype(jnp.int32),
            segment_ids=jnp.where(is_text, segment_ids, 0),
            remat=remat,
        )
        index = jnp.where(of_pair & is_text[:, None], jnp.arange(ids.shape[1]), -1).max(-1)
        texts = jnp.take_along_axis(read, jnp.maximum(index, 0)[..., None], axis=1)

        def in_common_space(head: Linear, x: Float[Array, "B P D"]) -> Float[Array, "N F"]:
            y = head(x.astype(read.dtype)).astype(jnp.float32)
            return (y * jax.lax.rsqrt(jnp.square(y).sum(-1, keepdims=True) + 1e-12)).reshape(-1, y.shape[-1])

        valid = (index >= 0) & (num_patches[..., 0] > 0)
        return Pairs(in_common_space(self.image_head, images), in_common_space(self.text_head, texts), valid.ravel())

    def scale(self) -> Float[Array, ""]:
        return jnp.minimum(jnp.exp(self.log_scale[...].astype(jnp.float32)), self.settings.max_scale)


def info_nce(pairs: Pairs, scale: Float[Array, ""]) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Returns the loss of each pair, and 1 where its picture finds its caption; 0 where there is no pair.

    The loss is the mean of two cross entropies, of the captions given the picture and of the pictures given the
    caption, over cosine similarities times `scale`; log N where nothing has been learned.
    """
    logits_NN = scale * jnp.einsum("ND,MD->NM", pairs.images_ND, pairs.texts_ND)
    both = pairs.valid_N[:, None] & pairs.valid_N
    logits_NN = jnp.where(both, logits_NN, -1e30)
    own_N = jnp.diagonal(logits_NN)
    losses_N = 0.5 * (jax.nn.logsumexp(logits_NN, axis=1) + jax.nn.logsumexp(logits_NN, axis=0)) - own_N
    found_N = (own_N >= logits_NN.max(axis=1)).astype(jnp.float32)
    return jnp.where(pairs.valid_N, losses_N, 0.0), jnp.where(pairs.valid_N, found_N, 0.0)


class Contrastive:
    """The objective. Its numbers count pairs where others count tokens."""

    def __init__(self, graphdef: nnx.GraphDef, parallel: ParallelConfig, num_sources: int):
        self.graphdef, self.parallel, self.num_sources = graphdef, parallel, num_sources

    def __call__(self, params, rows: Rows, fixed, router_bias, step):
        model = computing_model(self.graphdef, params, self.parallel)
        pairs = model(rows, self.parallel.remat)
        losses_N, found_N = info_nce(pairs, model.scale())
        num_pairs = pairs.valid_N.sum(dtype=jnp.float32)
        source_N = self._sources(rows, pairs.valid_N.size // rows["ids"].shape[0])

        def by_source(values_N):
            is_source = (source_N == jnp.arange(self.num_sources)[:, None]) & pairs.valid_N
            sums = jnp.where(is_source, values_N, 0.0).sum(-1)
            return jnp.stack([jnp.zeros_like(sums), sums], axis=-1).ravel()  # pairs have pictures

        sums = {
            "loss": by_source(losses_N),
            "accuracy": by_source(found_N),
            "tokens": by_source(jnp.ones_like(losses_N)),
        }
        return losses_N.sum() / jnp.maximum(num_pairs, 1.0), {"buckets": sums}

    def _sources(self, rows: Rows, pairs_per_row: int) -> Int[Array, "N"]:
        of_pair = tokens_of_documents(rows["segment_ids"], pairs_per_row)
        return (jnp.where(of_pair, rows["source_ids"][:, None], 0).max(-1) - 1).ravel()
