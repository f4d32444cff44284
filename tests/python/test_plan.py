"""What a plan says without the device and without the weights."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from longspan import BackendUnavailable, CapacityError, EngineConfig, Unsupported, plan_memory
from longspan._core import Engine, MemoryPlan

GIB = 1 << 30
RECORDS = Path(__file__).parents[2] / "benchmarks" / "results"
#: InternLM2.5-7B's shape: 7.74 billion parameters, 32 layers of 8 KV heads of 128.
SEVEN_B = json.loads((RECORDS / "cuda_reference_job-nvidia-h100.json").read_text())["model"]


@pytest.fixture
def seven_b(tmp_path: Path) -> Path:
    """A directory without any weights."""
    (tmp_path / "config.json").write_text(json.dumps(SEVEN_B))
    return tmp_path


def plan(folder: Path, device_bytes: int = 0, **options: Any) -> MemoryPlan:
    try:
        return plan_memory(str(folder), EngineConfig(**options), device_bytes)
    except BackendUnavailable as error:
        pytest.skip(str(error))


def parts(result: MemoryPlan) -> int:
    return (
        result.weight_bytes
        + result.kv_bytes
        + result.activation_bytes
        + result.workspace_bytes
        + result.overhead_bytes
    )


@pytest.mark.parametrize("device", ["h100", "h200", "a100-80g", "a100-40g", "l40s", "rtx4090"])
def test_a_gpu_that_is_not_there_is_planned_for(seven_b: Path, device: str) -> None:
    begin = time.perf_counter()
    result = plan(seven_b, device=device, session_len=10_000, max_batch_size=1)
    assert time.perf_counter() - begin < 2
    parameters = 7_738_953_728  # by hand: 2 V H + L (H (2 Q + 2 KV + 3 I) + 2 H) + H
    assert result.weight_bytes == pytest.approx(2 * parameters, rel=1e-3)
    kv_per_token = 2 * 32 * 8 * 128 * 2
    assert result.session_kv_bytes == 157 * 64 * kv_per_token  # ceil(10000 / 64) blocks
    assert result.total_bytes == parts(result)
    assert result.headroom_bytes == result.device_bytes - result.total_bytes
    if device == "rtx4090":
        assert 22 * GIB < result.device_bytes < 24 * GIB
    assert result.fits and result.headroom_bytes > 0


def test_ranks_share_a_model_and_each_pays_for_their_group(seven_b: Path) -> None:
    options: dict[str, Any] = {"device": "h100", "session_len": 10_000, "max_batch_size": 1}
    one, two = (plan(seven_b, tp=tp, **options) for tp in (1, 2))
    assert two.weight_bytes == pytest.approx(one.weight_bytes / 2, rel=1e-3)
    assert two.session_kv_bytes == one.session_kv_bytes / 2
    assert two.overhead_bytes == one.overhead_bytes + GIB  # NCCL


def test_what_does_not_fit_says_what_would(seven_b: Path) -> None:
    options: dict[str, Any] = {"device": "h200", "session_len": 1_000_000, "max_batch_size": 1}
    result = plan(seven_b, **options)
    # 131 GB of KV fit the card's 150 GB beside the weights, but not four fifths of what they leave.
    assert not result.fits and result.max_session_len < 1_000_000
    assert any(remedy.change == "tp=2" for remedy in result.remedies)
    check_remedies(seven_b, options, 0, result)


def test_a_million_tokens_on_80_gb(seven_b: Path) -> None:
    options: dict[str, Any] = {"device": "h100", "session_len": 1_000_000, "max_batch_size": 1}
    result = plan(seven_b, **options)
    assert not result.fits
    assert result.session_kv_bytes == 15625 * 64 * 2 * 32 * 8 * 128 * 2  # bfloat16
    changes = [remedy.change for remedy in result.remedies]
    assert any(change.startswith("kv_cache_dtype=int8_int4") for change in changes)
    check_remedies(seven_b, options, 0, result)


def test_remedies_of_a_cpu(seven_b: Path) -> None:
    options: dict[str, Any] = {
        "device": "cpu",
        "dtype": "bfloat16",
        "session_len": 40_000,
        "max_batch_size": 4,
        "max_prefill_token_num": 8192,
    }
    roomy = plan(seven_b, 100 * GIB, **options)
    assert roomy.fits and not roomy.remedies
    fixed = roomy.total_bytes - roomy.kv_bytes
    least = fixed + roomy.session_kv_bytes
    for device_bytes in (least, least - GIB // 2):  # a larger share; smaller chunks too
        result = plan(seven_b, device_bytes, **options)
        assert not result.fits and result.remedies
        assert not any("tp" in remedy.change for remedy in result.remedies)
        check_remedies(seven_b, options, device_bytes, result)
    hopeless = plan(seven_b, 10 * GIB, **options)
    assert not hopeless.fits and not hopeless.remedies


def test_linears_in_int8_take_half_the_memory(seven_b: Path) -> None:
    options: dict[str, Any] = {"device": "h200", "session_len": 10_000, "max_batch_size": 1}
    wide, narrow = (plan(seven_b, **options, linear_dtype=d) for d in ("auto", "int8"))
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336  # qkv, o, gate, up and down
    scales = 4 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)
    assert wide.weight_bytes - narrow.weight_bytes == 32 * (layer - scales)
    assert narrow.workspace_bytes - wide.workspace_bytes == 128 << 20
    assert narrow.total_bytes == parts(narrow)
    with pytest.raises(Unsupported, match=r'linear_dtype: expected one of "auto" on .*got "int8"'):
        plan(seven_b, **options | {"device": "a100-80g"}, linear_dtype="int8")
    # Rows of 14336 / 8 + 1 inputs take as much as those of the next multiple of 128.
    (seven_b / "config.json").write_text(json.dumps(SEVEN_B | {"intermediate_size": 14344}))
    uneven = plan(seven_b, **options, tp=8, linear_dtype="int8")
    (seven_b / "config.json").write_text(json.dumps(SEVEN_B))
    even = plan(seven_b, **options, tp=8, linear_dtype="int8")
    assert uneven.weight_bytes - even.weight_bytes == 32 * (2 * (4096 + 4) + 128 * 4096)


def test_linears_in_int8_are_refused_on_a_cpu(seven_b: Path) -> None:
    config = EngineConfig(device="cpu", session_len=100, linear_dtype="int8").native()
    with pytest.raises(Unsupported, match=r'linear_dtype: expected one of "auto" on cpu.*"int8"'):
        Engine.load(str(seven_b), config)


def check_remedies(
    folder: Path, options: dict[str, Any], device_bytes: int, result: MemoryPlan
) -> None:
    """Whoever does as a remedy says gets what it says."""
    for remedy in result.remedies:
        pairs = dict(change.split("=") for change in remedy.change.split(", "))
        changes = {k: int(v) if v.isdecimal() else v for k, v in pairs.items()}
        changed = plan(folder, device_bytes, **options | changes)
        assert changed.fits, remedy
        assert changed.total_bytes == remedy.total_bytes <= changed.device_bytes
        assert changed.max_session_len == remedy.max_session_len >= options["session_len"]


def test_an_engine_that_does_not_fit_names_a_remedy(seven_b: Path) -> None:
    # The plan is made before any weights are looked for; more memory than any machine has.
    with pytest.raises(CapacityError, match=r"session_len: expected at most \d+ tokens"):
        Engine.load(str(seven_b), EngineConfig(device="cpu", session_len=10**11).native())


def test_the_device_of_a_plan_is_checked(seven_b: Path) -> None:
    with pytest.raises(Unsupported, match='dtype: expected "bfloat16" on h100, got "float32"'):
        plan(seven_b, device="h100", dtype="float32")
