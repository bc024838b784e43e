"""`python tools/show_picture.py`: docs/show.png and show-dark.png, the page of `endoreward show`. Needs Chromium."""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from typer.testing import CliRunner

from endoreward_fast.command.cli import app

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "harness"))
from browser import Browser  # noqa: E402

ROWS = (
    {"prompt": "What is the capital of France?", "completions": ["Paris", "Rome", "Paris is a city in the sky."]},
    {"prompt": "Put 7 0 2 3 in order.", "chosen": "0 2 3 7", "rejected": "7 3 2 0"},
)
WIDTH = 700
SHOWN = "[...document.querySelectorAll('article')][2].querySelectorAll('.t')[3]"  # whose tooltip is open
HEIGHT = "Math.ceil(document.documentElement.getBoundingClientRect().height)"


def main() -> None:
    with TemporaryDirectory() as folder:
        rows, page = Path(folder, "rows.jsonl"), Path(folder, "page.html")
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        done = CliRunner().invoke(app, ["show", str(rows), "--model", "pocket", "--html", str(page)])
        if done.exit_code:
            raise SystemExit(done.stderr)
        browser = Browser(Path(folder, "browser"))
        for name, dark in (("show.png", False), ("show-dark.png", True)):
            browser.open(page, width=WIDTH, dark=dark)
            height = browser.run(HEIGHT)
            browser.send(
                "Emulation.setDeviceMetricsOverride", width=WIDTH, height=height, deviceScaleFactor=2, mobile=False
            )
            browser.run(f"{SHOWN}.focus()")
            browser.picture(ROOT / "docs" / name)
        browser.close()


if __name__ == "__main__":
    main()
