"""Our checkpoints as a model of lm-evaluation-harness, for any of its tasks.

    pip install -r requirements-eval.txt
    python -m eval.lm_eval_adapter run --model laser --model_args workdir=RUN --tasks lambada_openai

Everything after the module's name goes to the harness, which then knows the model `laser`. Prompts
begin a document, so EOS comes first; what is longer than the model's length is cut from the left,
as the harness does for its own models.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from eval.run import open_model
from eval.scoring import Request, encode_pairs
from models.decoder import structure

GENERATED_TOKENS = 256  # where a task does not say how many
GENERATION_ROWS = 8


@register_model("laser")
class LaserLM(LM):
    """A run's checkpoint.

    Args:
      workdir: the run's folder.
      step: of the checkpoint; the newest if None.
      unused: the harness's batch size and device; buckets and the mesh take their place.
    """

    def __init__(self, workdir: str, step: int | None = None, **unused: Any):
        super().__init__()
        del unused
        self.model = open_model(Path(workdir), step)
        self._tokenizer = self.model.tokenizer
        graph = structure(self.model.config.model)

        @jax.jit
        def next_tokens(params, tokens_BT, lengths_B):
            network = nnx.merge(graph, params)
            hidden_BTM, _ = network(tokens_BT)
            last_BM = hidden_BTM[jnp.arange(len(tokens_BT)), lengths_B - 1]
            return jnp.argmax(network.logits(last_BM), axis=-1)

        self._next_tokens = next_tokens

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of (context, continuation): its log-probability and whether greedy decoding finds it."""
        del disable_tqdm
        contexts, continuations = zip(*(request.args for request in requests))
        encoded = encode_pairs(self._tokenizer, contexts, continuations)
        scores = self.model.scorer.score(self.model.params, encoded)
        return [(score.logprob, score.greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, every token once, each window with as much context as fits."""
        del disable_tqdm
        windows, counts = [], []
        for request in requests:
            pieces = list(self._windows(request.args[0]))
            windows += pieces
            counts.append(len(pieces))
        scores = iter(self.model.scorer.score(self.model.params, windows))
        return [sum(next(scores).logprob for _ in range(count)) for count in counts]

    def _windows(self, text: str) -> Iterator[Request]:
        ids = self._tokenizer.encode(text)
        for window in get_rolling_token_windows(
            ids, self._tokenizer.eos_id, self.model.scorer.max_length, context_len=1
        ):
            context, continuation = make_disjoint_window(window)
            yield Request(tuple(context), tuple(continuation))

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations of (context, arguments), up to one of the words in `until`.

        Raises:
          ValueError: a task asks for sampling.
        """
        del disable_tqdm
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].args[0]))
        texts: dict[int, str] = {}
        for start in range(0, len(order), GENERATION_ROWS):
            part = order[start : start + GENERATION_ROWS]
            texts |= zip(part, self._generate([requests[i].args for i in part]))
        return [texts[i] for i in range(len(requests))]

    def _generate(self, prompts: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """All rows take a step together; the whole model runs for each token."""
        for _, arguments in prompts:
            if arguments.get("do_sample") and arguments.get("temperature", 1.0) > 0:
                raise ValueError(f"{arguments}: only greedy decoding is supported; do_sample=False")
        tokens = [[self._tokenizer.eos_id, *self._tokenizer.encode(text)] for text, _ in prompts]
        starts, texts = [len(ids) for ids in tokens], [""] * len(prompts)
        going = set(range(len(prompts)))
        while going:
            for i, token in zip(sorted(going), self._step([tokens[i] for i in sorted(going)])):
                tokens[i].append(token)
                texts[i] = self._tokenizer.decode(tokens[i][starts[i] :])
                arguments = prompts[i][1]
                stopped = _cut(texts[i], arguments.get("until"))
                limit = starts[i] + arguments.get("max_gen_toks", GENERATED_TOKENS)
                ended = token == self._tokenizer.eos_id or len(tokens[i]) >= limit
                if ended or stopped != texts[i]:
                    going.remove(i)
                texts[i] = stopped
        return texts

    def _step(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """The likeliest next token of each row, from as much of its end as the model's length."""
        length = self.model.scorer.max_length
        tokens_BT = np.zeros((GENERATION_ROWS, length), np.int32)
        lengths_B = np.ones(GENERATION_ROWS, np.int32)
        for i, row in enumerate(rows):
            kept = row[-length:]
            tokens_BT[i, : len(kept)] = kept
            lengths_B[i] = len(kept)
        return [
            int(t) for t in self._next_tokens(self.model.params, tokens_BT, lengths_B)[: len(rows)]
        ]


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the words."""
    words = [until] if isinstance(until, str) else until or ()
    return text[: min((text.find(word) for word in words if word and word in text), default=None)]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
