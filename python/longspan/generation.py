"""One sequence while the engine generates it, seen as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from longspan._core import NumericalError
from longspan.detokenizer import Detokenizer, StopWords
from longspan.response import Response, Timings, beyond_native

if TYPE_CHECKING:
    from longspan._core import Engine, Request, RequestHandle, RequestOutput, Signal
    from longspan.config import GenerationConfig
    from longspan.tokenizer import Tokenizer

_FINISH_REASONS = {
    "stop": "stop",
    "length": "length",
    "context_full": "length",
    "cancelled": "abort",
}


def submit(
    engine: Engine, generations: Sequence[Generation], signal: Signal | None = None
) -> list[RequestHandle]:
    """Hands all requests to the engine at one time; they then notify the signal."""
    handles = engine.submit([generation.request for generation in generations], signal)
    for generation, handle in zip(generations, handles, strict=True):
        generation.handle = handle
    return handles


class Generation:
    """Takes a request's tokens as they come, and gives them out as pieces of a Response.

    Nothing here waits but finish(). A stop word ends the request as soon as it is complete; the
    text is cut before it, or after it with include_stop_str_in_output, and the token ids are the
    fewest that hold the text.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        config: GenerationConfig,
        prompt_tokens: int,
        index: int = 0,
        choice: int = 0,
    ) -> None:
        """index: of the prompt; choice: which of its n sequences."""
        self.request = request
        self.config = config
        self.index = index
        self.choice = choice
        self.prompt_tokens = prompt_tokens
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, config.skip_special_tokens)
        self._stop_words = StopWords(config.stop_words or ())
        self._text = ""  # all that is certain
        self._ids: list[int] = []  # all that was taken from the handle
        self._ends: list[int] = []  # [len(_ids)], len(_text) after each token
        self._cut: int | None = None  # where a stop word ended the text
        self._given_text = 0
        self._given_ids = 0
        self.done = False  # the last piece is out

    def next(self) -> Response | None:
        """What is new since the last call, without waiting; None when nothing is. The last piece
        has a finish_reason."""
        ended = self.handle.wait_for(0.0)  # asked first: what comes later is not missed
        self._take()
        if ended or self._cut is not None:
            return self.finish()
        limit = len(self._text) - self._stop_words.held(self._text)
        if limit <= self._given_text:
            return None
        return self._piece(limit, self._tokens_for(limit))

    def finish(self) -> Response:
        """Waits for the end, and gives all that is left."""
        self.done = True
        try:
            output = self.handle.wait()
        except NumericalError as error:  # of this prompt alone: the others keep their answers
            return self._response("", [], "error", error_message=str(error))
        self._take()
        if self._cut is None:
            self._text += self._detokenizer.finish()
            self._look_for_stop(self._ends[-1] if self._ends else 0)
        reason = _FINISH_REASONS[output.finish_reason]
        if self._cut is not None:
            piece = self._piece(self._cut, self._tokens_for(self._cut), "stop")
        else:
            if self.config.include_stop_str_in_output and output.stop_token_id is not None:
                self._ids.append(output.stop_token_id)
                self._text += self._detokenizer.add(output.stop_token_id)
                self._text += self._detokenizer.finish()
            piece = self._piece(len(self._text), len(self._ids), reason)
        self._describe(piece, output)
        return piece

    def _take(self) -> None:
        """Takes in the tokens that came, up to a stop word."""
        if self._cut is not None:
            return
        for token in self.handle.tokens_from(len(self._ids)):
            before = len(self._text)
            self._ids.append(token)
            self._text += self._detokenizer.add(token)
            self._ends.append(len(self._text))
            if len(self._ids) >= (self.config.min_new_tokens or 0):
                self._look_for_stop(before)
            if self._cut is not None:
                self.handle.cancel()
                return

    def _look_for_stop(self, before: int) -> None:
        found = self._stop_words.find(self._text, before)
        if found is not None:
            begin, end = found
            self._cut = end if self.config.include_stop_str_in_output else begin

    def _tokens_for(self, characters: int) -> int:
        """The fewest tokens whose text has so many characters."""
        if characters == 0:
            return 0
        count = self._given_ids
        while count < len(self._ends) and (count == 0 or self._ends[count - 1] < characters):
            count += 1
        return count

    def _piece(self, characters: int, tokens: int, reason: str | None = None) -> Response:
        text = self._text[self._given_text : characters]
        first, self._given_ids = self._given_ids, tokens
        self._given_text = characters
        return self._response(text, self._ids[first:tokens], reason, self._logprobs(first, tokens))

    def _logprobs(self, first: int, end: int) -> list[dict[int, float]] | None:
        """Of each token by id: the likeliest ones, likeliest first, then the token itself."""
        if self.config.logprobs is None:
            return None
        rows = self.handle.logprobs_from(first)[: end - first]
        return [dict(row[1:]) | dict(row[:1]) for row in rows]

    def _response(
        self,
        text: str,
        ids: list[int],
        reason: str | None,
        logprobs: list[dict[int, float]] | None = None,
        error_message: str | None = None,
    ) -> Response:
        return Response(
            text=text,
            generate_token_len=self._given_ids,
            input_token_len=self.prompt_tokens,
            finish_reason=reason,
            token_ids=ids,
            logprobs=logprobs,
            index=self.index,
            choice=self.choice,
            error_message=error_message,
        )

    def _describe(self, response: Response, output: RequestOutput) -> None:
        """Adds what is known when the request has ended."""
        tokens = output.input_token_len + response.generate_token_len
        response.context_full = self._cut is None and output.finish_reason == "context_full"
        response.beyond_native = beyond_native(output.rope_profile, tokens)
        response.cached_tokens = output.cached_tokens
        response.seed = output.seed
        response.rope_profile = output.rope_profile
        response.timings = Timings.of(output)
        if self.config.prompt_logprobs:
            response.prompt_logprobs = (-output.token_nll).tolist()
