"""From a question to the ids that a subject is shown: its chat template, the text as it is, or a form of the user's.

The form is said in the study (`template:`) and never guessed from a name. Nothing in a question becomes a special
token, and the marker that begins a document stands there exactly once where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as RustTokenizer

from longspan.engines.base import Prompting
from longspan.foundation.errors import DataError, UserError
from longspan.foundation.extras import require

PROMPT = "{prompt}"
_STANDIN = "\ue000question\ue001"

Policy = Literal["chat", "raw", "custom"]


class Unstated(Prompting):
    """A subject from elsewhere whose form was not said: whoever asks it by text is told to say it."""

    def __init__(self, subject: str) -> None:
        self._subject = subject

    def encode(self, text: str, answer_prefix: str) -> NDArray[np.int64]:
        """Refuse.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{self._subject} is asked by text, and its entry under `subjects:` has no `template`",
            "chat (its own chat template), raw (the text as it is) or custom (with `custom_template`)",
            "add `template: chat` for an instruction-tuned model, `template: raw` for a base model",
        )


class Templated(Prompting):
    """A form that puts the question between texts of its own, whose special tokens count as such."""

    def __init__(
        self,
        form: Callable[[str], str],
        tokenizer_file: Path,
        *,
        bos: int | None,
        subject: str,
    ) -> None:
        """Try the form once.

        Args:
            form: the whole prompt as text, for a question.
            tokenizer_file: a tokenizer.json, whose special tokens are known in the form's own texts.
            bos: the token that begins every document, also where the form does not write it; None: there is none.
            subject: for errors.

        Raises:
            UserError: the form leaves the question out, or shows it twice.
        """
        self._form, self._subject, self._bos = form, subject, bos
        self._rust = RustTokenizer.from_file(str(tokenizer_file))
        self._rust.no_truncation()
        self._rust.no_padding()
        self._special = [token.content for token in self._rust.get_added_tokens_decoder().values() if token.special]
        parts = form(_STANDIN).split(_STANDIN)
        if len(parts) != 2:
            raise UserError(
                f"the template of {subject} shows the question {len(parts) - 1} times",
                "once",
                "choose another template, or write one with `template: custom`",
            )
        self._before, self._after = parts

    def encode(self, text: str, answer_prefix: str) -> NDArray[np.int64]:
        """See `Prompting.encode`."""
        whole = self._form(text)
        if not (whole.startswith(self._before) and whole.endswith(self._after)):
            raise DataError(
                f"the template of {self._subject} changes what stands around the question with the question",
                "a template that puts the question in one place",
                "use `template: custom`",
            )
        # As the template leaves it, for some strip a question.
        asked = whole[len(self._before) : len(whole) - len(self._after)]
        if any(content in asked + answer_prefix for content in self._special):
            ids = self._in_pieces(asked, answer_prefix)
        else:
            ids = self._ids(whole + answer_prefix, special=True)
        return self._with_bos(ids)

    def _in_pieces(self, asked: str, answer_prefix: str) -> list[int]:
        """Text that reads like a special token stays text, so it goes through beside the form's own texts."""
        first, last = self._edge(self._before, last=True), self._edge(self._after, last=False)
        plain = self._before[first:] + asked + self._after[:last]
        if last < len(self._after):
            tail = self._ids(self._after[last:], special=True) + self._ids(answer_prefix, special=False)
        else:
            plain, tail = plain + answer_prefix, []
        return self._ids(self._before[:first], special=True) + self._ids(plain, special=False) + tail

    def _edge(self, text: str, *, last: bool) -> int:
        """Where the last special token of a text ends, or its first begins."""
        if last:
            ends = (text.rfind(each) + len(each) for each in self._special if each in text)
            return max(ends, default=0)
        return min((text.find(each) for each in self._special if each in text), default=len(text))

    def _ids(self, text: str, *, special: bool) -> list[int]:
        if not text:
            return []
        self._rust.encode_special_tokens = not special
        return list(self._rust.encode(text, add_special_tokens=False).ids)

    def _with_bos(self, ids: list[int]) -> NDArray[np.int64]:
        if self._bos is not None and ids[:1] != [self._bos]:
            ids = [self._bos, *ids]
        if self._bos is not None and ids[:2] == [self._bos, self._bos]:
            raise UserError(
                f"the template of {self._subject} begins the prompt with two BOS tokens",
                "exactly one",
                "take it out of the template",
            )
        return np.array(ids, dtype=np.int64)


def chat_form(folder: Path, arguments: Mapping[str, Any], system: str | None) -> Callable[[str], str]:
    """The chat template of a tokenizer's folder as a form: one question by the user, then the answer begins.

    Args:
        folder: of the tokenizer.
        arguments: for the template, e.g. `{enable_thinking: false}`.
        system: what the system says before the question.

    Raises:
        UserError: there is no chat template.
    """
    tokenizer = require("transformers").AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise UserError(f"{folder} has no chat template", "raw or custom", "say `template: raw`, or write one")
    messages = [] if system is None else [{"role": "system", "content": system}]

    def form(text: str) -> str:
        asked = [*messages, {"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **arguments))

    return form


def custom_form(template: str) -> Callable[[str], str]:
    """A form written by the user, with `{prompt}` where the question stands."""
    if template.count(PROMPT) != 1:
        raise UserError(f"custom_template = {template!r}", f"a text with {PROMPT} in it once", "mend it")
    before, after = template.split(PROMPT)
    return lambda text: before + text + after
