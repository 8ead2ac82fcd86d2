"""Text as SeqIO tasks: TensorFlow Datasets, and every other source of registry.py.

Without a tokenizer a task's "targets" are the text itself: the documents that data/preparation
puts into a store, shard by shard in their order. With one they are its token ids and an EOS, for
use with SeqIO directly. Importing this module imports SeqIO and TensorFlow (2 seconds, 800 MB), so
no other module does so.
"""

from collections.abc import Iterator
from typing import Any

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from data.sources.parts import SPLITS, Part, Source, texts
from data.sources.registry import open_source
from data.sources.tfds_files import TfdsSource
from data.tokenizer import Tokenizer

tf.config.set_visible_devices([], "GPU")  # or TensorFlow takes all of its memory

TEXT_ALONE = tfds.decode.PartialDecoding({"text": True})  # the other fields cost as much again
TEXT_FEATURE = seqio.Feature(seqio.PassThroughVocabulary(0), add_eos=False, rank=0, dtype=tf.string)


def make_task(name: str, source: seqio.DataSource, tokenizer_path: str | None = None) -> seqio.Task:
    """A task over any SeqIO source of examples with a "text"; its feature is "targets".

    Args:
      name: letters, digits and underscores.
      source: seqio.TfdsDataSource, or `PartsSource`.
      tokenizer_path: SentencePiece model with EOS; None leaves the text as it is.

    Raises:
      ValueError: the tokenizer can't be read.
    """
    if tokenizer_path is None:
        feature, steps = TEXT_FEATURE, []
    else:
        Tokenizer(tokenizer_path)  # raises what is wrong with it before SeqIO does, lazily
        feature = seqio.Feature(seqio.SentencePieceVocabulary(tokenizer_path), add_eos=True)
        steps = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    rekey = seqio.map_over_dataset(lambda example: {"targets": example["text"]})
    return seqio.Task(
        name, source=source, preprocessors=[rekey, *steps], output_features={"targets": feature}
    )


def register(
    name: str,
    source: str,
    tokenizer_path: str | None = None,
    text_field: str | None = None,
    validation_fraction: float | None = None,
) -> seqio.Task:
    """Puts a source (registry.py) into SeqIO's registry as a task.

    Raises:
      ValueError: as `open_source` and `make_task`, or the name is taken.
    """
    opened = open_source(source, text_field, validation_fraction)
    provider: seqio.DataSource = PartsSource(opened)
    # SeqIO's own source can't read array_record, nor split by a hash.
    if isinstance(opened, TfdsSource) and not (opened.is_array_record or opened.by_hash):
        provider = seqio.TfdsDataSource(
            opened.dataset,
            opened.data_dir,
            splits=dict(zip(SPLITS, opened.splits)),
            decoders=TEXT_ALONE,
            read_only=True,
        )
    task = make_task(name, provider, tokenizer_path)
    seqio.TaskRegistry.add_provider(name, task)
    return task


class PartsSource(seqio.DataSource):
    """The parts of a source, which are its shards.

    Attributes:
      source: what is read.
      error: why reading ended early, or None; tf.data itself only passes on the words of it.
    """

    def __init__(self, source: Source):
        super().__init__(splits=SPLITS)
        self.source = source
        self.error: ValueError | None = None

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> list[str]:
        return [str(part.index) for part in self.source.parts if split in part.shards]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        """Documents in the order of the store; `shuffle` shuffles the parts."""
        shards = tf.data.Dataset.from_tensor_slices(self.list_shards(split))
        if shard_info:
            shards = shards.shard(shard_info.num_shards, shard_info.index)
        if shuffle:
            shards = shards.shuffle(shards.cardinality(), seed=seed)
        parts = [self.source.parts[int(index)] for index in shards.as_numpy_iterator()]
        return tf.data.Dataset.from_generator(
            lambda: self._examples(split, parts),
            output_signature={"text": tf.TensorSpec((), tf.string)},
        )

    def _examples(self, split: str, parts: list[Part]) -> Iterator[dict[str, str]]:
        try:
            for text in texts(self.source, split, parts):
                yield {"text": text}
        except ValueError as error:
            self.error = error
            raise
