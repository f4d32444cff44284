"""Models of the Hugging Face hub, with huggingface_hub's cache, login and offline mode."""

from __future__ import annotations

import re
from pathlib import Path

from longspan._core import CheckpointError
from longspan.torch_weights import TEXT_FILES

_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
_TORCH_WEIGHTS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def is_repo_id(name: str) -> bool:
    """Whether this is written as "organisation/name"."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def download(
    repo_id: str,
    revision: str | None = None,
    download_dir: str | None = None,
    use_safetensors: bool = True,
) -> Path:
    """The directory of a model of the hub, downloaded first if it is not in the cache yet; only
    config, tokenizer and weights, with a bar for each file.

    revision: a branch, tag or commit. download_dir: in place of huggingface_hub's own cache.
    use_safetensors: False takes torch's .bin files instead.

    Throws CheckpointError that says what to do.
    """
    import huggingface_hub
    from huggingface_hub import errors

    at = f"{repo_id}@{revision}" if revision else repo_id
    weights = _WEIGHTS if use_safetensors else _TORCH_WEIGHTS
    try:
        path = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=[*TEXT_FILES, *weights],
            ignore_patterns=["*/*"],
        )
    except errors.HFValidationError as error:
        raise CheckpointError(f"{repo_id}: expected a model of the hub, got {error}") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{at}: expected access to this gated model; ask for it on the model's page, then log "
            "in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{at}: expected a model directory, a .gguf file or a model of the hub, got none of "
            "that name; if it is private, log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repo_id}: revision: expected a branch, tag or commit of the model, got {revision!r}"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise CheckpointError(
            f"{at}: expected it in the cache, as {why}, got nothing whole there; download it once "
            f"with `hf download {repo_id}` where the hub can be reached"
        ) from error
    except Exception as error:  # the library has no error that all of its own are
        raise CheckpointError(f"{at}: expected a download from the hub, got {error}") from error
    return _with_weights(Path(path), at, use_safetensors)


def _with_weights(path: Path, at: str, use_safetensors: bool) -> Path:
    if use_safetensors and not any(path.glob("model*.safetensors")):
        raise CheckpointError(
            f"{at}: expected weights in model.safetensors or shards of it, got none; "
            "use_safetensors=False takes torch's .bin files"
        )
    return path
