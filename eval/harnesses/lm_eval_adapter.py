"""Our checkpoints as a model of lm-evaluation-harness, for any of its tasks.

    pip install -r requirements-eval.txt
    python -m eval.harnesses.lm_eval_adapter run --model laser --model_args workdir=RUN \\
        --tasks lambada_openai

Everything after the module's name goes to the harness, which then knows the model `laser`. Prompts
begin a document, so EOS comes first; what is longer than the model's length is cut from the left,
as the harness does for its own models.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from eval.likelihood.scoring import Request, encode_pairs
from eval.run import open_model
from laser.training.folders import folder_of

HARNESS_ARGUMENTS = {"batch_size", "max_batch_size", "device"}  # which it gives to every model
GENERATED_TOKENS = 256  # where a task does not say how many; half of a short model's length


@register_model("laser")
class LaserLM(LM):
    """A run's checkpoint.

    Args:
      workdir: the run's folder.
      step: of the checkpoint; the newest if None.
      harness: its own batch sizes and device, of no effect: buckets and the mesh take their place.

    Raises:
      ValueError: another argument, or as `open_model`.
      CheckpointError: as `open_model`.
    """

    def __init__(self, workdir: str, step: int | None = None, **harness: Any):
        super().__init__()
        for name in sorted(harness.keys() - HARNESS_ARGUMENTS):
            raise ValueError(f"{name}={harness[name]}: unknown; --model_args has workdir and step")
        self.model = open_model(folder_of(workdir), step)
        self._tokenizer = self.model.tokenizer

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
          ValueError: a task asks for sampling, or for so many tokens that no prompt has room.
        """
        del disable_tqdm
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._limits(request.args[1]), []).append(i)
        texts: dict[int, str] = {}
        for (new_tokens, stop), indices in groups.items():
            prompts = [self._prompt(requests[i].args[0], new_tokens) for i in indices]
            texts |= zip(
                indices,
                self.model.generator.generate(
                    self.model.params, prompts, max_new_tokens=new_tokens, stop=stop
                ),
            )
        return [texts[i] for i in range(len(requests))]

    def _limits(self, arguments: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
        """How many tokens at most, and the words that end a continuation, as the harness reads them
        for its own models: a temperature alone asks for sampling, too."""
        length = self.model.generator.max_length
        default = min(GENERATED_TOKENS, length // 2)
        read: dict[str, Any] = dict(normalize_gen_kwargs(arguments, default))
        if read["do_sample"] and read.get("temperature", 1.0) > 0:
            raise ValueError(
                f"{arguments}: only greedy decoding is supported; --gen_kwargs do_sample=False"
            )
        count = read["max_gen_toks"]
        if count >= length:
            raise ValueError(
                f"max_gen_toks={count}: the model's length is {length}, which leaves no room for a "
                f"prompt; --gen_kwargs max_gen_toks={length // 2}"
            )
        return count, tuple(word for word in read["until"] if word)

    def _prompt(self, text: str, new_tokens: int) -> list[int]:
        """Its tokens, as many from the end as leave room for new ones."""
        length = self.model.generator.max_length
        return [self._tokenizer.eos_id, *self._tokenizer.encode(text)][-(length + 1 - new_tokens) :]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
