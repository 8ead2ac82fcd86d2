"""Rows and documents of a split as tests compare them."""

import numpy as np


def padded_rows(split, ids, seq_len, pad_id):
    """Rows that may include the shorter one at the end, filled up with `pad_id`: (len(ids),
    seq_len + 1) int32; and (len(ids),): the targets of each that are real, which come first."""
    rows = np.concatenate([split.piece(i, 1, seq_len) for i in ids]).astype(np.int32)
    targets = split.targets(np.array(ids), seq_len)
    rows[np.arange(seq_len + 1) > targets[:, None]] = pad_id
    return rows, targets


def documents_of(split):
    """The tokens of each document, without EOS, as (length,) arrays."""
    stream = split.piece(0, split.num_tokens - 1, 1)[:, 1]  # the leading EOS is no target
    ends = np.cumsum(np.concatenate(list(split.document_lengths())) + 1)
    return [document[:-1] for document in np.split(stream, ends[:-1])]
