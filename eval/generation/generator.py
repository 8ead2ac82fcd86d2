"""Text from a model: batches of prompts of any lengths, with a cache of keys and values.

A prompt is read in pieces of PIECE tokens and continued STEPS tokens at a time; between those, the
host looks for stop strings and hands out text. Every piece and every step has the same shape
whatever the lengths in the batch are, so a prompt's continuation does not depend on its
neighbours, and the draws for it follow from the seed and its place in the list of prompts.

Shapes: B rows, C tokens of a piece, N steps, M model dim, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from data.tokenizer import Tokenizer
from eval.generation.sampling import GREEDY, Sampling, choose
from laser.attention.decode import BLOCK
from laser.training import preemption, sharding
from models.config import ModelConfig, require
from models.decoding import Cache, append, empty_cache, next_logits, unstack
from models.families import Parameters, abstract_parameters

PIECE = BLOCK  # tokens of a prompt that are read at once; a multiple of BLOCK
STEPS = 8  # tokens between two looks of the host
ROWS = 8  # prompts in a batch, for each chip

OnText = Callable[[int, str], None]  # a prompt's index in the list, a new piece of its text
# A prompt's index, all its new tokens so far, whether it has ended; returns whether to end it.
Watch = Callable[[int, list[int], bool], bool]


class _State(NamedTuple):
    """A batch between two looks: its cache, and what the next token comes from, (B, M)."""

    cache: Cache
    last_BM: jax.Array


class Generator:
    """Continues prompts under one model.

    Args:
      config: the model's.
      tokenizer: of the prompts.
      mesh: devices, as in training: parameters and cache are split over it. None: the first one.
      max_length: tokens that the model may see at once, such as those of a row in training.
      rows: prompts in a batch, at most, for each chip that has rows of it; of a CPU for all its
        devices, rounded up to their number.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh | None = None,
        *,
        max_length: int,
        rows: int = ROWS,
    ):
        self.max_length = max_length
        self._config, self._tokenizer = config, tokenizer
        mesh = mesh or sharding.single_device_mesh()
        self._shards = sharding.batch_shards(mesh)
        self._rows = rows if jax.default_backend() == "cpu" else rows * self._shards
        self._by_row = sharding.batch_sharding(mesh)
        self._replicated = NamedSharding(mesh, PartitionSpec())
        state_shardings = _state_shardings(config, mesh)
        self._unstack = jax.jit(
            functools.partial(unstack, config), out_shardings=_unstacked_shardings(config, mesh)
        )
        self._start = jax.jit(
            functools.partial(_start, config), static_argnums=(0, 1), out_shardings=state_shardings
        )
        self._read = jax.jit(
            functools.partial(_read, config), donate_argnums=1, out_shardings=state_shardings
        )
        self._continue = jax.jit(
            functools.partial(_continue, config, tokenizer.vocab_size, tokenizer.eos_id),
            static_argnames="mode",
            donate_argnums=1,
            out_shardings=(self._replicated, self._replicated, state_shardings),
        )

    def generate(
        self,
        params: Parameters,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        on_text: OnText | None = None,
    ) -> list[str]:
        """The continuations of prompts, in their order, without the prompts themselves.

        Each ends at the end of the document, before the first of the `stop` strings, or after
        `max_new_tokens`.

        Args:
          params: as in training, float32 and stacked by layer, on the mesh.
          prompts: texts, each of which begins a document (EOS comes first), or token ids, which are
            taken as they are.
          max_new_tokens: of each continuation, at most.
          temperature, top_k, top_p, seed: see `Sampling`.
          stop: strings that end a continuation and are not part of it.
          on_text: is called with a prompt's index and the text that has been added to it, in the
            order of generation; the pieces of a prompt make up its continuation.

        Raises:
          ValueError: an argument without a meaning, a prompt that is empty or leaves no room for
            `max_new_tokens` in the model's length, or parameters that give no finite logits.
        """
        require("" not in stop, f"stop={list(stop)}: an empty string is found everywhere")
        encoded = [
            [self._tokenizer.eos_id, *self._tokenizer.encode(p)] if isinstance(p, str) else p
            for p in prompts
        ]
        texts = [_Text(self._tokenizer, stop) for _ in prompts]

        def watch(index: int, ids: list[int], ended: bool) -> bool:
            piece = texts[index].update(ids, ended)
            if piece and on_text:
                on_text(index, piece)
            return texts[index].ended

        self.generate_tokens(
            params,
            encoded,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p, seed),
            watch=watch,
        )
        return [text.sent for text in texts]

    def generate_tokens(
        self,
        params: Parameters,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        watch: Watch | None = None,
    ) -> list[list[int]]:
        """The same in token ids: new ones only, without the EOS that ends them.

        `watch` is called after every few tokens of a prompt, with its index, all its new ids and
        whether they have ended, and may end it by returning True. Raises as `generate`.
        """
        self._check(prompts, max_new_tokens)
        made: list[list[int]] = [[] for _ in prompts]
        if not prompts:
            return made
        unstacked = self._unstack(params)
        # The longest first: what does not fit into memory fails at once.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        size = self._batch_size(len(prompts))
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            state = self._prefilled(unstacked, [prompts[i] for i in batch], size, max_new_tokens)
            self._extend(unstacked, state, batch, size, max_new_tokens, sampling, watch, made)
        return made

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        require(max_new_tokens > 0, f"max_new_tokens={max_new_tokens}: must be at least 1")
        for i, prompt in enumerate(prompts):
            require(len(prompt) > 0, f"prompt {i} has no tokens: it must begin with EOS at least")
            room = self.max_length + 1 - len(prompt)  # the last token is not read again
            fit = f"at most {room} fit" if room > 0 else "shorten it"
            require(
                max_new_tokens <= room,
                f"prompt {i} has {len(prompt)} tokens with its EOS and max_new_tokens="
                f"{max_new_tokens}: the model's length is {self.max_length}, so {fit}",
            )

    def _batch_size(self, prompts: int) -> int:
        """A power of two for few prompts, so that few programs are compiled."""
        rows = min(self._rows, 2 ** (prompts - 1).bit_length())
        return -(-rows // self._shards) * self._shards

    def _prefilled(
        self, params: Parameters, prompts: Sequence[Sequence[int]], size: int, new_tokens: int
    ) -> _State:
        """The state after the prompts, which are padded to `size` rows."""
        pieces = -(-max(map(len, prompts)) // PIECE)
        tokens_BT = np.full((size, pieces * PIECE), self._tokenizer.eos_id, np.int32)
        real_BT = np.zeros(tokens_BT.shape, bool)
        real_BT[:, 0] = True  # rows without a prompt have one token, as good as any
        for i, prompt in enumerate(prompts):
            tokens_BT[i, : len(prompt)] = prompt
            real_BT[i, : len(prompt)] = True
        state = self._start(size, _capacity(pieces * PIECE + new_tokens))
        for at in range(0, pieces * PIECE, PIECE):
            piece = (x[:, at : at + PIECE] for x in (tokens_BT, real_BT))
            state = self._read(params, state, *(sharding.placed(x, self._by_row) for x in piece))
        return state

    def _extend(
        self,
        params: Parameters,
        state: _State,
        batch: Sequence[int],
        size: int,
        max_new_tokens: int,
        sampling: Sampling,
        watch: Watch | None,
        made: list[list[int]],
    ) -> None:
        """Adds new tokens to `made` of each prompt of the batch until all have ended."""
        indices_B = np.array([*batch, *[0] * (size - len(batch))], np.int32)
        done_B = np.arange(size) >= len(batch)
        for at in range(0, max_new_tokens, STEPS):
            preemption.between_batches()
            count = min(STEPS, max_new_tokens - at)
            tokens_BN, finite, state = self._continue(
                params,
                state,
                sharding.placed(done_B, self._by_row),
                sharding.placed(indices_B, self._by_row),
                np.int32(at),
                np.int32(count),
                dataclasses.astuple(sampling),
                mode=sampling.mode,
            )
            require(bool(finite), "logits are not finite: the model's parameters are broken")
            for row, index in enumerate(batch):
                if done_B[row]:
                    continue
                new = np.asarray(tokens_BN)[row, :count].tolist()
                ended = self._tokenizer.eos_id in new
                made[index] += new[: new.index(self._tokenizer.eos_id)] if ended else new
                ended = ended or at + count == max_new_tokens
                done_B[row] = bool(watch and watch(index, made[index], ended)) or ended
            if done_B.all():
                return


class _Text:
    """A continuation as text, which grows.

    Attributes:
      sent: all pieces so far.
      ended: it won't grow any more.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self.sent, self.ended = "", False
        self._tokenizer, self._stop = tokenizer, stop

    def update(self, ids: Sequence[int], ended: bool) -> str:
        """The piece that is new, when the continuation has these tokens."""
        text = self._tokenizer.decode(ids)
        found = [at for at in map(text.find, self._stop) if at >= 0]
        self.ended = ended or bool(found)
        whole = text[: min(found)] if found else text if ended else text[: self._settled(text)]
        piece = whole[len(self.sent) :]
        self.sent += piece
        return piece

    def _settled(self, text: str) -> int:
        """How much of it stays: the rest may be half a character or the beginning of a stop."""
        text = text.rstrip("\ufffd")
        end = len(text)
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:length]):
                    end = min(end, len(text) - length)
                    break
        return max(end, len(self.sent))


def _capacity(slots: int) -> int:
    """Slots of the cache, twice as many each time, so that few programs are compiled."""
    blocks = -(-slots // BLOCK)
    return BLOCK * 2 ** (blocks - 1).bit_length()


def _state_shardings(config: ModelConfig, mesh: jax.sharding.Mesh):
    """Rows and heads as in training: a `_State` of shardings."""
    abstract = jax.eval_shape(functools.partial(_start, config, sharding.batch_shards(mesh), BLOCK))

    rows = sharding.batch_axes(mesh)

    def sharding_of(x):
        specs = {0: (), 4: (rows, sharding.TENSOR)}  # the slot, keys and values
        return NamedSharding(mesh, PartitionSpec(*specs.get(x.ndim, (rows,))))

    return jax.tree.map(sharding_of, abstract)


def _unstacked_shardings(config: ModelConfig, mesh: jax.sharding.Mesh):
    """The layout of training, without the dim of layers."""
    abstract = abstract_parameters(config)
    shardings = sharding.state_shardings(mesh, abstract)
    layer = jax.tree.map(
        lambda s: NamedSharding(mesh, PartitionSpec(*s.spec[1:])), shardings["blocks"]
    )
    return {**shardings, "blocks": [layer] * config.num_layers}


def _start(config: ModelConfig, rows: int, capacity: int) -> _State:
    last_BM = jnp.zeros((rows, config.model_dim), jnp.dtype(config.dtype))
    return _State(empty_cache(config, rows, capacity), last_BM)


def _read(config: ModelConfig, params: Parameters, state: _State, tokens_BC, real_BC) -> _State:
    """Reads a piece of the prompts."""
    hidden_BCM, cache = append(config, params, tokens_BC, real_BC, state.cache)
    count_B = real_BC.sum(axis=1)
    newest_BM = hidden_BCM[jnp.arange(len(count_B)), jnp.maximum(count_B - 1, 0)]
    return _State(cache, jnp.where(count_B[:, None] > 0, newest_BM, state.last_BM))


def _continue(
    config: ModelConfig,
    vocab_size: int,
    eos_id: int,
    params: Parameters,
    state: _State,
    done_B,
    indices_B,
    at,
    count,
    settings,
    *,
    mode: str,
):
    """`count` more tokens, at most STEPS, or fewer if all rows are done.

    Returns (B, STEPS) int32, EOS where a row was done; whether all logits that were read were
    finite; and the state. The model may have more entries than the `vocab_size` that tokens have;
    none of those is taken.
    """
    temperature, top_k, top_p, seed = settings
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(indices_B)

    def going(carry):
        step, done_B, _, finite, _ = carry
        return (step < count) & ~done_B.all() & finite

    def take(carry):
        step, done_B, tokens_BN, finite, state = carry
        logits_BV = next_logits(config, params, state.last_BM)
        finite &= (jnp.isfinite(logits_BV).all(axis=-1) | done_B).all()
        step_keys_B = jax.vmap(lambda key: jax.random.fold_in(key, at + step))(keys_B)
        logits_BV = logits_BV[:, :vocab_size]
        token_B = choose(logits_BV, step_keys_B, temperature, top_k, top_p, mode=mode)
        token_B = jnp.where(done_B, eos_id, token_B)
        tokens_BN = jax.lax.dynamic_update_slice_in_dim(tokens_BN, token_B[:, None], step, axis=1)
        done_B |= token_B == eos_id
        hidden_B1M, cache = append(config, params, token_B[:, None], ~done_B[:, None], state.cache)
        return step + 1, done_B, tokens_BN, finite, _State(cache, hidden_B1M[:, 0])

    tokens_BN = jnp.full((len(done_B), STEPS), eos_id, jnp.int32)
    start = (jnp.int32(0), done_B, tokens_BN, jnp.bool_(True), state)
    _, _, tokens_BN, finite, state = jax.lax.while_loop(going, take, start)
    return tokens_BN, finite, state
