"""`sslvit report`: OUT/report.html, one page that tells how a run went; also while the run is going.

Reads the folder, makes pictures with its encoder and images, writes the page. It takes no lock and writes nothing else.
"""

from __future__ import annotations

from pathlib import Path

from sslvit.pages.pictures import make_pictures
from sslvit.pages.report_page import asked_images, asked_questions, render
from sslvit.pages.run_record import read_run
from sslvit.run_folder import write_atomically


def report(output_dir: str | Path) -> Path:
    """(Re)build the page of a run folder; returns its path.

    Raises InputError when OUT is no run folder. Images that have moved away leave a sentence in the page.
    """
    record = read_run(output_dir)
    questions = asked_questions(record.predictions)
    pictures = make_pictures(record, asked_images(questions))
    page = record.path / "report.html"
    write_atomically(page, render(record, pictures, questions))
    for sentence in pictures.missing.values():
        print(f"report: {sentence}")
    print(f"{page}: {page.stat().st_size / 1e6:.1f} MB; open it in a browser")
    return page
