"""What a token store is made of: the arguments that preparation, its estimate and Beam share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.sources.parts import Source
from data.sources.registry import open_source
from data.tokenizer import Tokenizer


@dataclass(frozen=True)
class StoreConfig:
    """All that the content of a store follows from, and how many records it may lack.

    Attributes:
      source: as in data/sources/registry.py.
      vocab_size: trains a tokenizer of this size on the train split. Either this or `tokenizer`.
      tokenizer: an existing SentencePiece model.
      text_field: of JSON lines, Parquet files or Hugging Face datasets; default "text".
      validation_fraction: of a folder without validation files, see data/sources/text_files.py, or
        of a TFDS set without a validation split.
      drop_duplicates: keep the first of equal documents; reads the source twice.
      max_broken: records that may be broken; they are counted and skipped.
    """

    source: str
    vocab_size: int | None = None
    tokenizer: str | Path | None = None
    text_field: str | None = None
    validation_fraction: float | None = None
    drop_duplicates: bool = False
    max_broken: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for what can be seen to be wrong without the source."""
        if (self.vocab_size is None) == (self.tokenizer is None):
            raise ValueError(
                f"vocab_size={self.vocab_size}, tokenizer={self.tokenizer}: give one of the two"
            )
        if self.max_broken < 0:
            raise ValueError(f"max_broken={self.max_broken}: must be at least 0")

    def open(self) -> Source:
        """The source. Raises ValueError where there is none of that name."""
        return open_source(self.source, self.text_field, self.validation_fraction)

    def request(self, source: Source) -> dict[str, Any]:
        """What a store must have been asked for to be the same as this one, wherever it lies."""
        return {
            "source": source.description(),
            "vocab_size": self.vocab_size,
            "tokenizer_sha256": Tokenizer(self.tokenizer).sha256 if self.tokenizer else None,
            "drop_duplicates": self.drop_duplicates,
        }
