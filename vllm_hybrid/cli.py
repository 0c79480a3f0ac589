"""The ``vllm-hybrid`` command. Libraries are imported by the command that needs them: help is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_hybrid import __version__
from vllm_hybrid.doctor.command import doctor
from vllm_hybrid.environment.last_words import last_words
from vllm_hybrid.errors import one_line
from vllm_hybrid.evaluation.command import evaluate
from vllm_hybrid.tools.progress import progress as _progress

app = typer.Typer(
    help="Prepare LLaVA-1.5 checkpoints for vLLM with merged and pruned image tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Checkpoint = Annotated[Path, typer.Argument(help="Folder of a LLaVA-1.5 checkpoint.", show_default=False)]
Out = Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is already there.")]
Tokens = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]NUMBER",
        help="Live tokens per picture to reach on average; NAME=NUMBER, repeated, for several levels at "
        "once, the default one first.",
        show_default=False,
    ),
]
Ratio = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]RATIO",
        help="Share of an image's live tokens to drop, from 0 to below 1, at all levels; NAME=RATIO, "
        "repeated, for single ones. A level that has a name here and not in --tokens merges nothing.",
        show_default=False,
    ),
]
Images = Annotated[Path | None, typer.Option(help="Folder of pictures to calibrate on.")]
SkipUnreadable = Annotated[
    bool, typer.Option("--skip-unreadable", help="Calibrate without the pictures that cannot be read.")
]


def main() -> None:
    """Run the command. A mistake of the user ends it with one sentence and status 1, wrong usage with 2.

    So does a library that cannot be imported; other faults show where they are.
    """
    try:
        app()
    except Exception as error:
        sentence = last_words(error)
        if sentence is None and not isinstance(error, ValueError | OSError):
            raise
        print(f"vllm-hybrid: error: {sentence or one_line(error)}", file=sys.stderr)
        raise SystemExit(1) from None


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"vllm-hybrid {__version__}")
        raise typer.Exit


@app.command()
def demo_model(
    out: Out,
    random: Annotated[
        int | None, typer.Option(metavar="SEED", help="Random weights of this seed, not the trained ones.")
    ] = None,
    force: Force = False,
) -> None:
    """Write a small trained checkpoint of LLaVA-1.5's shape, and pictures to send to it."""
    from vllm_hybrid.demo.model import random_weights, trained_weights, write_demo_model
    from vllm_hybrid.tools.folders import check_target

    # Before anything is loaded or a bar is shown.
    check_target(out.absolute(), force)
    with _progress() as progress:
        weights = trained_weights if random is None else lambda: random_weights(random)
        write_demo_model(out, force, weights, progress)
    kind = "it knows coloured shapes, letters and digits" if random is None else "its answers make no sense"
    print(f"{out}: a demo checkpoint ({kind}); serve it with")
    print(f"  vllm serve {out}")


@app.command()
def prepare(
    checkpoint: Checkpoint,
    out: Out,
    thresholds: Annotated[
        Path | None,
        typer.Option(
            help="File with merge thresholds or levels: JSON, or DyMU's threshold checkpoint (.pth)."
        ),
    ] = None,
    level: Annotated[
        str | None,
        typer.Option(help="The default level, where levels have names; the file's or the first if left out."),
    ] = None,
    images: Images = None,
    tokens: Tokens = None,
    skip_unreadable: SkipUnreadable = False,
    fastv_layer: Annotated[
        int | None, typer.Option(help="Decoder layers before image tokens are dropped; 2 if left out.")
    ] = None,
    fastv_ratio: Ratio = None,
    assistant_header: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="What stands before an answer; found in the chat template if left out."
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Make OUT servable from a LLaVA-1.5 checkpoint; its weights are linked, not copied.

    Without --thresholds or --images nothing is merged; without --fastv-ratio nothing is dropped. Where
    --tokens, --fastv-ratio or the file have names, these become levels, among which a request may choose.
    """
    from vllm_hybrid.tools.level_options import parse_ratios, parse_tokens
    from vllm_hybrid.tools.prepare import prepare as prepare_checkpoint

    wanted, ratios = parse_tokens(tokens or ()), parse_ratios(fastv_ratio or ())
    with _progress() as progress:
        hybrid = prepare_checkpoint(
            checkpoint,
            out,
            thresholds=thresholds,
            level=level,
            images=images,
            tokens=wanted,
            fastv_layer=fastv_layer,
            fastv_ratio=ratios,
            assistant_header=assistant_header,
            force=force,
            progress=progress,
            skip_unreadable=skip_unreadable,
        )
    print(f"{out}: {hybrid.in_words()}; serve it with")
    print(f"  vllm serve {out}")


@app.command()
def calibrate(
    checkpoint: Checkpoint,
    images: Annotated[
        Path, typer.Option(help="Folder of pictures that resemble the later ones.", show_default=False)
    ],
    tokens: Tokens,
    fastv_ratio: Ratio = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write; printed if left out.")] = None,
    schedule: Annotated[
        str, typer.Option(help="Which layers merge more: constant (all alike) or reverse-linear (late ones).")
    ] = "constant",
    batch_size: Annotated[int, typer.Option(help="Pictures that share a merging budget.")] = 16,
    seed: Annotated[int, typer.Option(help="Deals the pictures out to batches.")] = 0,
    skip_unreadable: SkipUnreadable = False,
) -> None:
    """Find merge thresholds that leave a wanted number of live tokens of a picture on average.

    Where --tokens or --fastv-ratio have names, OUT holds levels, for prepare or for hybrid.levels.

    With --out, a run that was cut off goes on where it was, also with pictures added or taken away: what it
    found lies in OUT.partial.
    """
    import json

    from vllm_hybrid.tools.level_options import parse_ratios, parse_tokens, section_of
    from vllm_hybrid.tools.prepare import calibrate_checkpoint
    from vllm_hybrid.tools.thresholds import write_thresholds

    if out is not None and not out.absolute().parent.is_dir():
        raise ValueError(f"{out.absolute().parent} is no folder; make it, or give another --out")
    wanted, ratios = parse_tokens(tokens or ()) or {}, parse_ratios(fastv_ratio or ())
    journal = None if out is None else out.with_name(out.name + ".partial")
    with _progress() as progress:
        calibration = calibrate_checkpoint(
            checkpoint,
            images,
            wanted,
            batch_size,
            seed,
            progress,
            schedule,
            journal,
            skip_unreadable,
            fastv_ratio=ratios,
        )
    levels = calibration.levels
    if out is None:
        section = section_of(levels)
        print(json.dumps(section["thresholds"] if section.keys() == {"thresholds"} else section))
        return
    write_thresholds(out, levels, calibration.tokens, calibration.pictures)
    for name, setting in levels.items():
        parts = []
        if name in calibration.tokens:
            count = len(setting["thresholds"])
            parts.append(f"{count} thresholds for {calibration.tokens[name]} tokens on average")
        if "fastv_ratio" in setting:
            parts.append(f"FastV {setting['fastv_ratio']:g}")
        print(f"{out}{f', level {name}' if name else ''}: {', '.join(parts)}")


@app.command()
def show(
    checkpoint: Checkpoint,
    image: Annotated[Path, typer.Argument(help="Picture file.", show_default=False)],
    question: Annotated[str, typer.Option(help="What to ask about it.")] = "What is in this picture?",
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("show.png"),
    level: Annotated[str | None, typer.Option(help="The level to show; the default one if left out.")] = None,
    tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    dtype: Annotated[str, typer.Option(help="Number format, as for vllm serve.")] = "auto",
) -> None:
    """Draw what a level merges and drops of a picture for a question, with its answer and the full level's.

    Any level of the checkpoint's may be named; one engine answers at both.
    """
    from vllm_hybrid.tools.pictures import load_rgb
    from vllm_hybrid.tools.show import show as draw_sheet

    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out.absolute().parent} is no folder; make it, or give another --out")
    draw_sheet(checkpoint, load_rgb(image), question, level, tokens, dtype).save(out, "PNG")
    print(f"{out}: the picture, its live tokens, those kept for the question, and both answers")


app.command("eval")(evaluate)
app.command()(doctor)


if __name__ == "__main__":
    main()
