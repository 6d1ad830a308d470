"""Generated answers that can only be what a grammar allows: tokens are masked at each step (llguidance)."""

from dataclasses import dataclass
from functools import lru_cache

import llguidance.numpy
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer, decoders, pre_tokenizers
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


@dataclass(frozen=True)
class _Pieces:
    """A SentencePiece tokenizer, T5's, whose spaces are marks before pieces, under the names that llguidance reads."""

    tokenizer: Tokenizer
    eos_token_id: int
    tokens: list[bytes]
    special_token_ids: list[int]
    bos_token_id: None = None

    def __call__(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def _pieces(tokenizer: Tokenizer, mark: str, vocab_size: int, end_id: int) -> _Pieces:
    """Its `tokenizer` takes a text as the middle of another: nothing is put before it, and no space is dropped. Ids
    that the LLM has above the tokenizer's own, as T5 has 28, are never said."""
    spare = range(tokenizer.get_vocab_size(), vocab_size)
    words = [tokenizer.id_to_token(token) or f"<{token}>" for token in range(vocab_size)]
    controls = [token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special]
    inside = Tokenizer(tokenizer.model)
    inside.pre_tokenizer = pre_tokenizers.Metaspace(replacement=mark, prepend_scheme="never")
    return _Pieces(inside, end_id, [word.replace(mark, " ").encode() for word in words], [*controls, *spare])


@lru_cache(maxsize=4)
def guide_tokenizer(tokenizer: Tokenizer, vocab_size: int, end_id: int) -> LLTokenizer:
    """The tokenizer as llguidance wants it, made once: it takes a fifth of a second. `end_id` ends an answer."""
    if isinstance(tokenizer.decoder, decoders.Metaspace):
        return LLTokenizer(TokenizerWrapper(_pieces(tokenizer, tokenizer.decoder.replacement, vocab_size, end_id)))
    return LLTokenizer(tokenizer.to_str(), n_vocab=vocab_size, eos_token=end_id)


def guides(tokenizer: Tokenizer, vocab_size: int, end_id: int, grammar: str, *, count: int) -> list[Guide]:
    """A guide for each of `count` answers. Raises TaskError for a grammar that cannot be read.

    Where a space is a mark before a piece, decoding drops the one before the first, so an answer may begin with it."""
    if isinstance(tokenizer.decoder, decoders.Metaspace):
        grammar = grammar.replace("start: ", 'start: " "? answer\nanswer: ', 1)
    shared = guide_tokenizer(tokenizer, vocab_size, end_id)
    return [Guide(shared, grammar) for _ in range(count)]
