"""Longspan: open-weights language models far past their trained context."""

from longspan import cuda_libraries
from longspan._core import (
    BackendUnavailable,
    CapacityError,
    CheckpointError,
    Context,
    ContextTooLong,
    Engine,
    EngineClosed,
    InvalidArgument,
    LongspanError,
    NumericalError,
    ParallelError,
    RopeProfile,
    Unsupported,
    backends,
    plan_memory,
    predict_cost,
    version,
)
from longspan.config import EngineConfig, GenerationConfig, TurbomindEngineConfig
from longspan.pipeline import Pipeline, pipeline
from longspan.response import Perplexity, Response
from longspan.session import Session

cuda_libraries.tell_engine()

__version__ = version()

__all__ = [
    "BackendUnavailable",
    "CapacityError",
    "CheckpointError",
    "Context",
    "ContextTooLong",
    "Engine",
    "EngineClosed",
    "EngineConfig",
    "GenerationConfig",
    "InvalidArgument",
    "LongspanError",
    "NumericalError",
    "ParallelError",
    "Perplexity",
    "Pipeline",
    "Response",
    "RopeProfile",
    "Session",
    "TurbomindEngineConfig",
    "Unsupported",
    "backends",
    "pipeline",
    "plan_memory",
    "predict_cost",
]
