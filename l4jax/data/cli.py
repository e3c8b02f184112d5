"""`l4jax data`: what is in a file, a directory or a mixture, what cannot be read in it, and what the model will see."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4jax.config import PRESETS, Llama4Config, VisionConfig
from l4jax.data.config import DataConfig
from l4jax.settings import build, override, read_settings

if TYPE_CHECKING:
    from rich.console import Console

    from l4jax.data.survey import Survey
    from l4jax.processing.chat import Processor

ROW_TOKENS = 8192  # of a row where no config says it
BAR = 40  # columns of the longest bar
SHOWN_CHARACTERS = 600  # of an example, in the terminal
SHOWN_VALUES = 12  # of a field


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What of a run's config matters here."""

    data: DataConfig
    model: Llama4Config | None = None
    seed: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="PATH", help="JSONL or Parquet file, directory, or the config of a run (YAML)"
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="over the config's: data.row_tokens=4096")
    parser.add_argument(
        "-m", "--model", metavar="PATH", help="whose tokenizer and tiles to count with (default: bytes)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="look at N documents of each source, evenly spread")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures and packed rows")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--skip-malformed", action="store_true", help="count what cannot be read, and end well")
    parser.add_argument(
        "--write", type=Path, metavar="DIR", help="write the documents of PATH as TFDS, pictures inside"
    )


def run(args: argparse.Namespace) -> int:
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit} must be at least 1")
    is_run = args.source.endswith((".yaml", ".yml"))
    settings, processor = open_settings(args, is_run=is_run)
    if args.write:
        return write(args, settings)
    from rich.console import Console
    from rich.progress import Progress

    from l4jax.data.page import write_page
    from l4jax.data.survey import survey

    console = Console(highlight=False)
    bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with tempfile.TemporaryDirectory() as directory, bar:
        task = bar.add_task("reading", total=None)
        found = survey(
            settings.data,
            processor,
            seed=settings.seed,
            directory=Path(directory),
            limit=args.limit,
            advance=lambda: bar.advance(task),
        )
    if args.json:
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        show(console, found, settings.data, processor, is_run=is_run)
    if args.html:
        write_page(args.html, found, settings.data, processor, title=args.source)
        if not args.json:
            console.print(f"\npage: {args.html}")
    return verdict(found, settings.data, is_run=is_run)


def open_settings(args: argparse.Namespace, *, is_run: bool) -> tuple[Settings, "Processor"]:
    """Returns what to look at, and what encodes it."""
    from l4jax.data.streams import make_processor
    from l4jax.processing.chat import Processor
    from l4jax.processing.tokenizer import ByteTokenizer

    if is_run:
        if args.model:
            raise ValueError("a config names its model and tokenizer; leave -m out")
        content = read_settings(args.source, args.settings)
        settings = build(Settings, {key: value for key, value in content.items() if key in ("data", "model", "seed")})
        if args.skip_malformed:
            settings = replace(settings, data=replace(settings.data, skip_malformed=True))
        if settings.model is None:
            raise ValueError(f"missing key model in {args.source}; it says how pictures are cut and words counted")
        return settings, make_processor(settings.data, settings.model)
    model = open_model(args.model) if args.model else None
    vision = model.vision_config if model else VisionConfig()
    content = {
        "data": {
            "sources": {Path(args.source).name: {"path": args.source}},
            "rows": 1,
            "row_tokens": ROW_TOKENS,
            "row_tiles": ROW_TOKENS // vision.tokens_per_tile if vision else 0,
            "long_documents": "drop",
            "skip_malformed": args.skip_malformed,
            "tokenizer": args.model if args.model and Path(args.model).is_dir() else "bytes",
        }
    }
    override(content, args.settings)
    settings = build(Settings, content)
    data = settings.data
    if model and data.tokenizer != "bytes":
        return settings, make_processor(data, model)
    return settings, Processor(ByteTokenizer(), vision, max_tiles=data.max_tiles, max_frames=data.max_frames)


def open_model(path: str) -> Llama4Config:
    """Returns the config of a checkpoint directory or a preset."""
    if Path(path).is_dir():
        from l4jax.checkpoint.opening import open_checkpoint

        return open_checkpoint(path).config
    if path in PRESETS:
        return PRESETS[path]
    raise FileNotFoundError(f"no model {path}: neither a directory nor a preset; presets are {', '.join(PRESETS)}")


def write(args: argparse.Namespace, settings: Settings) -> int:
    """Writes the documents as one TFDS data set."""
    from l4jax.data.schema import Document, DocumentError
    from l4jax.data.sources import open_source
    from l4jax.data.write import write_tfds
    from l4jax.processing.video import spread

    sources = [source for source in settings.data.sources.values() if source.path]
    if len(sources) != 1 or len(settings.data.sources) > 1:
        raise ValueError("--write takes one file or directory of documents; give its path")
    source = open_source(sources[0].path, split=sources[0].split, picture_dir=sources[0].picture_dir)
    skipped = []

    def documents() -> Iterator[Document]:
        for index in spread(len(source), args.limit or len(source)):
            try:
                yield source[index]
            except DocumentError as error:
                if not args.skip_malformed:
                    raise DocumentError(f"{error} (--skip-malformed leaves such documents out)") from None
                skipped.append(str(error))

    directory = write_tfds(documents(), args.write)
    print(f"{directory}: {len(source) - len(skipped) if not args.limit else args.limit - len(skipped):,} documents")
    for line in skipped:
        print(f"left out: {line}", file=sys.stderr)
    return 0


def verdict(found: "Survey", data: DataConfig, *, is_run: bool) -> int:
    """Says what would stop a run; returns the exit code."""
    failed = False
    looked_at = sum(len(source.tokens) + source.malformed.count for source in found.sources)
    if found.malformed and not data.skip_malformed:
        failed = True
        name_problems([source.malformed for source in found.sources])
        print(
            f"error: {found.malformed:,} of {looked_at:,} documents cannot be read; mend them, or leave them out with "
            f"{'data.skip_malformed=true' if is_run else '--skip-malformed'}",
            file=sys.stderr,
        )
    if found.too_long and is_run and data.long_documents != "drop":
        failed = True
        name_problems([source.too_long for source in found.sources])
        print(f"error: {found.too_long:,} of {looked_at:,} documents do not fit into a row", file=sys.stderr)
    return int(failed)


def name_problems(problems: list[Any]) -> None:
    for source in problems:
        for line in source.first:
            print(f"  {line}", file=sys.stderr)
        if source.count > len(source.first):
            print(f"  and {source.count - len(source.first):,} more", file=sys.stderr)


# --- In the terminal ------------------------------------------------------------------------------------------------


def show(console: "Console", found: "Survey", data: DataConfig, processor: "Processor", *, is_run: bool) -> None:
    """Prints counts, histograms and examples."""
    from rich.markup import escape
    from rich.table import Table

    from l4jax.data.survey import FIELDS, histogram, size_line

    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0))
    header, rows = found.table()
    for title in header:
        is_name = title == header[0]
        table.add_column(title, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    for name in FIELDS:
        if set(found.documents_by[name]) - {"(none)"}:
            console.print(f"\n[bold]{name}[/]  [dim]documents, tokens[/]")
            values = found.documents_by[name].most_common(SHOWN_VALUES)
            bars(console, [(value, count, f"{found.tokens_by[name][value]:,}") for value, count in values])
            rest = len(found.documents_by[name]) - SHOWN_VALUES
            if rest > 0:
                console.print(f"  [dim]and {rest:,} more[/]")
    for title, values in (("tokens of a document", found.tokens()), ("tiles of a document", found.tiles())):
        if values.any():
            console.print(
                f"\n[bold]{title}[/]  [dim]mean {values.mean():,.1f}, median {sorted(values)[len(values) // 2]:,}[/]"
            )
            bars(console, [(name, count, "") for name, count in histogram(values)])
    if found.rows:
        room = f"{data.row_tokens:,} tokens" + (f" and {data.row_tiles} tiles" if data.row_tiles else "")
        console.print(f"\n[bold]packed[/] into rows of {room}: {found.fill:.1%} full")
    if found.too_long:
        fate = {"drop": "left out", "split": "not to be split", "error": "the run stops at the first"}
        console.print(f"[bold]too long[/] for a row: {found.too_long:,} ({fate[data.long_documents]})")
    for title, example in found.examples:
        console.print(f"\n[bold]{escape(title)}[/]\n[dim]{size_line(example)}; green is learned[/]")
        console.print(as_text(example, processor))
    if data.tokenizer == "bytes" and not is_run:
        console.print("\n[dim]a token is a byte here; -m DIR counts with the tokenizer of a checkpoint[/]")


def bars(console: "Console", rows: list[tuple[str, int, str]]) -> None:
    """Prints one bar a row: a name, a count, and what stands behind it."""
    from rich.markup import escape

    widest = max((len(name) for name, *_ in rows), default=0)
    most = max((count for _, count, _ in rows), default=1)
    for name, count, more in rows:
        eighths = round(BAR * 8 * count / most)
        bar = "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")
        bar = bar or ("▏" if count else "")
        console.print(f"  {escape(name):>{widest}}  [blue]{bar}[/] {count:,}" + (f"  [dim]{more}[/]" if more else ""))


def as_text(example: Any, processor: "Processor") -> Any:
    """Returns an example as coloured text: control tokens dim, tiles yellow, learned words green."""
    from rich.text import Text

    from l4jax.data.survey import spans

    text = Text()
    for span in spans(example, processor):
        if span.kind == "tile":
            text.append(f"[tile {span.text}]".replace(" ", ":"), "yellow")  # one word, for the sake of line ends
        else:
            style = "green" if span.learned else ("dim" if span.kind == "control" else "")
            text.append(span.text, style)
        if len(text) > SHOWN_CHARACTERS:
            text.truncate(SHOWN_CHARACTERS)
            return text.append(" ...", "dim")
    return text
