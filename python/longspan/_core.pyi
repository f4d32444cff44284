"""The native engine. Mirrors cpp/include/longspan: the same names, units and errors."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

class LongspanError(RuntimeError): ...
class InvalidArgument(LongspanError, ValueError): ...
class Unsupported(LongspanError, NotImplementedError): ...
class CheckpointError(LongspanError): ...

class ContextTooLong(LongspanError, ValueError):
    prompt_tokens: int
    session_len: int
    kv_capacity: int

class CapacityError(LongspanError, MemoryError): ...
class BackendUnavailable(LongspanError): ...
class NumericalError(LongspanError): ...
class ParallelError(LongspanError): ...
class EngineClosed(LongspanError): ...

class RopeProfile:
    type: str
    inv_freq: npt.NDArray[np.float64]
    attention_factor: float
    base: float
    factor: float
    length: int
    native_length: int
    logn_length: int
    @staticmethod
    def from_config(
        config: dict[str, Any], length: int, rope_scaling_factor: float = 0.0
    ) -> RopeProfile: ...
    def __eq__(self, other: object) -> bool: ...

class EngineConfig:
    """Native options; every field can be set by keyword. rope_length: "request", "prompt",
    "session", "bucket" or an int of tokens."""

    dtype: str
    device: str
    num_threads: int
    tp: int
    cp: int
    session_len: int
    max_batch_size: int
    cache_max_entry_count: float
    cache_block_seq_len: int
    kv_cache_dtype: str
    prefill_attention: str
    linear_dtype: str
    enable_prefix_caching: bool
    max_prefill_token_num: int
    rope_scaling_factor: float
    rope_length: str | int
    deterministic: bool
    hf_overrides: str
    def __init__(self, **options: Any) -> None: ...

class GenerationConfig:
    max_new_tokens: int | None
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    min_new_tokens: int
    bad_sequences: list[list[int]]
    logprobs: int | None
    seed: int | None
    stop_token_ids: list[int]
    ignore_eos: bool
    def __init__(self, **options: Any) -> None: ...

class _EngineOptions(Protocol):
    """longspan.EngineConfig."""

    def native(self) -> EngineConfig: ...

class _GenerationOptions(Protocol):
    """longspan.GenerationConfig."""

    def native(self) -> GenerationConfig: ...

class Progress:
    prefill_done: int
    prefill_total: int
    generated: int
    elapsed_s: float
    tokens_per_s: float
    flops_per_s: float
    eta_s: float

class Signal:
    def __init__(self) -> None: ...
    def wait_for(self, timeout_s: float) -> bool: ...
    def notify(self) -> None: ...

class RequestOutput:
    token_ids: list[int]
    logprobs: list[list[tuple[int, float]]]  # [tokens][1 + n]: the token, then the likeliest
    finish_reason: str  # "stop", "length", "context_full", "cancelled"
    stop_token_id: int | None
    input_token_len: int
    cached_tokens: int
    rope_profile: RopeProfile
    seed: int
    nll_sum: float
    nll_count: int
    token_nll: npt.NDArray[np.float64]  # [nll_count] if asked for, else [0]
    logits: npt.NDArray[np.float32]  # [positions, vocab_size]
    queue_s: float
    prefill_s: float
    decode_s: float

class RequestHandle:
    def wait_for(self, timeout_s: float) -> bool: ...
    def wait(self) -> RequestOutput: ...
    def wait_for_tokens(self, count: int, timeout_s: float) -> bool: ...
    def tokens_from(self, start: int) -> list[int]: ...
    def logprobs_from(self, start: int) -> list[list[tuple[int, float]]]: ...
    def progress(self) -> Progress: ...
    def cancel(self) -> None: ...

class Context:
    token_ids: npt.NDArray[np.int32]
    rope_profile: RopeProfile
    file_bytes: int

class ContextProgress:
    computed: int
    moved: int
    total: int

class PlanRemedy:
    change: str
    total_bytes: int
    max_session_len: int

class MemoryPlan:
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    workspace_bytes: int
    overhead_bytes: int
    device_bytes: int
    num_blocks: int
    block_bytes: int
    session_kv_bytes: int
    kv_capacity: int
    session_len: int
    max_session_len: int
    fits: bool
    remedies: list[PlanRemedy]
    total_bytes: int
    headroom_bytes: int

class CostTerm:
    name: str
    value: float
    unit: str
    source: str

class CostParts:
    products: float
    attention: float
    rows: float
    ranks: float
    total: float
    limit: str

class CostPrediction:
    memory: MemoryPlan
    prefill: CostParts
    decode: CostParts
    terms: list[CostTerm]

class RendezvousStep:
    name: str
    ok: bool
    found: str
    seconds: float

class Rendezvous:
    rank: int
    size: int
    steps: list[RendezvousStep]
    ok: bool

class EngineMetrics:
    waiting: int
    running: int
    free_blocks: int
    total_blocks: int
    steps: int
    prefilled_tokens: int
    generated_tokens: int
    cached_blocks: int
    prefix_hit_tokens: int
    prefix_miss_tokens: int
    prefix_evictions: int

class ModelInfo:
    architecture: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_parameters: int
    native_length: int
    eos_token_ids: list[int]
    dtype: str
    backend: str
    rope: str

class BackendInfo:
    name: str
    available: bool
    detail: str

class Request:
    @staticmethod
    def generate(
        input_ids: Sequence[int] | npt.NDArray[Any],
        config: GenerationConfig | _GenerationOptions = ...,
        rope_length: str | int | None = None,
        token_nll: bool = False,
    ) -> Request: ...
    @staticmethod
    def score(input_ids: Sequence[int] | npt.NDArray[Any], token_nll: bool = False) -> Request: ...
    @staticmethod
    def logits(
        input_ids: Sequence[int] | npt.NDArray[Any], positions: Sequence[int]
    ) -> Request: ...

class Engine:
    """Token ids in, token ids out. All waiting happens without the GIL."""

    @staticmethod
    def load(
        model_dir: str,
        config: EngineConfig | _EngineOptions = ...,
        progress: Callable[[int, int], None] | None = None,
    ) -> Engine: ...
    @staticmethod
    def follow(
        model_dir: str,
        config: EngineConfig | _EngineOptions = ...,
        progress: Callable[[int, int], None] | None = None,
    ) -> bool: ...
    def submit(
        self, requests: Sequence[Request], signal: Signal | None = None
    ) -> list[RequestHandle]: ...
    def check(self, request: Request) -> None: ...
    def generate(
        self,
        input_ids: Sequence[int] | npt.NDArray[Any],
        config: GenerationConfig | _GenerationOptions = ...,
        rope_length: str | int | None = None,
        token_nll: bool = False,
    ) -> RequestHandle: ...
    def score(
        self, input_ids: Sequence[int] | npt.NDArray[Any], token_nll: bool = False
    ) -> RequestHandle: ...
    def logits(
        self, input_ids: Sequence[int] | npt.NDArray[Any], positions: Sequence[int]
    ) -> RequestHandle: ...
    def save_context(
        self,
        input_ids: Sequence[int] | npt.NDArray[Any],
        path: str,
        rope_length: str | int | None = None,
        checkpoint_tokens: int = 0,
        progress: Callable[[ContextProgress], None] | None = None,
    ) -> Context: ...
    def load_context(
        self, path: str, progress: Callable[[ContextProgress], None] | None = None
    ) -> Context: ...
    def rope_profile(self, prompt_tokens: int, max_new_tokens: int = 0) -> RopeProfile: ...
    def metrics(self) -> EngineMetrics: ...
    @property
    def model(self) -> ModelInfo: ...
    @property
    def config(self) -> EngineConfig: ...
    @property
    def plan(self) -> MemoryPlan: ...
    def close(self) -> None: ...
    def __enter__(self) -> Engine: ...
    def __exit__(self, *args: object) -> None: ...

def plan_memory(
    model_dir: str, config: EngineConfig | _EngineOptions, device_bytes: int = 0
) -> MemoryPlan: ...
def predict_cost(
    model_dir: str,
    config: EngineConfig | _EngineOptions,
    gpus_per_host: int = 8,
    link_gbps: float = 400.0,
    sequences: int = 1,
) -> CostPrediction: ...
def check_rendezvous(
    device: str = "auto",
    timeout_s: int = 60,
    begins: Callable[[int, str], None] | None = None,
) -> Rendezvous: ...
def backends() -> list[BackendInfo]: ...
def version() -> str: ...
