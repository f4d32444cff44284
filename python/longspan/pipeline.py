"""pipeline(): a model by path, text or token ids in, text or numbers out."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longspan import _core
from longspan._core import (
    Context,
    ContextProgress,
    Engine,
    InvalidArgument,
    Request,
    RequestHandle,
    Signal,
)
from longspan.chat_template import ChatTemplate
from longspan.config import EngineConfig, GenerationConfig
from longspan.describe import describe, idle_gpu
from longspan.generation import Generation, submit
from longspan.inputs import TokenIds, split_prompts, token_ids
from longspan.model_path import resolve_model
from longspan.progress import INTERVAL, Bar, ProgressCallback, show, show_context
from longspan.response import Perplexity, Response, beyond_native, unscaled
from longspan.session import Session
from longspan.tokenizer import Tokenizer

_log = logging.getLogger("longspan")

_BEYOND_NATIVE = (
    "a sequence may reach {length} tokens, beyond the {native} the model was trained for, and its "
    "RoPE is not scaled: expect nonsense there, or set rope_scaling_factor (this is said once)"
)
_IDLE_GPU = (
    'device: "auto" took the CPU, though this machine has an NVIDIA GPU: {why} (longspan doctor '
    'says more; device="cpu" takes the CPU without this warning)'
)


def pipeline(
    model: str | os.PathLike[str],
    backend_config: EngineConfig | None = None,
    chat_template_config: Any = None,
    hf_overrides: dict[str, Any] | None = None,
    log_level: str = "WARNING",
) -> Pipeline:
    """Loads a model, and returns what answers prompts with it.

    model: a Hugging Face model directory, a GGUF file, or the id of a model on the Hugging Face
        hub, "organisation/name".
    chat_template_config: a chat template in place of the model's own: the path of a jinja file,
        or {"chat_template": text}, or an object with that attribute.
    hf_overrides: merged into the model's config.json, as EngineConfig.hf_overrides.
    """
    return Pipeline(model, backend_config, chat_template_config, hf_overrides, log_level)


class Pipeline:
    """An engine with its tokenizer and chat template. May be used from several threads.

    A context manager; close() frees the memory.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        backend_config: EngineConfig | None = None,
        chat_template_config: Any = None,
        hf_overrides: dict[str, Any] | None = None,
        log_level: str = "WARNING",
    ) -> None:
        _log_at(log_level)
        config = _engine_config(backend_config, hf_overrides)
        native = config.native()
        model_dir = resolve_model(model, **config.source())
        self.tokenizer = Tokenizer.from_dir(model_dir)
        special = self.tokenizer.special_tokens
        self.chat_template = (
            ChatTemplate.from_dir(model_dir, special)
            if chat_template_config is None
            else ChatTemplate.from_user(chat_template_config, special)
        )
        # In a process that a launcher started as another rank, that is all there is to do.
        if Engine.follow(str(model_dir), native):
            raise SystemExit(0)
        with Bar("Loading weights", "MB") as bar:
            self.engine = Engine.load(
                str(model_dir), native, lambda done, total: bar.update(done / 1e6, total / 1e6)
            )
        self._warned = False
        _log.info("%s: %s", model_dir, describe(self.engine.model))
        if config.device == "auto" and (why := idle_gpu()):
            warnings.warn(_IDLE_GPU.format(why=why), stacklevel=_user_level())

    def __repr__(self) -> str:
        tokens = self.engine.config.session_len
        return f"<Pipeline: {describe(self.engine.model)}; session_len {tokens}>"

    def __call__(self, prompts: Any, gen_config: Any = None, **options: Any) -> Any:
        """infer()."""
        return self.infer(prompts, gen_config, **options)

    def infer(
        self,
        prompts: Any,
        gen_config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        do_preprocess: bool = True,
        progress: ProgressCallback | None = None,
        rope_length: str | int | None = None,
    ) -> Any:
        """Generates for one prompt (a Response) or for a list of them (a list, in their order);
        where n > 1, each Response is a list of n.

        prompts: a string, a conversation of OpenAI messages, a sequence of token ids (list, numpy,
            torch), or a list of these. A string is one user message of the chat template; with
            do_preprocess=False, or for a model without a template, it is sent as it is.
        gen_config: one for all or one for each.
        progress: called with the Progress of every prompt several times a second. Without it a
            bar appears on a terminal when the work takes more than two seconds.
        rope_length: for these prompts, instead of EngineConfig.rope_length.

        Options and ids are checked before any of it runs. Throws InvalidArgument, Unsupported,
        ContextTooLong, CapacityError or EngineClosed; whatever is thrown, KeyboardInterrupt
        included, the requests of this call are cancelled first and the pipeline stays usable.
        """
        requests, alone = self.prepare(prompts, gen_config, do_preprocess, rope_length)
        if any(request.config.stop_words for request in requests):
            pieces: list[list[Response]] = [[] for _ in requests]
            for i, piece in self._stream(requests, progress):
                pieces[i].append(piece)
            responses = [reduce(Response.extend, parts) for parts in pieces]
        else:
            self._run(lambda: submit(self.engine, requests), "Generating", progress)
            responses = [request.finish() for request in requests]
        grouped = by_prompt(responses, requests)
        return grouped[0] if alone else grouped

    def stream_infer(
        self,
        prompts: Any,
        gen_config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        do_preprocess: bool = True,
        rope_length: str | int | None = None,
    ) -> Iterator[Response]:
        """infer() in pieces, as they come; a piece tells its prompt by .index (and its sequence by
        .choice), and the last one of each has a finish_reason. See Response.

        What is wrong with the arguments is raised here, not by the first piece. Closing the
        iterator, or leaving its loop by an exception, cancels what still runs.
        """
        requests, _ = self.prepare(prompts, gen_config, do_preprocess, rope_length)
        return (piece for _, piece in self._stream(requests, shown=True))

    def session(
        self, system: str | None = None, gen_config: GenerationConfig | None = None
    ) -> Session:
        """A new conversation; system: its system message. See chat()."""
        return Session(self, system, gen_config)

    def chat(
        self,
        prompt: str,
        session: Session | None = None,
        gen_config: GenerationConfig | None = None,
        stream_response: bool = False,
    ) -> Session | Iterator[Response]:
        """One turn of a conversation: returns the session, whose .response is the answer and
        .history the turns; with stream_response the pieces of the answer instead, which become
        part of the session with the last one.

        session: None begins a new one. A conversation keeps to RoPE profiles by length "bucket", so
        that with enable_prefix_caching a turn computes only what is new; Session.recomputed says
        when that could not be.
        """
        session = self.session() if session is None else session
        pieces = session.stream(prompt, gen_config)
        if stream_response:
            return pieces
        for _ in pieces:
            pass
        return session

    def get_ppl(
        self,
        input_ids: Any,
        progress: ProgressCallback | None = None,
        token_nll: bool = False,
    ) -> list[Perplexity]:
        """The perplexity of one sequence of two or more token ids, or of each of several; always a
        list. Memory does not grow with length or vocabulary, but for token_nll=True: 8 bytes for
        every token, whose own negative log-likelihood is then kept too. Throws as infer() does, and
        NumericalError."""
        items, _ = split_prompts(input_ids)
        ids = [self._token_ids(item, f"input_ids[{i}]", least=2) for i, item in enumerate(items)]
        requests = [Request.score(sequence, token_nll) for sequence in ids]
        for sequence, request in zip(ids, requests, strict=True):
            self.engine.check(request)
            self._warn_beyond_native(len(sequence), 0)
        handles = self._run(lambda: self.engine.submit(requests), "Scoring", progress)
        outputs = [handle.wait() for handle in handles]
        return [
            Perplexity(out, beyond_native(out.rope_profile, out.input_token_len)) for out in outputs
        ]

    def get_logits(
        self,
        input_ids: Any,
        positions: Sequence[int] | npt.NDArray[Any] | None = None,
        progress: ProgressCallback | None = None,
    ) -> npt.NDArray[np.float32]:
        """[positions, vocab_size] float32: row i predicts the token after input_ids[positions[i]].

        input_ids: one sequence. positions: in any order, negative ones from the end; None is the
        last one alone. Throws as get_ppl() does.
        """
        ids = self._token_ids(input_ids, "input_ids")
        rows, order = _ascending([-1] if positions is None else positions, len(ids))
        self._warn_beyond_native(len(ids), 0)
        requests = [Request.logits(ids, rows)]
        handle = self._run(lambda: self.engine.submit(requests), "Computing logits", progress)[0]
        return handle.wait().logits[order]

    def save_context(
        self,
        prompt: Any,
        path: str | os.PathLike[str],
        do_preprocess: bool = True,
        rope_length: str | int | None = None,
        checkpoint_tokens: int = 0,
        progress: Callable[[ContextProgress], None] | None = None,
    ) -> Context:
        """Computes a prompt, one of infer()'s, and keeps its keys and values in a file, so that it
        need never be computed again; needs enable_prefix_caching. Where the model's RoPE depends on
        length, choose a rope_length ("bucket", a number) that later prompts will have too.

        checkpoint_tokens >= 1: the file is written after each so many tokens, so that a process
        that dies loses no more; the same call goes on from such a file, to the same bits, and
        replaces no other.

        Throws as infer() does, CheckpointError and NumericalError. Whatever is thrown,
        KeyboardInterrupt included, leaves no half file."""
        ids = self._encode(prompt, 0, do_preprocess)
        self._warn_beyond_native(len(ids), 0)
        with Bar("Computing", "tokens") as bar, Bar("Writing", "tokens") as writing:
            report = progress or (lambda state: show_context(bar, writing, state))
            return self.engine.save_context(
                ids, os.fspath(path), rope_length, checkpoint_tokens, report
            )

    def load_context(
        self,
        path: str | os.PathLike[str],
        progress: Callable[[ContextProgress], None] | None = None,
    ) -> Context:
        """Reads such a file into the prefix cache, on whatever device and in whatever KV format
        this engine has: prompts that begin with .token_ids compute only what follows
        (Response.cached_tokens). Throws InvalidArgument without enable_prefix_caching,
        CheckpointError for a damaged file or one of another model, ContextTooLong and
        CapacityError; then nothing of it is kept."""
        with Bar("Reading", "tokens") as bar:
            report = progress or (lambda state: bar.update(state.moved, state.total))
            return self.engine.load_context(os.fspath(path), report)

    def close(self) -> None:
        """Ends what is running and frees the engine's memory. Idempotent."""
        self.engine.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def prepare(
        self,
        prompts: Any,
        gen_config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        do_preprocess: bool = True,
        rope_length: str | int | None = None,
    ) -> tuple[list[Generation], bool]:
        """What infer() would run, checked but not submitted, sequence by sequence; and whether
        there was one prompt alone."""
        items, alone = split_prompts(prompts)
        configs = _each(gen_config, len(items))
        natives = [config.native(self.tokenizer) for config in configs]
        ids = [self._encode(item, i, do_preprocess) for i, item in enumerate(items)]
        generations = [
            generation
            for i, config in enumerate(configs)
            for generation in self._sequences(ids[i], i, config, natives[i], rope_length)
        ]
        for generation in generations:
            self.engine.check(generation.request)
        for prompt, native in zip(ids, natives, strict=True):
            self._warn_beyond_native(len(prompt), native.max_new_tokens)
        return generations, alone

    def _sequences(
        self,
        ids: TokenIds,
        index: int,
        config: GenerationConfig,
        native: _core.GenerationConfig,
        rope_length: str | int | None,
    ) -> Iterator[Generation]:
        """The n sequences of a prompt; their seeds follow one another."""
        seed = native.seed
        if seed is None and config.n > 1:
            seed = secrets.randbits(64)
        for choice in range(config.n):
            if seed is not None:
                native.seed = (seed + choice) % 2**64
            request = Request.generate(ids, native, rope_length, config.prompt_logprobs)
            yield Generation(request, self.tokenizer, config, len(ids), index, choice)

    def _encode(self, prompt: Any, index: int, do_preprocess: bool) -> TokenIds:
        what = f"prompts[{index}]"
        if isinstance(prompt, Mapping):
            raise InvalidArgument(f"{what}: expected a conversation, a list of messages, got one")
        conversation = isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping)
        if conversation and self.chat_template is None:
            raise InvalidArgument(f"{what}: expected a prompt: the model has no chat template")
        if conversation or (isinstance(prompt, str) and do_preprocess and self.chat_template):
            messages = prompt if conversation else [{"role": "user", "content": prompt}]
            # A chat template writes out every special token itself.
            text = self.chat_template.render(messages)
            ids: Any = self.tokenizer.encode(text, add_special_tokens=False)
        else:
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return self._token_ids(ids, what)

    def _token_ids(self, value: Any, what: str, least: int = 1) -> TokenIds:
        ids = token_ids(value, what, self.engine.model.vocab_size)
        if len(ids) < least:
            raise InvalidArgument(f"{what}: expected at least {least} token ids, got {len(ids)}")
        return ids

    def _run(
        self,
        start: Callable[[], list[RequestHandle]],
        what: str,
        progress: ProgressCallback | None,
    ) -> list[RequestHandle]:
        """Waits for all requests that start() submits, in steps short enough for Ctrl-C."""
        handles: list[RequestHandle] = []
        try:
            with Bar(what, "tokens") as bar:
                handles = start()
                report = progress or (lambda states: show(bar, states))
                said = time.monotonic()
                for handle in handles:
                    while not handle.wait_for(0.1):
                        if time.monotonic() - said >= INTERVAL:
                            said = time.monotonic()
                            report([h.progress() for h in handles])
                report([h.progress() for h in handles])
        except BaseException:
            _end(handles)
            raise
        return handles

    def _stream(
        self,
        requests: Sequence[Generation],
        progress: ProgressCallback | None = None,
        shown: bool = False,
    ) -> Iterator[tuple[int, Response]]:
        """Runs the requests and gives out their pieces, each with its place in `requests`.
        shown: the pieces may go to the terminal, where the bar must leave before them."""
        signal = Signal()
        handles: list[RequestHandle] = []
        try:
            with Bar("Generating", "tokens") as bar:
                report = progress or (lambda states: show(bar, states))
                handles = submit(self.engine, requests, signal)
                said = time.monotonic()
                while any(not request.done for request in requests):
                    signal.wait_for(INTERVAL)
                    for i, request in enumerate(requests):
                        piece = None if request.done else request.next()
                        if piece is not None:
                            if shown:
                                bar.close()
                            yield i, piece
                    if time.monotonic() - said >= INTERVAL:
                        said = time.monotonic()
                        report([handle.progress() for handle in handles])
        finally:
            _end(handles)

    def _warn_beyond_native(self, prompt_tokens: int, max_new_tokens: int | None) -> None:
        if self._warned:
            return
        session_len = self.engine.config.session_len
        new = session_len if max_new_tokens is None else max_new_tokens
        length = min(prompt_tokens + new, session_len)
        profile = self.engine.rope_profile(prompt_tokens, max_new_tokens or 0)
        if unscaled(profile) and length > profile.native_length:
            self._warned = True
            text = _BEYOND_NATIVE.format(length=length, native=profile.native_length)
            warnings.warn(text, stacklevel=_user_level())


def _log_at(level: str) -> None:
    """Sets the level of the logger "longspan", which writes to stderr where nobody listens."""
    try:
        _log.setLevel(level)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"log_level: expected a level of logging, got {level!r}") from error
    if not _log.hasHandlers():
        _log.addHandler(logging.StreamHandler())


def _engine_config(config: EngineConfig | None, overrides: dict[str, Any] | None) -> EngineConfig:
    if config is None:
        config = EngineConfig()
    if not isinstance(config, EngineConfig):
        raise InvalidArgument(
            f"backend_config: expected a TurbomindEngineConfig, got {type(config).__name__}"
        )
    if overrides is None:
        return config
    if config.hf_overrides:
        raise InvalidArgument("hf_overrides: expected in one place, got it in backend_config too")
    return replace(config, hf_overrides=overrides)


def _each(config: Any, count: int) -> list[GenerationConfig]:
    """One generation config per prompt."""
    if config is None:
        config = GenerationConfig()
    configs = list(config) if isinstance(config, (list, tuple)) else [config] * count
    if len(configs) != count:
        raise InvalidArgument(f"gen_config: expected one or {count}, got {len(configs)}")
    for one in configs:
        if not isinstance(one, GenerationConfig):
            raise InvalidArgument(
                f"gen_config: expected a GenerationConfig, got {type(one).__name__}"
            )
    return configs


def _ascending(positions: Any, length: int) -> tuple[list[int], npt.NDArray[np.intp]]:
    """Strictly ascending positions, as the engine takes them, and the row of each one asked for."""
    wanted = np.asarray(positions)
    if wanted.ndim != 1 or wanted.size == 0 or wanted.dtype.kind not in "iu":
        raise InvalidArgument(f"positions: expected a list of integers, got {positions!r:.80}")
    if wanted.min() < -length or wanted.max() >= length:
        raise InvalidArgument(
            f"positions: expected integers in [{-length}, {length}), got {positions!r:.80}"
        )
    rows, order = np.unique(np.where(wanted < 0, wanted + length, wanted), return_inverse=True)
    return rows.tolist(), order


def by_prompt(responses: Sequence[Response], requests: Sequence[Generation]) -> list[Any]:
    """A Response for each prompt, or with n > 1 the list of its n."""
    grouped: list[Any] = []
    for response, request in zip(responses, requests, strict=True):
        if request.config.n == 1:
            grouped.append(response)
        elif request.choice == 0:
            grouped.append([response])
        else:
            grouped[-1].append(response)
    return grouped


def _end(handles: Sequence[RequestHandle]) -> None:
    """Cancels what still runs and waits until it has ended; nothing happens to what has."""
    for handle in handles:
        handle.cancel()
    for handle in handles:
        while not handle.wait_for(0.1):
            pass


def _user_level() -> int:
    """The stacklevel, seen from the caller, of the first frame outside this package."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back and Path(frame.f_code.co_filename).parent == Path(__file__).parent:
        frame = frame.f_back
        level += 1
    return level
