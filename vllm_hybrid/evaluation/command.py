"""``vllm-hybrid eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    data: Annotated[
        str,
        typer.Option(help="Name of a file in $LMUData (or ~/LMUData), or a .tsv file.", show_default=False),
    ],
    model: Annotated[
        str | None, typer.Option(help="Name the model is served by; the server's only one if left out.")
    ] = None,
    url: Annotated[str, typer.Option(help="Where the server answers.")] = "http://localhost:8000/v1",
    compare_model: Annotated[
        str | None, typer.Option(help="A second model to compare with the first.")
    ] = None,
    compare_url: Annotated[
        str | None, typer.Option(help="Where the second model is served, if not there too.")
    ] = None,
    detail: Annotated[
        list[str] | None,
        typer.Option(
            help="Send the pictures with this detail, such as a level's name. Repeated: ask each model once "
            "for each, and report all side by side. Without it none is sent.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for answers and scores.")] = Path("evaluation"),
    short_caption: Annotated[
        bool, typer.Option("--short-caption", help="Ask for a caption of one sentence.")
    ] = False,
    prompt: Annotated[
        str | None, typer.Option(help='Prompt of your own; "{question}" stands for the row\'s question.')
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Some of bleu,rouge,cider,exact,vqa; what suits the data if left out.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask about that many rows only.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    concurrency: Annotated[int, typer.Option(min=1, help="Rows in flight at once.")] = 16,
) -> None:
    """Ask a server the rows of a VLMEvalKit data file, and score its answers.

    Answers are kept as they come: stopped and run again, the command goes on where it was.
    """
    import json
    from dataclasses import replace

    from vllm_hybrid.evaluation.evaluating import Evaluation, ask_models, check_details, report_name
    from vllm_hybrid.evaluation.prompts import choose_template
    from vllm_hybrid.evaluation.report import as_table, make_report, notes
    from vllm_hybrid.evaluation.scoring import choose_metrics, require_libraries
    from vllm_hybrid.evaluation.tsv import find_data, read_data
    from vllm_hybrid.tools.progress import progress

    details = check_details(detail or ())
    found = read_data(find_data(data))
    template = choose_template(found, prompt, short_caption)
    chosen = choose_metrics(found, metrics)
    require_libraries(chosen)
    folder = out / found.name
    evaluation = Evaluation(found, found.rows[:limit], template, max_tokens, concurrency, folder)
    models = [(url, model)]
    if compare_model or compare_url:
        models.append((compare_url or url, compare_model))
    with progress() as shown:
        if len(details) > 1:
            # A detail that a server does not know shows before the others are asked, which takes long.
            ask_models(replace(evaluation, rows=evaluation.rows[:1]), models, details, lambda *_: None)
        sides = ask_models(evaluation, models, details, shown)
    report = make_report(found, evaluation.rows, sides, chosen)
    file = folder / report_name(sides, details)
    file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(as_table(report))
    for line in (*notes(report, max_tokens), f"{file} has all of this, {folder} the answers"):
        print(line)
    if any(side.failed for side in sides):
        raise typer.Exit(1)
