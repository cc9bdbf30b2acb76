"""What a run leaves for its readers: report.html, the model card, and a repository on the Hugging Face Hub."""

import logging
from pathlib import Path

from rm.config.files import write_text


def write_report(output_dir: Path) -> None:
    """Write report.html of a run; an error is logged with its traceback, since it must not end the run."""
    from rm.report.page import report_html  # imports matplotlib

    try:
        write_text(output_dir / "report.html", report_html([output_dir]), errors="backslashreplace")
    except Exception:
        again = f"python -m rm.report {output_dir}"
        logging.getLogger(__name__).exception(f"report.html is not written; to try again: {again}")
