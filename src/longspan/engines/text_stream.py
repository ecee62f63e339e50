"""Text that grows token by token: only whole characters are handed out, and nothing that may begin a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from longspan.corpus.tokenizer import Tokenizer

_CUT = "\N{REPLACEMENT CHARACTER}"
"""What decoding gives for bytes that are no character, or not yet one."""


class TextStream:
    """Decodes ids as they come.

    With a byte-level tokenizer the pieces, joined, are the decoded ids to the last character.

    Attributes:
        text: everything handed out so far.
        stopped: whether a stop string came; `text` ends before it, and later ids give nothing.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(filter(None, stop))
        # The ids of the last hand-out stay in the window: some tokenizers write an id otherwise where it comes first.
        self._window: list[int] = []
        self._seen = 0
        self._held = ""

    def push(self, token: int) -> str:
        """Take one id; the text that is certain now and was not before (often empty)."""
        if self.stopped:
            return ""
        self._window.append(token)
        before = self._tokenizer.decode(self._window[: self._seen])
        text = self._tokenizer.decode(self._window)
        if text.endswith(_CUT):
            return ""
        self._window, self._seen = self._window[self._seen :], len(self._window) - self._seen
        return self._hand_out(text[len(before) :])

    def flush(self) -> str:
        """What was held back at the end, bytes of an unfinished character as U+FFFD."""
        if self.stopped:
            return ""
        before = self._tokenizer.decode(self._window[: self._seen])
        rest = self._tokenizer.decode(self._window)[len(before) :]
        self._window, self._seen = [], 0
        certain = self._hand_out(rest)
        held, self._held = self._held, ""
        self.text += held
        return certain + held

    def _hand_out(self, piece: str) -> str:
        known = self._held + piece
        found = [place for stop in self._stop if (place := known.find(stop)) >= 0]
        if found:
            self.stopped = True
            certain, self._held = known[: min(found)], ""
        else:
            held = max((_overlap(known, stop) for stop in self._stop), default=0)
            certain, self._held = known[: len(known) - held], known[len(known) - held :]
        self.text += certain
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
