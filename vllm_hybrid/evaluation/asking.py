"""Asks an OpenAI-compatible server about the rows of a data file, several at a time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_hybrid.evaluation.predictions import Prediction
from vllm_hybrid.evaluation.tsv import Row

if TYPE_CHECKING:
    from openai import AsyncOpenAI


@dataclass(frozen=True)
class Server:
    """A model on a running server.

    Attributes:
        url: the API's, ending in /v1.
        model: the name it is served by.
        root: what the server says it loaded, such as the checkpoint's folder.

    """

    url: str
    model: str
    root: str | None


def find_server(url: str, model: str | None) -> Server:
    """Look a model up on a server.

    Args:
        url: the server's, with or without /v1.
        model: the name it is served by; None for the only one.

    Raises:
        ValueError: no server answers there, or it serves no such model.

    """
    import openai

    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    try:
        with openai.OpenAI(base_url=base, api_key=_key(), max_retries=1, timeout=30) as client:
            served = {one.id: getattr(one, "root", None) for one in client.models.list()}
    except openai.APIConnectionError:
        raise ValueError(f"no server answers at {base}; start one, or give its --url") from None
    except openai.OpenAIError as error:
        raise ValueError(f"the server at {base} does not list its models: {error}") from None
    if model is None and len(served) == 1:
        model = next(iter(served))
    if model is None:
        raise ValueError(f"the server at {base} serves {', '.join(served) or 'nothing'}; choose with --model")
    if model not in served:
        raise ValueError(
            f"the server at {base} serves {', '.join(served) or 'nothing'}, not {model}; "
            f"start it with --served-model-name {model}, or give another --model"
        )
    return Server(base, model, served[model])


def ask(
    server: Server,
    rows: Iterable[Row],
    message: Callable[[Row], tuple[list[str], str]],
    add: Callable[[Prediction], None],
    *,
    concurrency: int,
    max_tokens: int,
    report: Callable[[int], None],
    detail: str | None = None,
) -> dict[str, str]:
    """Ask about all rows, without sampling.

    Args:
        server: what is asked.
        rows: what about; each is fetched when its turn comes.
        message: a row's pictures as URLs, and its prompt.
        add: takes an answer as soon as it is there.
        concurrency: rows in flight at once.
        max_tokens: the longest answer.
        report: called with the number of rows that are done, after each.
        detail: OpenAI's ``detail`` of every picture; None sends none.

    Returns:
        What went wrong with the rows that got no answer, by index. They can be asked again.

    Raises:
        ValueError: the server no longer answers, or refuses to, or knows no such detail; answers so far were
            added.

    """
    return asyncio.run(_ask(server, rows, message, add, concurrency, max_tokens, report, detail))


async def _ask(
    server: Server,
    rows: Iterable[Row],
    message: Callable[[Row], tuple[list[str], str]],
    add: Callable[[Prediction], None],
    concurrency: int,
    max_tokens: int,
    report: Callable[[int], None],
    detail: str | None,
) -> dict[str, str]:
    import openai

    failed: dict[str, str] = {}
    waiting = iter(rows)
    done = 0

    async def work(client: AsyncOpenAI) -> None:
        nonlocal done
        for row in waiting:
            try:
                add(await _answer(client, server.model, row.index, *message(row), max_tokens, detail))
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise ValueError(f"the server at {server.url} refuses: {error}") from None
            except openai.APITimeoutError:
                failed[row.index] = "no answer in time"
            except openai.APIConnectionError:
                raise ValueError(
                    f"the server at {server.url} no longer answers; run again to go on where it stopped"
                ) from None
            except (openai.OpenAIError, ValueError, OSError) as error:
                if detail is not None and getattr(error, "param", None) == "detail":
                    # What is wrong with one row's is wrong with all.
                    raise ValueError(
                        f"the server at {server.url} refuses --detail {detail}: {_message(error)}"
                    ) from None
                failed[row.index] = str(error)
            done += 1
            report(done)

    async with openai.AsyncOpenAI(base_url=server.url, api_key=_key(), timeout=600) as client:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work(client))
        except ExceptionGroup as errors:
            # Workers that fail together fail of the same thing.
            raise errors.exceptions[0] from None
    return failed


async def _answer(
    client: AsyncOpenAI,
    model: str,
    index: str,
    pictures: list[str],
    text: str,
    max_tokens: int,
    detail: str | None,
) -> Prediction:
    said = {} if detail is None else {"detail": detail}
    content: list[Any] = [{"type": "image_url", "image_url": {"url": url, **said}} for url in pictures]
    content.append({"type": "text", "text": text})
    reply = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        max_tokens=max_tokens,
        temperature=0,
    )
    if not reply.choices:
        raise ValueError("the server's reply holds no answer")
    choice = reply.choices[0]
    return Prediction(index, (choice.message.content or "").strip(), choice.finish_reason)


def _message(error: Exception) -> str:
    """What a server says in an error, without what its client puts around it."""
    body = getattr(error, "body", None)
    return str(body.get("message", error)) if isinstance(body, dict) else str(error)


def _key() -> str:
    return os.environ.get("OPENAI_API_KEY") or "none"
