"""`refkl report`: one HTML page, or one picture, of one or more runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from refkl.cli.report.page import write_page
from refkl.cli.report.picture import draw_report

__all__ = ["draw_report", "report_command", "write_page"]


def report_command(arguments: list[str]) -> int:
    """Parse and run `refkl report RUN [RUN …] [--png] [--output FILE]`.

    Raises:
        ValueError: no run folder, a damaged one, or an output that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="refkl report", allow_abbrev=False, description="One HTML page of runs, which loads no other file."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; report.html is written to the first one")
    parser.add_argument("--output", type=Path, help="write this file instead, .html or .png")
    parser.add_argument("--png", action="store_true", help="write a picture of reward and KL by step: report.png")
    options = parser.parse_args(arguments)
    output: Path | None = options.output
    if output is not None:
        wanted = (".png",) if options.png else (".html", ".htm", ".png")
        if output.suffix.lower() not in wanted:
            raise ValueError(f"--output {output}: its name must end in {' or '.join(wanted)}.")
        if not output.absolute().parent.is_dir():
            raise ValueError(f"--output {output}: there is no folder {output.absolute().parent}.")
    picture = options.png or (output is not None and output.suffix.lower() == ".png")
    print((draw_report if picture else write_page)(*options.runs, output=output))
    return 0
