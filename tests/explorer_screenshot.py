"""Take the picture of the explorer that README.md shows: explorer/screenshot.png, from the page as it was last built.

    python explorer/build.py && python tests/explorer_screenshot.py

Needs what the page's tests need: Playwright (in tests/requirements.txt) and an installed Chromium or Chrome.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

FOLDER = Path(__file__).parent.parent / "explorer"
PAGE, PICTURE = FOLDER / "explorer.html", FOLDER / "screenshot.png"
ADDRESS = "model=encoder_decoder&number=90210&view=attention"


def main():
    browser_path = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
    if browser_path is None or not PAGE.exists():
        sys.exit(f"Needs an installed Chromium or Chrome, and {PAGE}: python explorer/build.py writes it.")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1120, "height": 700}, device_scale_factor=1.25)
        page.goto(f"{PAGE.as_uri()}#{ADDRESS}")
        page.wait_for_selector("#map .cell")
        page.screenshot(path=PICTURE, full_page=True)
        browser.close()
    print(f"{PICTURE}  ({PICTURE.stat().st_size // 1000} KB)")


if __name__ == "__main__":
    main()
