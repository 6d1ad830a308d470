"""Generated answers that can only be what a grammar allows: tokens are masked at each step (llguidance)."""

from functools import lru_cache

import llguidance.numpy
import torch
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer
from torch import Tensor

from svbatch.errors import TaskError


class Guide:
    """One answer's way through a grammar, as far as it has been said."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str) -> None:
        """Raises TaskError for a grammar that cannot be read."""
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)
        self._bits = llguidance.numpy.allocate_token_bitmask(1, tokenizer.vocab_size)
        self._vocab_size = tokenizer.vocab_size
        self._check()

    def allowed(self) -> Tensor:
        """(V,) bool: the tokens that may come next, the end of the turn among them where the answer may end."""
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits, 0)
        self._check()
        words = torch.from_numpy(self._bits[0])
        bits = (words[:, None] >> torch.arange(32)) & 1
        return bits.flatten()[: self._vocab_size].bool()

    def follow(self, token: int) -> None:
        """The answer goes on with `token`, which is allowed."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise TaskError(f"the answer's grammar cannot be followed: {self._matcher.get_error()}")


@lru_cache(maxsize=4)
def guide_tokenizer(tokenizer: Tokenizer, vocab_size: int, end_id: int) -> LLTokenizer:
    """The tokenizer as llguidance wants it, made once: it takes a fifth of a second. `end_id` ends an answer."""
    return LLTokenizer(tokenizer.to_str(), n_vocab=vocab_size, eos_token=end_id)


def guides(tokenizer: Tokenizer, vocab_size: int, end_id: int, grammar: str, *, count: int) -> list[Guide]:
    """A guide for each of `count` answers. Raises TaskError for a grammar that cannot be read."""
    shared = guide_tokenizer(tokenizer, vocab_size, end_id)
    return [Guide(shared, grammar) for _ in range(count)]
