"""The GPU benchmark without a GPU: bundle, cost model, scenes, resumable results, and a toy run of it all."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from benchmarks.gpu import bench, bundle, cost_model, install, kernels, measuring, one_at_a_time
from benchmarks.gpu.cost_model import Gpu, Reduction, Shape
from benchmarks.gpu.model import SIZES, write_folder
from vllm_hybrid import planning

REPO = Path(__file__).parents[1]
FULL = Shape()


# Bundle.


def write_wheel(file: Path, files: dict[str, bytes]) -> None:
    """A wheel named vllm with a true RECORD."""
    record = "vllm-0.32.0.dist-info/RECORD"
    rows = []
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(content)}")
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(record, "\n".join([*rows, f"{record},,"]) + "\n")


WHEEL_FILES = {
    "vllm/__init__.py": b"version = 1\n",
    "vllm/_C_stable_libtorch.abi3.so": b"needed",
    "vllm/_moe_C_stable_libtorch.abi3.so": b"not needed",
    "vllm/vllm-rs": b"a server in another language",
    "vllm/third_party/deep_gemm/include/a.hpp": b"template",
    "vllm/kernels/config.json": b"{}",
    "vllm-0.32.0.dist-info/METADATA": b"Name: vllm\nVersion: 0.32.0\n",
}


def test_a_slim_wheel_is_a_true_wheel_of_the_same_version(tmp_path: Path) -> None:
    source, target = tmp_path / "whole.whl", tmp_path / "slim.whl"
    write_wheel(source, WHEEL_FILES)
    assert bundle.record_is_true(source)
    bundle.rewrite_wheel(source, target, bundle.BINARIES)
    with zipfile.ZipFile(target) as archive:
        assert set(archive.namelist()) == {
            "vllm/__init__.py",
            "vllm/_C_stable_libtorch.abi3.so",
            "vllm/kernels/config.json",
            "vllm-0.32.0.dist-info/METADATA",
            "vllm-0.32.0.dist-info/RECORD",
        }
    assert bundle.record_is_true(target)


def test_a_wheel_with_a_wrong_record_is_noticed(tmp_path: Path) -> None:
    source, changed = tmp_path / "whole.whl", tmp_path / "changed.whl"
    write_wheel(source, WHEEL_FILES)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"other" if name == "vllm/__init__.py" else old.read(name))
    assert not bundle.record_is_true(changed)


def test_a_binary_that_the_wheel_does_not_have_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "whole.whl"
    write_wheel(source, WHEEL_FILES)
    with pytest.raises(RuntimeError, match=r"has no vllm/none\.so"):
        bundle.rewrite_wheel(source, tmp_path / "slim.whl", ["vllm/none.so"])


@pytest.mark.parametrize(
    ("wheel", "fits"),
    [
        ("a-1-py3-none-any.whl", True),
        ("a-1-py2.py3-none-any.whl", True),
        ("a-1-cp38-abi3-manylinux_2_28_x86_64.whl", True),
        ("a-1-cp312-cp312-manylinux2014_x86_64.manylinux_2_17_x86_64.whl", True),
        ("a-1-cp312-abi3-manylinux_2_26_x86_64.whl", True),
        ("a-1-cp311-cp311-manylinux_2_28_x86_64.whl", False),
        ("a-1-cp313-abi3-manylinux_2_28_x86_64.whl", False),
        ("a-1-cp312-cp312-manylinux_2_39_x86_64.whl", False),
        ("a-1-cp312-cp312-manylinux_2_28_aarch64.whl", False),
        ("a-1-cp312-cp312-macosx_11_0_arm64.whl", False),
    ],
)
def test_only_wheels_for_the_host_fit(wheel: str, fits: bool) -> None:
    assert bundle.fits_host(wheel) is fits


def test_requirements_leave_out_the_host_s_torch_and_what_llava_never_imports() -> None:
    metadata = "\n".join(
        [
            "Metadata-Version: 2.1",
            "Requires-Dist: torch==2.13.0",
            "Requires-Dist: flashinfer-python==0.7.0",
            "Requires-Dist: msgspec",
            'Requires-Dist: six>=1.16.0; python_version > "3.11"',
            'Requires-Dist: old; python_version < "3.12"',
            'Requires-Dist: pandas; extra == "bench"',
            "Requires-Dist: fastapi[standard]<0.137.0,>=0.133.0",
        ]
    )
    assert bundle.needed_of(metadata) == ["msgspec", "six>=1.16.0", "fastapi[standard]<0.137.0,>=0.133.0"]


def test_what_hangs_on_the_host_s_driver_and_torch_is_not_carried() -> None:
    assert [
        n for n in ("torch", "triton", "nvidia-cublas", "cuda-bindings", "numpy") if bundle.carried(n)
    ] == []
    assert bundle.carried("msgspec") and bundle.carried("Apache_TVM_FFI")


def test_parts_join_to_what_was_packed_and_damage_is_named(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "wheels").mkdir(parents=True)
    out.mkdir()
    (folder / "wheels" / "a.whl").write_bytes(os.urandom(5000))
    parts = bundle.pack(folder, out, 2000)
    assert len(parts) > 2 and all(part["bytes"] <= 2000 for part in parts)
    archive = install.join(out, {"parts": parts})
    import io
    import tarfile

    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:xz") as tar:
        member = tar.extractfile("wheels/a.whl")
        assert member is not None and member.read() == (folder / "wheels" / "a.whl").read_bytes()
    (out / parts[1]["name"]).write_bytes(b"x")
    with pytest.raises(RuntimeError, match=r"bundle\.tar\.xz\.01 is damaged"):
        install.join(out, {"parts": parts})
    (out / parts[0]["name"]).unlink()
    with pytest.raises(RuntimeError, match=r"bundle\.tar\.xz\.00 is missing"):
        install.join(out, {"parts": parts})


def test_the_installer_names_what_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "present.py").write_text("")
    (tmp_path / "broken.py").write_text("import absent_module\n")
    found = install.missing(tmp_path, ("present", "broken", "json", "nowhere"))
    assert found == [
        "broken cannot be imported: ModuleNotFoundError: No module named 'absent_module'",
        "nowhere cannot be imported: ModuleNotFoundError: No module named 'nowhere'",
    ]


def test_sources_for_the_check_and_the_benchmark_are_carried(tmp_path: Path) -> None:
    bundle.copy_sources(tmp_path)
    for command in install.commands(tmp_path.parent, tmp_path, 100):
        name = Path(command[1]).name
        assert (tmp_path / "benchmarks" / "gpu" / name).is_file()
    assert (tmp_path / "tests" / "engines.py").is_file()
    assert {"typer", "rich"} <= set(bundle.project_requirements())


def test_the_installer_starts_what_is_not_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert options["env"]["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path)
        started.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(install.subprocess, "run", run)
    out = tmp_path / "out"
    out.mkdir()
    (out / "kernels.json").write_text('{"kernels": []}')
    assert install.measure(tmp_path, out, 100)
    assert [Path(command[1]).name for command in started] == ["kernels.py", "bench.py"]
    (out / "kernels.json").write_text('{"kernels": [], "complete": true}')
    started.clear()
    assert install.measure(tmp_path, out, 100)
    assert [Path(command[1]).name for command in started] == ["bench.py"]
    assert 0 < float(started[0][-1]) <= 100


def test_the_installer_names_other_versions() -> None:
    have = torch.__version__.split("+")[0]
    host = {"torch": have, "numpy": "0.0.1", "no-such-package": "1"}
    found = install.differences({"host": host})
    assert len(found) == 2
    assert found[0].startswith("no-such-package is not on this host")
    assert "the bundle was resolved for 0.0.1" in found[1]


# Cost model.

SMALL = Shape(
    vision_layers=3,
    vision_width=48,
    vision_inside=96,
    vision_heads=4,
    patches=16,
    patch_size=14,
    layers=4,
    width=64,
    inside=96,
    heads=4,
    kv_heads=2,
    head_size=16,
    vocabulary=120,
)


def test_operation_counts_are_torch_s_own() -> None:
    text, image_token = 9, 100
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=SMALL.vision_width,
            intermediate_size=SMALL.vision_inside,
            num_hidden_layers=SMALL.vision_layers,
            num_attention_heads=SMALL.vision_heads,
            image_size=56,
            patch_size=SMALL.patch_size,
        ),
        text_config=LlamaConfig(
            hidden_size=SMALL.width,
            intermediate_size=SMALL.inside,
            num_hidden_layers=SMALL.layers,
            num_attention_heads=SMALL.heads,
            num_key_value_heads=SMALL.kv_heads,
            head_dim=SMALL.head_size,
            vocab_size=SMALL.vocabulary,
        ),
        image_token_index=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=SMALL.patches,
        attn_implementation="eager",
    )
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1] * 4 + [image_token] * SMALL.patches + [2] * (text - 4)])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 56, 56), logits_to_keep=1)
    tower = {name: f for name, f in counter.get_flop_counts().items() if name.endswith("vision_tower")}
    (tower_total,) = (sum(found.values()) for found in tower.values())
    off = Reduction()
    # transformers runs all layers of the tower and takes the one before the last's features.
    assert tower_total == cost_model.tower_linear_flops(SMALL, off) + cost_model.tower_attention_flops(
        SMALL, off
    )
    length = text + SMALL.patches
    decoder = SMALL.layers * (
        cost_model.linear_flops(SMALL, length) + cost_model.attention_flops(SMALL, length * length)
    )
    rest = cost_model.projector_flops(SMALL, SMALL.patches) + cost_model.head_flops(SMALL, 1)
    assert counter.get_total_flops() - tower_total == decoder + rest


def test_causal_attention_counts_the_pairs_that_see_each_other() -> None:
    for queries, keys in ((1, 7), (5, 5), (3, 8)):
        pairs = sum(k <= keys - queries + q for q in range(queries) for k in range(keys))
        assert cost_model.causal_pairs(queries, keys) == pairs


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("live", [1, 90, 195, 394, 575, None])
@pytest.mark.parametrize("image_start", [0, 5, 16, 131])
def test_kv_blocks_are_those_the_managers_hold(live: int | None, ratio: float, image_start: int) -> None:
    from vllm.v1.core.block_pool import BlockPool

    from vllm_hybrid.config import live_to_kept
    from vllm_hybrid.tiers import SPEC_OF_TIER, Tier, TierManager, tier_block_sizes

    reduction = Reduction(live, ratio)
    if not reduction.active:
        return
    positions = image_start + FULL.patches + 57
    lower = 2 if ratio else FULL.layers
    sizes = tier_block_sizes(16, lower, FULL.layers - lower)
    count = FULL.patches if live is None else live
    tokens = {Tier.LOWER: count, Tier.UPPER: live_to_kept(count, ratio)}
    pool = BlockPool(num_gpu_blocks=200, enable_caching=False, hash_block_size=16)
    free = pool.get_num_free_blocks()
    predicted = cost_model.tier_blocks(FULL, reduction, positions, image_start)
    page_bytes = set()
    total = 0
    for (tier, size), guess in zip(sizes.items(), predicted, strict=True):
        spec: Any = SPEC_OF_TIER[tier](
            block_size=size, num_kv_heads=32, head_size=128, head_size_v=128, dtype=torch.bfloat16
        )
        manager = TierManager(
            spec, pool, enable_caching=False, kv_cache_group_id=0, scheduler_block_size=size
        )
        manager.allocate_new_blocks("request", positions, positions)
        manager.give_back("request", image_start + tokens[tier], image_start + FULL.patches)
        held = sum(not block.is_null for block in manager.req_to_blocks["request"])
        assert guess.blocks == held
        total += held * guess.layers * spec.page_size_bytes
        page_bytes.add(guess.layers * spec.page_size_bytes)
    assert free - pool.get_num_free_blocks() == sum(guess.blocks for guess in predicted)
    assert len(page_bytes) == 1
    assert cost_model.request_kv_bytes(FULL, reduction, positions, image_start) == total


def test_stock_holds_every_block() -> None:
    assert cost_model.request_kv_bytes(FULL, Reduction(), 638) == 40 * 16 * 32 * 2 * 32 * 128 * 2


def test_an_image_costs_less_the_fewer_tokens_are_left() -> None:
    gpu = Gpu()
    for load in cost_model.LOADS.values():
        rates = [
            cost_model.serve(FULL, Reduction(live, ratio), load, gpu, requests=32).requests_per_s
            for live, ratio in ((394, 0.0), (195, 0.0), (90, 0.0), (90, 0.5), (90, 0.75))
        ]
        assert rates == sorted(rates) and len(set(rates)) == len(rates)


def test_requests_are_served_in_whole_prompts() -> None:
    # Three prompts of 636 positions fit in a step of 2000, so seven requests take three steps.
    gpu = Gpu()
    works = [cost_model.Work(3, 636), cost_model.Work(3, 636), cost_model.Work(1, 636)]
    took = [cost_model.step_time(FULL, Reduction(), work, gpu) for work in works]
    found = cost_model.serve(FULL, Reduction(), 1, gpu, requests=7, step_tokens=2000)
    assert found.requests_per_s == pytest.approx(7 / sum(took))
    assert found.first_token_s == pytest.approx(took[0] + took[1])
    assert found.per_token_s is None


def test_the_predictions_in_the_read_me_are_the_model_s() -> None:
    text = (REPO / "benchmarks" / "gpu" / "README.md").read_text()
    assert cost_model.table(cost_model.predict(FULL, Gpu())) in text
    assert cost_model.HEADING in text


# Measuring.


def test_medians() -> None:
    runs = [
        measuring.Timed(3, 2.0, [0.1, 0.3, 0.2], [0.4, 0.4, 1.0]),
        measuring.Timed(3, 1.0, [0.2, 0.2, 0.2], [0.2, 0.2, 0.2]),
        measuring.Timed(3, 3.0, [0.5, 0.5, 0.5], [0.6, 0.6, 0.6]),
    ]
    found = measuring.summary(runs)
    assert found["requests_per_s"] == 1.5
    assert found["first_token_s"] == 0.2
    assert found["per_token_s"] == pytest.approx(0.2)
    assert measuring.summary([measuring.Timed(1, 1.0, [0.1], [0.0])])["per_token_s"] is None


def test_cells_have_names_of_their_own() -> None:
    loads = [*bench.FULL.loads, "capacity"]
    keys = []
    for kind in ("stock", "off", "transformers", "hybrid"):
        for ratio in (0.0, 0.5) if kind == "hybrid" else (0.0,):
            keys += [c["key"] for c in bench.cells_of(bench.FULL, kind, [90, 195, 576], ratio, loads)]
    assert len(keys) == len(set(keys))
    assert "hybrid/90/0.5/prefill" in keys and "stock/capacity" in keys
    # Without merging, R = 0 reduces nothing: that is "off".
    assert "hybrid/576/0.5/decode" in keys and "hybrid/576/0/decode" not in keys
    assert not any(key.startswith("transformers") and key.endswith(("alone", "capacity")) for key in keys)


def test_results_go_on_only_where_they_were_begun(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    first = bench.Results(file, {"device": "a"}, "python bench.py")
    first.cells["stock/prefill"] = {"requests_per_s": 2.0}
    first.save()
    again = bench.Results(file, {"device": "a"}, "python bench.py --kinds stock")
    assert again.cells == {"stock/prefill": {"requests_per_s": 2.0}}
    assert [entry["command"] for entry in json.loads(file.read_text())["commands"]] == [
        "python bench.py",
        "python bench.py --kinds stock",
    ]
    with pytest.raises(RuntimeError, match="was measured with device a, this is b"):
        bench.Results(file, {"device": "b"}, "python bench.py")


def test_a_measuring_process_is_ended_at_the_deadline(tmp_path: Path) -> None:
    import time

    code = "import time; print('CELL {\"n\": 1}', flush=True); time.sleep(60)"
    began = time.time()
    messages = list(bench.lines_of([sys.executable, "-c", code], tmp_path / "log", began + 2))
    assert messages == [{"n": 1}]
    assert time.time() - began < 20
    with pytest.raises(RuntimeError, match="ended with code 3"):
        list(bench.lines_of([sys.executable, "-c", "exit(3)"], tmp_path / "log", time.time() + 60))


# Kernels.


@pytest.mark.parametrize("decodes", [False, True])
def test_a_scene_has_every_virtual_key_once(decodes: bool) -> None:
    heads = kernels.Heads(2, 1, 8)
    scene = kernels.make_scene(3, 5, 24, 9, heads, decodes)
    keys = planning.walk_pages(scene.facts, scene.block_table, scene.seq_lens, 24, kernels.BLOCK_SIZE)
    for request in range(3):
        first, end = (int(keys.member_ptr[keys.row_ptr[request + i]]) for i in (0, 1))
        assert keys.member_pos[first:end].sort().values.tolist() == list(range(24 + 9 + decodes))
    assert keys.row_page.unique().shape[0] == 3 * (5 + 9 + decodes)
    results = kernels.reference_results(scene)
    assert bool(torch.isfinite(results["attend"]).all())
    if not decodes:
        # Two heads give one unit of attention each, to all rows of their request.
        assert results["mass"].sum().item() == pytest.approx(3 * 2, rel=1e-5)


def test_floors_follow_the_shape() -> None:
    heads = kernels.Heads(32, 32, 128)
    decode = kernels.floors(1, 90, 576, 60, heads, True)["decode"]
    rows, positions = 60 + 90 + 1, 60 + 576 + 1
    assert decode.bytes == rows * 2 * 32 * 128 * 2 + 2 * 32 * 128 * 2 + 8 * positions
    assert decode.flops == positions * 4 * 32 * 128
    prefill = kernels.floors(2, 90, 576, 60, heads, False)["prefill"]
    assert prefill.flops == 2 * (636 * 637 / 2) * 4 * 32 * 128


def test_a_wrong_result_is_seen() -> None:
    wanted = torch.ones(4)
    assert kernels.error(torch.ones(4), wanted) == 0
    assert kernels.error(torch.tensor([1, 1, 1, float("nan")]), wanted) == float("inf")
    assert kernels.error(torch.tensor([1.0, 1, 1, 3]), wanted) == pytest.approx(1)


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPO / "benchmarks" / "gpu" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def test_kernels_are_checked_and_timed_through_the_interpreter(tmp_path: Path) -> None:
    done = run_script("kernels.py", "--tiny", "--out", str(tmp_path / "kernels.json"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    content = json.loads((tmp_path / "kernels.json").read_text())
    rows = content["kernels"]
    assert content["complete"]
    assert {row["kernel"] for row in rows} == {"walk", "queries", "prefill", "segments", "mass", "decode"}
    assert all(row["seconds"] > 0 and row["floor_s"] > 0 for row in rows)


def test_the_whole_benchmark_at_toy_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tiny.json"
    arguments = ["--tiny", "--no-check", "--out", str(out), "--repeats", "1", "--lives", "195"]
    arguments += ["--kinds", "stock,hybrid", "--ratios", "0.5", "--loads", "mixed,capacity"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert bench.main() == 0, capfd.readouterr().out[-2000:]
    assert "| mixed | 195 (" in capfd.readouterr().out
    content = json.loads(out.read_text())
    cells = content["cells"]
    assert set(cells) == {"stock/mixed", "stock/capacity", "hybrid/195/0.5/mixed", "hybrid/195/0.5/capacity"}
    for key in ("stock/mixed", "hybrid/195/0.5/mixed"):
        assert cells[key]["requests"] == bench.TINY.requests and cells[key]["requests_per_s"] > 0
        assert cells[key]["first_token_s"] > 0 and cells[key]["per_token_s"] > 0
    seen = cells["hybrid/195/0.5/mixed"]["live_counts"]
    assert seen["images"] == bench.TINY.requests and 1 <= seen["mean"] < 576
    ours, stock = cells["hybrid/195/0.5/capacity"], cells["stock/capacity"]
    assert ours["kv_bytes_a_request"] < stock["kv_bytes_a_request"]
    assert content["versions"]["vllm-hybrid"] != "absent"
    # What is measured already is not measured again.
    assert bench.main() == 0
    assert "measuring" not in capfd.readouterr().out
    assert json.loads(out.read_text())["cells"] == cells


def test_transformers_at_toy_size(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", SIZES["tiny"])
    processor = AutoImageProcessor.from_pretrained(str(folder))
    model = one_at_a_time.random_model(folder, "cpu")
    image_token = model.config.image_token_id
    asked = one_at_a_time.some_requests(1, True, image_token)[:2]
    inputs = [one_at_a_time.inputs_of(request, image_token, processor, "cpu") for request in asked]
    assert inputs[0]["input_ids"].shape[1] == cost_model.TEXT_TOKENS + 576
    with torch.inference_mode():
        timed = one_at_a_time.run(model, inputs, 3)
    assert len(timed.first) == len(timed.last) == 2
    assert timed.seconds == pytest.approx(sum(timed.first) + sum(timed.last))


def test_a_gpu_is_needed_for_anything_but_the_toy_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module, name in ((bench, "bench.py"), (kernels, "kernels.py")):
        monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path / "results.json")])
        assert module.main() == 1
        assert "there is no CUDA device; use a GPU host, or --tiny" in capsys.readouterr().out


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: kernels compiled, not interpreted"
)
def test_kernels_on_a_gpu(tmp_path: Path) -> None:
    """Results against the reference on every scene at the 7B shape; the times are of no interest here."""
    done = run_script("kernels.py", "--repeats", "1", "--out", str(tmp_path / "kernels.json"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads((tmp_path / "kernels.json").read_text())["complete"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the server's answers on it")
def test_answers_on_a_gpu(tmp_path: Path) -> None:
    import time

    found = bench.check(tmp_path, tmp_path / "check.log", time.time() + 200)
    assert found["agrees"], found
