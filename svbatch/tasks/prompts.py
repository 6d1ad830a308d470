"""What the LLM is given, as token ids: the one place where they are made, in training and in a run.

A prompt is one user turn in SmolLM2's chat format, without a system turn, in an order that lets all
questions about a segment share its beginning:

    opening_ids      <|im_start|>user⏎
                     [speech embeddings]                  (modes audio and both)
    transcript_ids   ⏎Transcript: so I would like          (modes text and both)
    question_ids     ⏎Which word was said?<|im_end|>⏎<|im_start|>assistant⏎
    answer_ids       refund<|im_end|>

An LLM without turns (the T5 family) is given the same parts without the markers; its instruction and its answer each
end with </s>.

Each part is encoded on its own, so its ids never depend on what stands before or after it. Control tokens
come from here alone: the same characters in a transcript, instruction or answer are encoded as plain text.
"""

import unicodedata
from collections.abc import Mapping, Sequence

from jinja2 import StrictUndefined, TemplateError, nodes
from jinja2.sandbox import SandboxedEnvironment
from tokenizers import Tokenizer

from svbatch.errors import TaskError

START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "</s>"


def opening_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids before the speech embeddings; none where there are no turns."""
    if not _has_turns(tokenizer):
        return []
    return [_control_id(tokenizer, START_OF_TURN), *_text_ids(tokenizer, "user\n")]


def transcript_ids(tokenizer: Tokenizer, transcript: str) -> list[int]:
    """The transcript's line. A transcript with line breaks becomes one line; an empty one keeps its heading,
    so that the LLM can tell "nothing was said" from mode audio."""
    return _text_ids(tokenizer, " ".join(["\nTranscript:", *transcript.split()]))


def question_ids(tokenizer: Tokenizer, instruction: str) -> list[int]:
    """A rendered instruction, the end of the user's turn, and the opening of the answer."""
    if not _has_turns(tokenizer):
        return [*_text_ids(tokenizer, f"\n{instruction}"), end_id(tokenizer)]
    return [
        *_text_ids(tokenizer, f"\n{instruction}"),
        _control_id(tokenizer, END_OF_TURN),
        *_text_ids(tokenizer, "\n"),
        _control_id(tokenizer, START_OF_TURN),
        *_text_ids(tokenizer, "assistant\n"),
    ]


def answer_ids(tokenizer: Tokenizer, answer: str) -> list[int]:
    """An answer or a label, with the end of the turn."""
    return [*_text_ids(tokenizer, answer), end_id(tokenizer)]


def answer_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of decoded ids. Control tokens are left out, bytes that are no UTF-8 become U+FFFD."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def can_write(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the tokens of a text spell it, but for white space and what NFKC calls the same."""
    written = answer_text(tokenizer, _text_ids(tokenizer, text))
    return _compared(written) == _compared(text)


def _compared(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def end_id(tokenizer: Tokenizer) -> int:
    """The id that ends a turn, and so an answer."""
    return _control_id(tokenizer, END_OF_TURN if _has_turns(tokenizer) else END_OF_TEXT)


def _has_turns(tokenizer: Tokenizer) -> bool:
    return tokenizer.token_to_id(START_OF_TURN) is not None


def placeholders(wording: str) -> set[str]:
    """The names between {{ }} in a wording. Raises TaskError if it holds any other template syntax: wordings
    are values, and an expression such as {{ 'a' * 10 ** 9 }} is refused before it can be evaluated."""
    try:
        body = _ENVIRONMENT.parse(wording).body
    except TemplateError as error:
        raise TaskError(f"{error}; a wording holds text and {{{{ name }}}} only") from None
    except RecursionError:
        raise TaskError("nested too deeply; a wording holds text and {{ name }} only") from None
    names = set()
    for output in body:
        for part in output.nodes if isinstance(output, nodes.Output) else [output]:
            if isinstance(part, nodes.Name):
                names.add(part.name)
            elif not isinstance(part, nodes.TemplateData):
                kind = type(part).__name__
                raise TaskError(f"a template's {kind}; a wording holds text and {{{{ name }}}} only")
    return names


def render(wording: str, values: Mapping[str, str]) -> str:
    """The instruction: a wording with its placeholders filled in. Values are inserted as they are and never
    read as templates. Raises TaskError for a placeholder without a value."""
    missing = placeholders(wording) - values.keys()
    if missing:
        raise TaskError(f"no value for {', '.join(sorted(missing))}; known: {', '.join(values) or 'none'}")
    return _ENVIRONMENT.from_string(wording).render(values)


_ENVIRONMENT = SandboxedEnvironment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)


def _text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of plain text; `encode_special_tokens` means that "<|im_end|>" in it is spelled out in letters."""
    tokenizer.encode_special_tokens = True
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def _control_id(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise TaskError(f"the bundle's tokenizer has no {token}; prompts are in SmolLM2's chat format, or in T5's")
    return int(token_id)
