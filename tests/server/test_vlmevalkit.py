"""The model that ``plugins/vlmevalkit`` adds to VLMEvalKit, and the example task for lmms-eval.

Neither program is among what the tests install. A stand-in with VLMEvalKit's module names, table and wrapper
shows that the entry gets into the table and what it asks for. Where VLMEVALKIT_PYTHON or LMMS_EVAL_PYTHON
names the interpreter of an environment that has the program, it is run itself.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.openai_server import FakeServer, fake_server
from tests.support.paths import ROOT

PLUGIN = ROOT / "plugins" / "vlmevalkit"
NAME = "llava_v1.5_7b_hybrid"
COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200)}

CONFIG = """
from functools import partial
from vlmeval.api import GPT4V
supported_VLM = {"GPT4V": partial(GPT4V, model="gpt-4", retry=10, verbose=False)}
"""
# The wrapper's arguments of all versions seen; some insist on the key's beginning.
API = """
import base64, json, urllib.request
class GPT4V:
    is_api = True
    def __init__(self, model="gpt", retry=5, wait=5, key=None, verbose=False, system_prompt=None,
                 temperature=0, timeout=60, api_base=None, max_tokens=2048, img_size=512, img_detail="low"):
        assert key.startswith("sk-") and img_detail in ("high", "low") and img_size == -1
        self.url, self.model, self.retry, self.key = api_base, model, retry, key
        self.img_detail = img_detail
        self.fixed = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
    def set_dump_image(self, function):
        self.dump_image_func = function
    def dump_image(self, line, dataset):
        return self.dump_image_func(line)
    def generate(self, message, dataset=None):
        parts = []
        for part in message:
            if part["type"] == "image":
                content = base64.b64encode(open(part["value"], "rb").read()).decode()
                image = {"url": "data:image/png;base64," + content, "detail": self.img_detail}
                parts.append({"type": "image_url", "image_url": image})
            else:
                parts.append({"type": "text", "text": part["value"]})
        body = json.dumps({**self.fixed, "messages": [{"role": "user", "content": parts}]}).encode()
        headers = {"Authorization": "Bearer " + self.key}
        with urllib.request.urlopen(urllib.request.Request(self.url, body, headers)) as reply:
            return json.load(reply)["choices"][0]["message"]["content"]
"""
DATASET = """
def DATASET_TYPE(dataset): return "Caption" if dataset == "COCO_VAL" else "VQA"
"""
# What inference.py does with a model that is an API.
RUN = """
import sys
from vlmeval.config import supported_VLM
dataset, picture = sys.argv[1:]
for entry in supported_VLM.values():
    entry.keywords["retry"] = 3
model = supported_VLM["llava_v1.5_7b_hybrid"]()
assert model.is_api and model.retry == 3
model.set_dump_image(lambda line: [line["path"]])
line = {"path": picture}
if model.use_custom_prompt(dataset):
    message = model.build_prompt(line, dataset=dataset)
else:
    message = [{"type": "image", "value": picture}, {"type": "text", "value": "VLMEvalKit's own"}]
print(model.generate(message=message, dataset=dataset))
"""


def answer(pictures: list[str], text: str) -> str:
    picture = Image.open(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2]))).convert("RGB")
    levels = picture.resize((1, 1)).tobytes()
    return f"A square of {list(COLOURS)[levels.index(max(levels))]} here"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server(answer, "only") as running:
        yield running


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """The stand-in, beside the plugin's own files."""
    package = tmp_path / "site" / "vlmeval"
    package.mkdir(parents=True)
    for name, text in (("__init__", ""), ("config", CONFIG), ("api", API), ("dataset", DATASET)):
        (package / f"{name}.py").write_text(text)
    for file in ("vlmevalkit_hybrid.py", "vlmevalkit_hybrid.pth"):
        (tmp_path / "site" / file).write_text((PLUGIN / file).read_text())
    Image.new("RGB", (20, 20), COLOURS["green"]).save(tmp_path / "green.png")
    (tmp_path / "run.py").write_text(RUN)
    return tmp_path


def run(kit: Path, dataset: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the stand-in's run.py in an interpreter to which its folder is a site's."""
    code = (
        f"import runpy, site, sys; site.addsitedir({str(kit / 'site')!r})\n"
        "assert not {name for name in sys.modules if name.startswith('vlmeval.')}\n"
        f"sys.argv = ['run.py', {dataset!r}, {str(kit / 'green.png')!r}]\n"
        f"runpy.run_path({str(kit / 'run.py')!r}, run_name='__main__')"
    )
    environment = os.environ | {"NO_PROXY": "127.0.0.1"} | variables
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_the_model_is_in_the_table_and_asks_the_server(kit: Path, server: FakeServer) -> None:
    done = run(kit, "COCO_VAL", LLAVA_HYBRID_URL=server.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "A square of green here\n"
    assert server.texts() == ["VLMEvalKit's own"]
    (request,) = server.requests
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("only", 0, 512)


def test_captions_may_be_asked_for_in_other_words(kit: Path, server: FakeServer) -> None:
    server.models = ["a", "b"]
    variables = {"LLAVA_HYBRID_URL": server.url.removesuffix("/v1"), "LLAVA_HYBRID_CAPTION_PROMPT": "Short!"}
    done = run(kit, "COCO_VAL", LLAVA_HYBRID_MODEL="b", LLAVA_HYBRID_MAX_TOKENS="30", **variables)
    assert done.returncode == 0, done.stderr
    assert run(kit, "TextVQA_VAL", LLAVA_HYBRID_MODEL="b", **variables).returncode == 0
    assert server.texts() == ["Short!", "VLMEvalKit's own"]
    assert [request["max_tokens"] for request in server.requests] == [30, 512]
    assert {request["model"] for request in server.requests} == {"b"}


def test_the_detail_is_the_servers_choice_or_the_users(kit: Path, server: FakeServer) -> None:
    """Not the wrapper's "low" or "high", which would be a level."""
    assert run(kit, "COCO_VAL", LLAVA_HYBRID_URL=server.url).returncode == 0
    assert run(kit, "COCO_VAL", LLAVA_HYBRID_URL=server.url, LLAVA_HYBRID_DETAIL="mid").returncode == 0
    pictures = [request["messages"][0]["content"][0]["image_url"] for request in server.requests]
    assert [picture["detail"] for picture in pictures] == ["auto", "mid"]


def test_what_is_missing_is_said(kit: Path, server: FakeServer) -> None:
    server.models = ["a", "b"]
    done = run(kit, "COCO_VAL", LLAVA_HYBRID_URL=server.url)
    assert "serves a, b: choose with LLAVA_HYBRID_MODEL" in done.stderr
    done = run(kit, "COCO_VAL", LLAVA_HYBRID_URL="http://127.0.0.1:9/v1")
    assert "no server answers at http://127.0.0.1:9/v1" in done.stderr


def test_without_vlmevalkit_nothing_happens(kit: Path) -> None:
    code = (
        f"import importlib.util, site; site.addsitedir({str(PLUGIN)!r})\n"
        "print(importlib.util.find_spec('vlmeval'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=kit, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")


# ---- the programs themselves ----------------------------------------------------------------------


def interpreter(variable: str) -> str:
    found = os.environ.get(variable)
    if not found:
        pytest.skip(f"{variable} names no interpreter")
    return found


def write_captions(file: Path) -> None:
    with file.open("w", newline="") as opened:
        table = csv.writer(opened, delimiter="\t", lineterminator="\n")
        table.writerow(["index", "image", "answer"])
        for index, (name, colour) in enumerate(COLOURS.items()):
            buffer = io.BytesIO()
            Image.new("RGB", (64, 64), colour).save(buffer, "JPEG")
            references = [f"A square of {name}", f"this is all {name}"]
            table.writerow([index, base64.b64encode(buffer.getvalue()).decode(), references])


def test_vlmevalkit_itself_gives_the_scores_of_eval(tmp_path: Path, server: FakeServer) -> None:
    python = interpreter("VLMEVALKIT_PYTHON")
    write_captions(tmp_path / "COCO_VAL.tsv")
    # Its run.py as it is, except that it does not ask for the checksum of the real file.
    code = (
        "import runpy, sys, vlmeval.dataset.image_caption as captions\n"
        "captions.ImageCaptionDataset.DATASET_MD5 = {'COCO_VAL': None}\n"
        "sys.argv = ['run.py', '--data', 'COCO_VAL', '--model', 'llava_v1.5_7b_hybrid']\n"
        "runpy.run_module('vlmeval.run', run_name='__main__')"
    )
    variables = {"LMUData": str(tmp_path), "LLAVA_HYBRID_URL": server.url, "NO_PROXY": "127.0.0.1"}
    environment = os.environ | variables
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "outputs" / NAME).rglob(f"{NAME}_COCO_VAL_score.json")
    theirs = json.loads(file.read_text())
    call = [sys.executable, "-m", "vllm_hybrid.cli", "eval", "--data", "COCO_VAL", "--url", server.url]
    subprocess.run([*call, "--out", tmp_path / "ours"], cwd=ROOT, env=environment, check=True)
    (model,) = json.loads((tmp_path / "ours" / "COCO_VAL" / "only.json").read_text())["models"]
    ours = model["scores"]
    assert [ours[f"Bleu-{n}"] for n in range(1, 5)] == pytest.approx(theirs["Bleu"])
    assert (ours["ROUGE-L"], ours["CIDEr"]) == (
        pytest.approx(theirs["ROUGE_L"]),
        pytest.approx(theirs["CIDEr"]),
    )
    assert ours["CIDEr"] > 1


def lmms_eval(
    folder: Path, server: FakeServer, *model_args: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The results and samples of lmms-eval's run of the example task, as docs/evaluation.md calls it."""
    python = interpreter("LMMS_EVAL_PYTHON")
    write_captions(folder / "captions.tsv")
    call = [python, "-m", "lmms_eval", "--model", "openai", "--tasks", "local_captions", "--batch_size", "1"]
    call += ["--model_args", ",".join([f"base_url={server.url},model=only,timeout=600", *model_args])]
    call += ["--include_path", str(ROOT / "examples" / "lmms_eval")]
    call += ["--verbosity", "DEBUG", "--log_samples", "--output_path", str(folder / "results")]
    variables = {"OPENAI_API_KEY": "none", "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(call, cwd=folder, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (results,) = (folder / "results").glob("*/*_results.json")
    (samples,) = (folder / "results").glob("*/*_samples_local_captions.jsonl")
    lines = samples.read_text().splitlines()
    return json.loads(results.read_text())["results"]["local_captions"], list(map(json.loads, lines))


def test_lmms_eval_itself_runs_the_example_task(tmp_path: Path, server: FakeServer) -> None:
    results, samples = lmms_eval(tmp_path, server)
    said = [sample["filtered_resps"] for sample in samples]
    assert said == [f"A square of {colour} here" for colour in COLOURS]
    assert results["CIDEr,none"] > 1
    assert len(server.requests) == 3
    assert set(server.texts()) == {"Provide a one-sentence caption for the provided image."}


def test_lmms_eval_says_in_its_samples_alone_that_requests_failed(tmp_path: Path) -> None:
    """The word that docs/evaluation.md looks for; the run itself counts as one that worked."""
    with fake_server(lambda pictures, text: 400, "only") as refusing:
        results, samples = lmms_eval(tmp_path, refusing, "max_retries=1")
    assert results["CIDEr,none"] == 0
    assert all("LMMS_EVAL_REQUEST_FAILED" in sample["filtered_resps"] for sample in samples)
    assert len(samples) == len(refusing.requests) == len(COLOURS)
