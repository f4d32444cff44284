"""A pipeline for asyncio; nothing else of the package uses asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

from longspan._core import RequestHandle, Signal
from longspan.config import GenerationConfig
from longspan.generation import Generation, submit
from longspan.pipeline import Pipeline, by_prompt
from longspan.response import Response


class AsyncPipeline:
    """infer() and stream_infer() of a Pipeline as coroutines. May be used from several event loops;
    whatever runs shares one thread, which sleeps until the engine moves.

    Cancelling a task cancels its requests.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        """pipeline: stays usable as it is, and is its owner's to close."""
        self.pipeline = pipeline
        self._signal = Signal()
        self._lock = threading.Lock()
        self._watched = False  # by the thread
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def infer(
        self,
        prompts: Any,
        gen_config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        do_preprocess: bool = True,
        rope_length: str | int | None = None,
    ) -> Any:
        """Pipeline.infer()."""
        requests, alone = await self._prepare(prompts, gen_config, do_preprocess, rope_length)
        pieces: list[list[Response]] = [[] for _ in requests]
        async for i, piece in self._stream(requests):
            pieces[i].append(piece)
        grouped = by_prompt([reduce(Response.extend, parts) for parts in pieces], requests)
        return grouped[0] if alone else grouped

    async def stream_infer(
        self,
        prompts: Any,
        gen_config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        do_preprocess: bool = True,
        rope_length: str | int | None = None,
    ) -> AsyncIterator[Response]:
        """Pipeline.stream_infer()."""
        requests, _ = await self._prepare(prompts, gen_config, do_preprocess, rope_length)
        stream = self._stream(requests)
        try:
            async for _, piece in stream:
                yield piece
        finally:
            await stream.aclose()

    async def _prepare(self, *arguments: Any) -> tuple[list[Generation], bool]:
        """Encodes in a thread: a long text takes a while."""
        return await asyncio.to_thread(self.pipeline.prepare, *arguments)

    async def _stream(self, requests: Sequence[Generation]) -> Any:
        handles: list[RequestHandle] = []
        with self._woken() as event:
            try:
                handles = submit(self.pipeline.engine, requests, self._signal)
                while any(not request.done for request in requests):
                    await event.wait()
                    event.clear()
                    for i, request in enumerate(requests):
                        piece = None if request.done else request.next()
                        if piece is not None:
                            yield i, piece
            finally:
                for handle in handles:
                    handle.cancel()

    @contextmanager
    def _woken(self) -> Iterator[asyncio.Event]:
        """An event that is set whenever a request has moved."""
        event = asyncio.Event()
        entry = (asyncio.get_running_loop(), event)
        with self._lock:
            self._waiting.append(entry)
            if not self._watched:
                self._watched = True
                threading.Thread(target=self._watch, name="longspan-aio").start()
        try:
            yield event
        finally:
            with self._lock:
                self._waiting.remove(entry)
            self._signal.notify()  # lets the thread end when it was the last

    def _watch(self) -> None:
        main = threading.main_thread()
        while True:
            self._signal.wait_for(1.0)
            with self._lock:
                if not self._waiting or not main.is_alive():
                    self._watched = False
                    return
                for loop, event in self._waiting:
                    if not loop.is_closed():
                        loop.call_soon_threadsafe(event.set)
