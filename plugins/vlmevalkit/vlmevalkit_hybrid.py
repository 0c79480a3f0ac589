"""Adds ``llava_v1.5_7b_hybrid`` to VLMEvalKit's models: a running vllm-hybrid server.

The ``.pth`` file beside this module imports it in every interpreter of the environment. It then imports
almost nothing: the rest waits for ``vlmeval.config``, whose table of models gets one more entry. So
VLMEvalKit's own ``run.py --data COCO_VAL --model llava_v1.5_7b_hybrid`` finds it, as does all that reads the
table.

Environment variables, read when VLMEvalKit builds the model:

    LLAVA_HYBRID_URL             where the server answers; default http://localhost:8000/v1
    LLAVA_HYBRID_MODEL           the name it serves the model by; default its only one
    LLAVA_HYBRID_KEY             the server's API key, if it wants one
    LLAVA_HYBRID_MAX_TOKENS      the longest answer; default 512
    LLAVA_HYBRID_DETAIL          the pictures' detail, such as the name of a level; default auto
    LLAVA_HYBRID_CAPTION_PROMPT  asks for captions in place of VLMEvalKit's prompt
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

NAME = "llava_v1.5_7b_hybrid"
_TABLE = "vlmeval.config"


def register(config: Any) -> None:
    """Add the model to VLMEvalKit's table.

    Args:
        config: the module ``vlmeval.config``.

    """
    from functools import partial

    # VLMEvalKit sets "retry" and "verbose" from its command line where an entry has them.
    config.supported_VLM.setdefault(NAME, partial(build, retry=10, verbose=False))


def build(**options: Any) -> Any:
    """The model as VLMEvalKit calls it: its wrapper of OpenAI's API, at our server, with whole pictures.

    Args:
        options: further arguments of the wrapper ``vlmeval.api.GPT4V``.

    Raises:
        RuntimeError: no server answers, or it serves several models and none is chosen.

    """
    import os

    from vlmeval.api import GPT4V
    from vlmeval.dataset import DATASET_TYPE

    url = (
        os.environ.get("LLAVA_HYBRID_URL", "http://localhost:8000/v1").rstrip("/").removesuffix("/v1") + "/v1"
    )
    # Some versions of the wrapper take no key that begins otherwise.
    key = os.environ.get("LLAVA_HYBRID_KEY", "sk-none")
    caption_prompt = os.environ.get("LLAVA_HYBRID_CAPTION_PROMPT")

    class LLaVAHybrid(GPT4V):
        def use_custom_prompt(self, dataset: str) -> bool:
            return caption_prompt is not None and DATASET_TYPE(dataset) == "Caption"

        def build_prompt(self, line: Any, dataset: str | None = None) -> list[dict[str, str]]:
            pictures = [{"type": "image", "value": path} for path in self.dump_image(line, dataset)]
            return [*pictures, {"type": "text", "value": str(caption_prompt)}]

    fixed = {
        "model": os.environ.get("LLAVA_HYBRID_MODEL") or _only_model(url, key),
        "api_base": f"{url}/chat/completions",
        "key": key,
        "temperature": 0,
        "max_tokens": int(os.environ.get("LLAVA_HYBRID_MAX_TOKENS", "512")),
        # As large as they are: the server scales pictures as LLaVA wants them.
        "img_size": -1,
        "timeout": 600,
    }
    model = LLaVAHybrid(**{**fixed, **options})
    # The wrapper's argument takes OpenAI's "low" and "high" only, either of which would choose a level.
    model.img_detail = os.environ.get("LLAVA_HYBRID_DETAIL", "auto")
    return model


def _only_model(url: str, key: str) -> str:
    """The name of the one model that the server serves."""
    import json
    import urllib.error
    import urllib.request

    request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            served = [model["id"] for model in json.load(reply)["data"]]
    except (urllib.error.URLError, OSError) as error:
        raise RuntimeError(
            f"no server answers at {url}: start one, or set LLAVA_HYBRID_URL ({error})"
        ) from None
    if len(served) != 1:
        raise RuntimeError(f"the server at {url} serves {', '.join(served)}: choose with LLAVA_HYBRID_MODEL")
    return str(served[0])


class TableImport:
    """Import hook that acts on VLMEvalKit's table of models only."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The table's module, to be added to once it is there; None, "not mine", for any other."""
        if fullname != _TABLE:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_register(module: Any) -> None:
            load(module)
            register(module)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if TableImport not in sys.meta_path:
    sys.meta_path.insert(0, TableImport)
