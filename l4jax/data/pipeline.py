"""From conversations to batches of fixed shape: encode, pack into rows, stack, with a state that can be saved.

Every stage of training feeds the same batches; what differs is the source, anything with `len` and `[]`, and the
function that makes messages of its items. The order is a matter of the seed alone. Iterators are grain's: `get_state`
and `set_state` continue exactly, in the middle of a pass and of a half-filled row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from l4jax.processing.chat import Message, Processor

Example = dict[str, np.ndarray]
"""`ids` [t], `loss_mask` [t] and `tiles` [n, 3, S, S] of one conversation."""
Batch = dict[str, np.ndarray]
"""`ids`, `positions`, `segment_ids`, `loss_mask` [B, T] and `tiles` [B, n, 3, S, S], unused ones last and black."""


def encode_example(processor: Processor, messages: Sequence[Message]) -> Example:
    """Returns one conversation as arrays; the loss counts on what the assistant says."""
    encoded = processor.encode(messages, add_generation_prompt=False)
    return {"ids": encoded.ids, "loss_mask": encoded.answer_mask, "tiles": encoded.tiles}


def conversations(
    items: grain.MapDataset, to_messages: Callable[[Any, np.random.Generator], Sequence[Message]], processor: Processor
) -> grain.MapDataset:
    """Returns items as examples, in their order.

    Args:
      items: Of any kind, seeded.
      to_messages: Makes a conversation of an item; its generator depends on the seed and the place in the order alone.
      processor: Of the model to be trained.
    """

    def encode(item: Any, rng: np.random.Generator) -> Example:
        return encode_example(processor, to_messages(item, rng))

    return items.random_map(encode)


def batches(
    examples: grain.MapDataset, *, rows: int, row_tokens: int, row_tiles: int, num_threads: int = 0
) -> grain.IterDataset:
    """Returns batches of packed rows; several conversations share a row, none is cut.

    Args:
      examples: As `conversations` makes them; none longer than a row.
      rows: B.
      row_tokens: T.
      row_tiles: Most tiles that the conversations of one row may have together.
      num_threads: Threads that read ahead.
    """
    read_ahead = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=64)
    packed = grain.experimental.FirstFitPackIterDataset(
        examples.to_iter_dataset(read_ahead),
        length_struct={"ids": row_tokens, "loss_mask": row_tokens, "tiles": row_tiles},
        num_packing_bins=rows,
    )
    return packed.batch(rows, drop_remainder=True).map(tidy)


def tidy(batch: dict[str, np.ndarray]) -> Batch:
    """Returns a packed batch under the model's names."""
    return {
        "ids": batch["ids"],
        "positions": batch["ids_positions"],
        "segment_ids": batch["ids_segment_ids"],
        "loss_mask": batch["loss_mask"],
        "tiles": batch["tiles"],
    }
