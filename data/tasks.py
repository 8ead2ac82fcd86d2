"""Text as SeqIO tasks: TensorFlow Datasets, and every other source of data/sources.py.

Without a tokenizer a task's "targets" are the text itself, which is what data/prepare.py reads;
with one they are its token ids and an EOS, for use with SeqIO directly. Importing this module
imports TensorFlow (4 seconds, a gigabyte), so nothing that reads prepared tokens may do so.
"""

import functools
from collections.abc import Iterator
from typing import Any

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from data.parts import SPLITS, Part, Source, texts
from data.sources import C4, TFDS, TfdsKey, TfdsSource, open_source
from data.tokenizer import Tokenizer

tf.config.set_visible_devices([], "GPU")  # or TensorFlow takes all of its memory

TEXT_ALONE = tfds.decode.PartialDecoding({"text": True})  # the other fields cost as much again
READ_EXAMPLES = 256  # at a time
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
    """Puts a source (data/sources.py) into SeqIO's registry as a task.

    Raises:
      ValueError: as `open_source` and `make_task`, or the name is taken.
    """
    opened = open_source(source, text_field, validation_fraction)
    provider: seqio.DataSource = PartsSource(opened)
    if isinstance(opened, TfdsSource):
        of_tfds = _tfds_source(*opened.key)
        if not is_array_record(of_tfds.tfds_dataset.info):
            provider = of_tfds
    task = make_task(name, provider, tokenizer_path)
    seqio.TaskRegistry.add_provider(name, task)
    return task


def tfds_info(dataset: str, splits: tuple[str, str], data_dir: str | None) -> Any:
    """TFDS's DatasetInfo of a prepared set. Raises ValueError where it is not on this machine."""
    try:
        info = _tfds_source(dataset, splits, data_dir).tfds_dataset.info
        missing = [split for split in splits if split not in info.splits]
        has_text = "text" in info.features
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"source={TFDS}{dataset}: TensorFlow Datasets has no such set ({first}); "
            f"write it as NAME/CONFIG:VERSION, as in {C4}"
        ) from error
    if missing:
        has = f"only {', '.join(info.splits)}" if info.splits else "nothing at all"
        raise ValueError(
            f"source={TFDS}{dataset}: no split {missing[0]!r} in {info.data_dir}, {has}; point "
            f"TFDS_DATA_DIR to where it is, build it with `tfds build {dataset}`, or give a folder "
            "with the .json.gz files of C4; splits of other names are given as in "
            "tfds:c4/multilingual:3.1.0@af"
        )
    if not has_text:
        raise ValueError(f"source={TFDS}{dataset}: no feature 'text', only {info.features}")
    return info


def tfds_texts(key: TfdsKey, split: str, file: int, files: int) -> Iterator[bytes]:
    """Documents of one of a split's files, in order; by a SeqIO task where that can read them."""
    source = _tfds_source(*key)
    if is_array_record(source.tfds_dataset.info):
        yield from _array_record_texts(key, split, file)
        return
    task = make_task("text_of_tfds", source)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1  # each core has a process of its own
    options.deterministic = True
    examples = task.get_dataset(
        split=split,
        shuffle=False,
        shard_info=seqio.ShardInfo(file, files),
        try_in_mem_cache=False,
    ).with_options(options)
    for batch in examples.batch(READ_EXAMPLES).as_numpy_iterator():  # one by one: half as fast
        yield from batch["targets"]


def is_array_record(info: tfds.core.DatasetInfo) -> bool:
    """Whether the files are of the kind that tf.data, and so SeqIO, can't read."""
    return info.file_format == tfds.core.FileFormat.ARRAY_RECORD


def _array_record_texts(key: TfdsKey, split: str, file: int) -> Iterator[bytes]:
    builder, theirs = _tfds_source(*key).tfds_dataset.builder, key[1][SPLITS.index(split)]
    sizes = [f.examples_in_shard for f in builder.info.splits[theirs].file_instructions]
    examples = builder.as_data_source(split=theirs)
    first, stop = sum(sizes[:file]), sum(sizes[: file + 1])
    for start in range(first, stop, READ_EXAMPLES):
        batch = examples.__getitems__(range(start, min(start + READ_EXAMPLES, stop)))
        yield from (example["text"] for example in batch)


@functools.cache
def _tfds_source(
    dataset: str, splits: tuple[str, str], data_dir: str | None
) -> seqio.TfdsDataSource:
    """SeqIO's source, whose splits are called "train" and "validation" whatever TFDS calls them."""
    return seqio.TfdsDataSource(
        dataset,
        data_dir,
        splits=dict(zip(SPLITS, splits)),
        decoders=TEXT_ALONE,
        read_only=True,
    )


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
