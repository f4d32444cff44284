"""A conversation: its turns, and what of them the engine may still have cached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from longspan._core import InvalidArgument
from longspan.config import GenerationConfig
from longspan.response import Response

if TYPE_CHECKING:
    from longspan.pipeline import Pipeline


class Session:
    """The turns of one conversation with a pipeline. One turn at a time.

    A turn goes to the engine as the token ids of the turn before, answer included, followed by
    what is new: encoding the answer's text again might split it otherwise, and a cached prefix
    would be lost. Where the chat template changes earlier turns, the conversation is encoded anew.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        system: str | None = None,
        gen_config: GenerationConfig | None = None,
    ) -> None:
        if pipeline.chat_template is None:
            raise InvalidArgument("chat: expected a model with a chat template, got one without")
        self.system = system
        #: (prompt, answer) of each turn.
        self.history: list[tuple[str, str]] = []
        #: The answer of the last turn.
        self.response: Response | None = None
        #: Tokens of earlier turns that the last turn prefilled again, and why; no reason for less
        #: than a KV block, which is in the nature of the cache.
        self.recomputed = 0
        self.recomputed_why: str | None = None
        self._pipeline = pipeline
        self._config = gen_config or GenerationConfig()
        self._forget()

    @property
    def num_tokens(self) -> int:
        """Tokens of the conversation so far, the last answer included."""
        return len(self._ids)

    def messages(self, prompt: str | None = None) -> list[dict[str, str]]:
        """The conversation as OpenAI messages, with one more prompt at the end if given."""
        messages = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        for asked, answered in self.history:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answered})
        if prompt is not None:
            messages.append({"role": "user", "content": prompt})
        return messages

    def reset(self) -> None:
        """Forgets every turn; the system message stays."""
        self.history.clear()
        self.response = None
        self.recomputed, self.recomputed_why = 0, None
        self._forget()

    def __call__(self, prompt: str, gen_config: GenerationConfig | None = None) -> Response:
        """One turn; its answer."""
        for _ in self.stream(prompt, gen_config):
            pass
        assert self.response is not None
        return self.response

    def stream(self, prompt: str, gen_config: GenerationConfig | None = None) -> Iterator[Response]:
        """One turn, its answer in pieces. A turn that is not read to its end leaves the session as
        it was."""
        if not isinstance(prompt, str):
            raise InvalidArgument(f"chat: expected a string, got {type(prompt).__name__}")
        config = gen_config or self._config
        if config.n != 1:
            raise InvalidArgument(f"n: expected 1 in a conversation, got {config.n}")
        text, ids = self._encode(prompt)
        pieces = self._pipeline.stream_infer(ids, config, rope_length="bucket")
        return self._collect(prompt, text, ids, pieces)

    def _collect(
        self, prompt: str, text: str, ids: list[int], pieces: Iterator[Response]
    ) -> Iterator[Response]:
        response = Response(text="", generate_token_len=0, input_token_len=0)
        for piece in pieces:
            if piece.finish_reason is None:
                yield piece
            response.extend(piece)
            if piece.finish_reason is not None:
                self._finish_turn(prompt, text, ids, response)
                yield piece

    def _finish_turn(self, prompt: str, text: str, ids: list[int], response: Response) -> None:
        if response.finish_reason == "error":
            self.response = response
            return
        self._account(ids, response)
        self.history.append((prompt, response.text))
        self.response = response
        self._ids = [*ids, *response.token_ids]
        spelled = self._pipeline.tokenizer.decode(response.token_ids, skip_special_tokens=False)
        self._text = text + response.text if spelled == response.text else None

    def _encode(self, prompt: str) -> tuple[str, list[int]]:
        """The text of the conversation and its token ids."""
        template, tokenizer = self._pipeline.chat_template, self._pipeline.tokenizer
        assert template is not None
        text = template.render(self.messages(prompt))
        if self._text is not None and text.startswith(self._text):
            new = tokenizer.encode(text[len(self._text) :], add_special_tokens=False)
            return text, [*self._ids, *new]
        return text, tokenizer.encode(text, add_special_tokens=False)

    def _account(self, ids: list[int], response: Response) -> None:
        """Notes what of the earlier turns was computed again."""
        earlier = self._ids
        engine = self._pipeline.engine.config
        self.recomputed = max(len(earlier) - response.cached_tokens, 0)
        self.recomputed_why = None
        if self.response is None or self.recomputed <= engine.cache_block_seq_len * engine.cp:
            return
        if not engine.enable_prefix_caching:
            self.recomputed_why = "enable_prefix_caching is off"
        elif response.rope_profile != self.response.rope_profile:
            self.recomputed_why = "the conversation has outgrown the length its RoPE was scaled for"
        elif ids[: len(earlier)] != earlier:
            self.recomputed_why = "the chat template changed earlier turns"
        else:
            self.recomputed_why = "the cache had given the room to others"

    def _forget(self) -> None:
        self._ids: list[int] = []
        self._text: str | None = None  # of _ids
