"""Text as SeqIO tasks: the embedded corpus, C4 from TFDS, and any folder of text files.

Without a tokenizer a task's "targets" are the text itself, which is what data/prepare.py reads;
with one they are its token ids and an EOS, for use with SeqIO directly. Importing this module
imports TensorFlow (4 seconds, a gigabyte), so nothing that reads prepared tokens may do so.
"""

from collections.abc import Iterator
from typing import Any

import seqio
import tensorflow as tf

from data import corpus
from data.text_files import SPLITS, TextFolder
from data.tokenizer import Tokenizer

tf.config.set_visible_devices([], "GPU")  # or TensorFlow takes all of its memory

C4 = "c4/en:3.1.0"
TEXT_FEATURE = seqio.Feature(seqio.PassThroughVocabulary(0), add_eos=False, rank=0, dtype=tf.string)


def make_task(name: str, source: seqio.DataSource, tokenizer_path: str | None = None) -> seqio.Task:
    """A task over any source of examples with a "text"; its feature is "targets".

    Args:
      name: letters, digits and underscores.
      source: see `bible_source` and `TextFolderSource`.
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


def register_text_folder(
    name: str,
    folder: str,
    tokenizer_path: str | None = None,
    text_field: str = "text",
    validation_fraction: float | None = None,
) -> seqio.Task:
    """Puts a folder of text files (data/text_files.py) into SeqIO's registry as a task.

    Raises:
      ValueError: as `TextFolder` and `make_task`, or the name is taken.
    """
    source = TextFolderSource(TextFolder(folder, text_field, validation_fraction))
    task = make_task(name, source, tokenizer_path)
    seqio.TaskRegistry.add_provider(name, task)
    return task


def bible_source() -> seqio.DataSource:
    """The embedded corpus."""

    def dataset(split: str, shuffle_files: bool = False) -> tf.data.Dataset:
        del shuffle_files  # there is one file
        return tf.data.Dataset.from_tensor_slices({"text": list(corpus.documents(split))})

    return seqio.FunctionDataSource(dataset, splits=SPLITS)


def registered_task(name: str) -> seqio.Task:
    """One of the tasks below. Raises ValueError if its data are not on this machine."""
    task = seqio.TaskRegistry.get(name)
    try:
        task.source.list_shards("train")
    except KeyError as error:
        raise ValueError(
            f"source={name}: TensorFlow Datasets has no {C4} here; point TFDS_DATA_DIR to where it "
            f"is, build it with `tfds build {C4}`, or give a folder with the .json.gz files of C4"
        ) from error
    return task


class TextFolderSource(seqio.DataSource):
    """The files of a folder, which are its shards.

    Attributes:
      folder: what is read.
      error: why reading ended early, or None; tf.data itself only passes on the words of it.
    """

    def __init__(self, folder: TextFolder):
        super().__init__(splits=SPLITS)
        self.folder = folder
        self.error: ValueError | None = None

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> list[str]:
        return [str(file) for file in self.folder.files[split]]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        """Documents in the order of the files' names; `shuffle` shuffles the files."""
        shards = tf.data.Dataset.from_tensor_slices(self.list_shards(split))
        if shard_info:
            shards = shards.shard(shard_info.num_shards, shard_info.index)
        if shuffle:
            shards = shards.shuffle(shards.cardinality(), seed=seed)
        files = [name.decode() for name in shards.as_numpy_iterator()]
        return tf.data.Dataset.from_generator(
            lambda: self._examples(split, files),
            output_signature={"text": tf.TensorSpec((), tf.string)},
        )

    def _examples(self, split: str, files: list[str]) -> Iterator[dict[str, str]]:
        try:
            for text in self.folder.documents(split, files):
                yield {"text": text}
        except ValueError as error:
            self.error = error
            raise


for _name, _source in (
    ("bible", bible_source()),
    ("c4", seqio.TfdsDataSource(C4, splits=SPLITS)),
):
    seqio.TaskRegistry.add_provider(_name, make_task(_name, _source))
