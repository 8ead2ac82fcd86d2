"""Log-likelihoods of continuations under a model, in batches.

Context and continuation are tokenised as one string. Requests with the same context share a row:
the context once, then each continuation as a branch that sees the context and itself. A
continuation that is the beginning of another one rides along with it, and one of a single token
(yes, no) needs no branch: the context's last position has its answer. Different contexts are never
packed together. Logits are formed only where something is read.

Rows are padded to a few lengths, chosen so that padding and compiling together cost least; programs
are compiled once in a process, for all tasks and checkpoints of one model.

Shapes: B rows, T positions, M model dim, E scored tokens, V vocabulary.
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from data.tokenizer import Tokenizer
from laser.training import preemption, sharding
from laser.training.share import over_batch
from models.config import ModelConfig
from models.decoder import output_logits
from models.families import Parameters, structure
from models.stack import product_precision

BUCKET = 32  # lengths of rows are multiples of it
ROW_TOKENS = 4096  # of a batch, for each chip that has rows of it; sets how many rows it has
COMPILE_BATCHES = 8  # about what compiling costs, in batches fed meanwhile
READ_CHUNK = 256  # scored tokens whose logits exist at a time: 256 x 32,000 float32 are 33 MB
Progress = Callable[[int, int], None]  # requests done, requests in all


@dataclasses.dataclass(frozen=True)
class Request:
    """What to score: the tokens of `continuation` after those of `context`, which is not empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens to feed: all but the last one."""
        return len(self.context) + len(self.continuation) - 1


@dataclasses.dataclass(frozen=True)
class Score:
    """Sum of log-probabilities in nats, the tokens it is over, and whether each was the likeliest.

    `truncated` says that the left of the context did not fit into the model's length.
    """

    logprob: float
    tokens: int
    greedy: bool
    truncated: bool


def encode_pairs(
    tokenizer: Tokenizer, contexts: Sequence[str], continuations: Sequence[str]
) -> list[Request]:
    """Tokenises context + continuation as one string and cuts it where the context's tokens end.

    Whitespace at the context's end goes to the continuation, as the space before a word does in
    training. Where a token spans the join, at least the last one belongs to the continuation. A
    context begins a document, so EOS comes first.

    Raises:
      ValueError: a continuation has no text.
    """
    starts = [context.rstrip() for context in contexts]
    wholes = [context + ending for context, ending in zip(contexts, continuations)]
    for whole, ending in zip(wholes, continuations):
        if not ending:
            raise ValueError(f"nothing to score after {whole[-60:]!r}: the continuation is empty")
    distinct = list(dict.fromkeys(starts))
    lengths = dict(zip(distinct, map(len, tokenizer.encode_batch(distinct))))
    requests = []
    for start, ids in zip(starts, tokenizer.encode_batch(wholes)):
        cut = min(lengths[start], len(ids) - 1)
        requests.append(Request((tokenizer.eos_id, *ids[:cut]), tuple(ids[cut:])))
    return requests


_Fed = tuple[tuple[int, ...], tuple[int, ...]]  # context and continuation, as the model reads them
TRUNK, PADDING = 0, -1  # segment ids; branches count from 1


@dataclasses.dataclass(frozen=True)
class _Row:
    """A context and branches that go on from it.

    Attributes:
      trunk: the context's tokens.
      branches: what is fed of continuations, all but their last token.
      riders: (request, its branch) for all that are read here.
    """

    trunk: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    riders: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        return len(self.trunk) + sum(map(len, self.branches))

    def tokens_and_segments(self) -> tuple[list[int], list[int]]:
        tokens, segments = list(self.trunk), [TRUNK] * len(self.trunk)
        for number, branch in enumerate(self.branches, 1):
            tokens += branch
            segments += [number] * len(branch)
        return tokens, segments

    def positions(self, branch: int, count: int) -> list[int]:
        """Where `count` tokens are predicted that follow the context along a branch."""
        start = len(self.trunk) + sum(map(len, self.branches[:branch]))
        return [len(self.trunk) - 1, *range(start, start + count - 1)]


@dataclasses.dataclass(frozen=True)
class _Pass:
    """A forward pass under way; `owners` has for each request in it (its index, where its tokens
    begin among the E, where they end)."""

    chunks: list[tuple[jax.Array, jax.Array]]
    owners: list[tuple[int, int, int]]


@dataclasses.dataclass(frozen=True)
class _Programs:
    """What is compiled for a model on a mesh: tokens to hidden states, and those to scores.

    `shapes` has (rows, length, with segments) of all that `hidden` was compiled for.
    """

    hidden: Callable[..., jax.Array]
    read: Callable[..., tuple[jax.Array, jax.Array]]
    shapes: set[tuple[int, int, bool]]


@functools.lru_cache(maxsize=8)
def _programs(config: ModelConfig, mesh: jax.sharding.Mesh) -> _Programs:
    graph, dtype = structure(config), jnp.dtype(config.dtype)

    def of_share(params, batch, share):
        tokens_BT, segment_ids_BT = batch
        shared = None if segment_ids_BT is None else TRUNK
        model = nnx.merge(graph, params)
        return model(tokens_BT, segment_ids_BT, shared, share.gatherer(dtype))[0]

    def hidden(params, tokens_BT, segment_ids_BT=None):
        batch = (tokens_BT, segment_ids_BT)
        return over_batch(of_share, params, batch, lambda _, rows: rows)

    return _Programs(
        jax.jit(sharding.on_mesh(mesh, hidden), out_shardings=sharding.batch_sharding(mesh)),
        jax.jit(
            functools.partial(_read_scores, config=config),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
        ),
        set(),
    )


class Scorer:
    """Scores requests under one model.

    Args:
      config: the model's.
      max_length: tokens that are fed at most; the left of longer contexts is cut off.
      mesh: devices, as in training: parameters and batches are split over it. None: the first one.
      row_tokens: of a batch, for each chip that has rows of it, and of a CPU's for all devices: it
        has at least row_tokens / length rows, and one for each.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_length: int,
        mesh: jax.sharding.Mesh | None = None,
        row_tokens: int = ROW_TOKENS,
    ):
        self.max_length = max_length
        mesh = mesh or sharding.single_device_mesh()
        self._shards = sharding.batch_shards(mesh)
        self._rows_sharding = sharding.batch_sharding(mesh)
        self._replicated = NamedSharding(mesh, PartitionSpec())
        on_cpu = jax.default_backend() == "cpu"  # whose devices share its cores
        self._row_tokens = row_tokens if on_cpu else row_tokens * self._shards
        self._segments_always = on_cpu  # one program serves there
        programs = _programs(_for_scoring(config), mesh)
        self._hidden, self._read, self._compiled = programs.hidden, programs.read, programs.shapes

    def score(
        self, params: Parameters, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[Score]:
        """The requests' scores, in their order.

        Raises:
          ValueError: a request with nothing to score or to condition on, a continuation longer
            than the model's length, or a score that is not finite.
        """
        rows = _share_rows([self._fed(request) for request in requests], self.max_length)
        results: dict[int, Score] = {}
        pending: list[_Pass] = []
        for batch, length, segments in self._batches(rows):
            preemption.between_batches()
            pending.append(self._run(params, requests, batch, length, segments))
            if len(pending) > 1:  # read a pass while the next one runs
                self._collect(pending.pop(0), requests, results)
            if progress:
                progress(len(results), len(requests))
        for last in pending:
            self._collect(last, requests, results)
        return [results[i] for i in range(len(requests))]

    def _collect(
        self, finished: "_Pass", requests: Sequence[Request], results: dict[int, Score]
    ) -> None:
        logprobs, greedy = (np.concatenate(parts) for parts in zip(*finished.chunks))
        for index, start, stop in finished.owners:
            total = float(logprobs[start:stop].sum(dtype=np.float64))
            if not np.isfinite(total):
                raise ValueError("a score is not finite: the checkpoint's parameters are broken")
            truncated = requests[index].length > self.max_length
            results[index] = Score(total, stop - start, bool(greedy[start:stop].all()), truncated)

    def _fed(self, request: Request) -> "_Fed":
        """All tokens but the last one, the newest `max_length` of them."""
        scored = len(request.continuation)
        if not request.context or not 0 < scored <= self.max_length:
            raise ValueError(
                f"a context of {len(request.context)} tokens and a continuation of {scored}: both "
                f"need at least 1, and the continuation at most the model's {self.max_length}"
            )
        kept = self.max_length - (scored - 1)
        return request.context[-kept:], request.continuation[:-1]

    def _batches(self, rows: Sequence[_Row]) -> Iterator[tuple[list[_Row], int, bool]]:
        """Rows, the length they are padded to, and whether they need segments; the longest first.

        Fused attention has no shared segment: rows that need none do without.
        """
        kinds: dict[bool, list[_Row]] = {}
        for row in rows:
            kinds.setdefault(self._segments_always or len(row.branches) > 1, []).append(row)
        for segments, members in kinds.items():
            cuts = self._lengths([row.length for row in members], segments)
            buckets: dict[int, list[_Row]] = {}
            for row in members:
                buckets.setdefault(cuts[bisect.bisect_left(cuts, row.length)], []).append(row)
            for length in sorted(buckets, reverse=True):
                size = self._batch_size(length)
                for start in range(0, len(buckets[length]), size):
                    yield buckets[length][start : start + size], length, segments

    def _lengths(self, rows: Sequence[int], segments: bool) -> list[int]:
        """The lengths on the grid to pad rows of these lengths to, in order: the choice that costs
        least, in tokens fed and in programs that are not compiled yet."""
        grid = _grid(self.max_length)
        counts = np.bincount(np.searchsorted(grid, rows), minlength=len(grid))
        best: list[tuple[int, list[int]]] = [(0, [])]  # of rows up to each length of the grid
        for stop, length in enumerate(grid, 1):
            size = self._batch_size(length)
            compiled = (size, length, segments) in self._compiled
            new = 0 if compiled else COMPILE_BATCHES * self._row_tokens
            choices = []
            for start in range(stop):
                batches = -(-int(counts[start:stop].sum()) // size)
                cost, cuts = best[start]
                used = (batches * size * length + new, [*cuts, length]) if batches else (0, cuts)
                choices.append((cost + used[0], used[1]))
            best.append(min(choices))
        longest = int(np.flatnonzero(counts)[-1])
        return min(best[longest + 1 :])[1]

    def _batch_size(self, length: int) -> int:
        return max(1, self._row_tokens // length // self._shards) * self._shards

    def _run(
        self,
        params: Parameters,
        requests: Sequence[Request],
        batch: list[_Row],
        length: int,
        segments: bool,
    ) -> "_Pass":
        """Starts one forward pass."""
        shape = (self._batch_size(length), length)
        self._compiled.add((*shape, segments))
        tokens_BT, segment_ids_BT = np.zeros(shape, np.int32), np.full(shape, PADDING, np.int32)
        places: list[tuple[int, int, int]] = []  # row, position, target
        owners: list[tuple[int, int, int]] = []
        for i, row in enumerate(batch):
            tokens, ids = row.tokens_and_segments()
            tokens_BT[i, : len(tokens)], segment_ids_BT[i, : len(tokens)] = tokens, ids
            for request, branch in row.riders:
                targets = requests[request].continuation
                owners.append((request, len(places), len(places) + len(targets)))
                positions = row.positions(branch, len(targets))
                places += [(i, at, target) for at, target in zip(positions, targets)]
        places += [(0, 0, 0)] * (-len(places) % READ_CHUNK)
        arrays = [sharding.placed(tokens_BT, self._rows_sharding)]
        if segments:
            arrays.append(sharding.placed(segment_ids_BT, self._rows_sharding))
        hidden_BTM = self._hidden(params, *arrays)
        chunks = []
        for places_C3 in np.array(places, np.int32).reshape(-1, READ_CHUNK, 3):
            placed_C3 = sharding.placed(places_C3, self._replicated)
            chunks.append(self._read(hidden_BTM, params["embedding"], placed_C3))
        return _Pass(chunks, owners)


def _share_rows(fed: Sequence[_Fed], max_tokens: int) -> list[_Row]:
    """Rows in which all requests are read; one of several contexts has at most `max_tokens`."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    for i, (context, _) in enumerate(fed):
        by_context.setdefault(context, []).append(i)
    rows = []
    for trunk, members in by_context.items():
        branches: list[tuple[int, ...]] = []
        riders: list[tuple[int, int]] = []
        # In this order an input comes right before those that it begins.
        for i in sorted(members, key=lambda i: fed[i][1], reverse=True):
            branch = fed[i][1]
            if not branches or branches[-1][: len(branch)] != branch:
                used = len(trunk) + sum(map(len, branches))
                if branches and used + len(branch) > max_tokens:
                    rows.append(_Row(trunk, tuple(branches), tuple(riders)))
                    branches, riders = [], []
                branches.append(branch)
            riders.append((i, len(branches) - 1))
        rows.append(_Row(trunk, tuple(branches), tuple(riders)))
    return rows


def _for_scoring(config: ModelConfig) -> ModelConfig:
    """The same model with its layers in a loop, as every length of rows is compiled, and with a
    kernel of choice: one that training asked for by name may lack the shared segment."""
    attention = config.attention
    if attention.implementation in ("pallas", "cudnn"):
        attention = dataclasses.replace(attention, implementation="auto")
    return dataclasses.replace(config, attention=attention, unroll=False)


def _grid(longest: int) -> list[int]:
    """Lengths that rows may be padded to: BUCKET times 1 to 8, 10, 12, 14, 16, 20 and so on, four
    to an octave, the last one holding `longest`."""
    top = -(-longest // BUCKET)
    steps = {1, 2, 3} | {factor << k for factor in range(4, 8) for k in range(top.bit_length())}
    return [BUCKET * step for step in sorted({*steps, top}) if step <= top]


def _read_scores(hidden_BTM, embedding_VM, places_C3, config: ModelConfig) -> tuple[Any, Any]:
    """log softmax(logits)[target] at each (row, position, target), and whether it is the largest.

    (B, T, M), (V, M), (C, 3) int32 -> (C,) float32, (C,) bool.
    """
    rows, positions, targets = places_C3.T
    with product_precision(config):
        logits_CV = output_logits(hidden_BTM[rows, positions], embedding_VM, config.logits_soft_cap)
    target_C = jnp.take_along_axis(logits_CV, targets[:, None], axis=-1)[:, 0]
    logprobs_C = target_C - jax.nn.logsumexp(logits_CV, axis=-1)
    return logprobs_C, jnp.argmax(logits_CV, axis=-1) == targets
