"""OHIF in a headless Chromium, as a reader uses it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect, sync_playwright

from .orthanc import chromium

# drawn by the processor, where there is no graphics card; Chromium's sandbox refuses root, as whom CI runs
ARGUMENTS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
PATIENCE = 180_000  # milliseconds: everything is drawn without a graphics card
TURN = 3_000  # milliseconds between two looks


class Reader:
    """A reader in front of the viewer.

    Args:
        page: of the browser.
        url: of the server.
        pictures: folder for screenshots.
    """

    def __init__(self, page: Page, url: str, pictures: Path) -> None:
        self.page, self.url, self.pictures = page, url, pictures
        self.foreign: list[str] = []  # what came from elsewhere
        self.broken: list[str] = []
        self.greeted = False
        page.on("requestfinished", lambda request: self._note(request.url))
        page.on("pageerror", lambda error: self.broken.append(str(error)))

    def _note(self, url: str) -> None:
        if not url.startswith((self.url, "data:", "blob:")):
            self.foreign.append(url)

    def picture(self, name: str) -> bytes:
        """Keep what is on the screen, and return its three planes alone."""
        self.page.screenshot(path=self.pictures / f"{name}.png")
        return self.page.screenshot(clip={"x": 285, "y": 50, "width": 1030, "height": 900})

    def picture_when(self, name: str, shows: Callable[[bytes], bool], act: Callable[[], None] | None = None) -> bytes:
        """The picture as soon as it shows something, or the last one when patience ends.

        Nothing in the page tells when the planes are drawn, and a click before that is lost: ``act`` is repeated.
        """
        end = time.monotonic() + PATIENCE / 1000
        while True:
            if act is not None:
                act()
            self.page.wait_for_timeout(TURN)
            picture = self.picture(name)
            if shows(picture) or time.monotonic() > end:
                return picture

    def list_studies(self) -> list[str]:
        """Names of the patients in the list."""
        self.page.goto(f"{self.url}/ohif/")
        self.page.get_by_text("MNI152").first.wait_for()
        self.picture("studies")
        names = set(self.page.get_by_text("MNI152-").all_inner_texts())  # a tooltip repeats each
        return sorted(name for name in names if name.startswith("MNI"))

    def open(self, study: str, mode: str) -> None:
        """Open a study; the disclaimer is there the first time."""
        self.page.goto(f"{self.url}/ohif/{mode}?StudyInstanceUIDs={study}")
        if not self.greeted:
            self.page.get_by_text("Confirm and Hide").click()
            self.greeted = True
        self.page.wait_for_timeout(15_000)  # until all slices are drawn, which nothing in the page tells

    def connect(self) -> None:
        """Connect the panel to the server."""
        self.page.locator("#monailabelServerURL").fill(f"{self.url}/")
        self.page.locator("button.actionButton").first.click()
        self.page.get_by_text("Options / Configurations").wait_for()
        self.page.wait_for_timeout(3_000)

    def run(self, uncertainty: bool, uncertainty_series: bool = False) -> None:
        """Run the model, with the segments of uncertainty and the series if wanted."""
        self.page.get_by_text("Options / Configurations").click()
        self.page.locator("#infermedsegdiffuncertainty").set_checked(uncertainty)
        self.page.locator("#infermedsegdiffuncertainty_series").set_checked(uncertainty_series)
        self.page.locator("#infermedsegdiffnum_members").fill("3")
        self.page.get_by_role("button", name="Confirm", exact=True).click()
        self.page.get_by_title("Run Segmentation", exact=True).click()
        self.page.get_by_text("Running Segmentation - Successful").first.wait_for()

    def load_segmentation(self, name: str) -> list[str]:
        """Load a DICOM-SEG of the open study whose name matches; names of its segments."""
        self.page.get_by_text(re.compile(name)).first.dblclick()
        self.page.get_by_role("button", name="Yes", exact=True).click()
        expect(self.page.get_by_text("anterior", exact=True)).to_be_visible()
        return self.page.locator("[data-cy=data-row] span.text-base").all_inner_texts()

    def show_series(self, name: str) -> None:
        """Show a series in the open study."""
        self.page.get_by_text(name).first.dblclick()
        self.page.wait_for_timeout(5_000)

    def scroll_to(self, instance: int) -> None:
        """Scroll the first viewport from its first slice to the one of that instance number.

        The viewer does jump to a segment that is chosen, but only where its middle lies in a slice to the last digit.
        """
        self.page.mouse.move(500, 500)
        shown = self.page.get_by_text(re.compile(rf"^I:\s*{instance} \("))
        end = time.monotonic() + PATIENCE / 1000
        while not shown.count():
            assert time.monotonic() < end, f"no slice {instance}"
            self.page.mouse.wheel(0, 100)
            self.page.wait_for_timeout(500)

    def hide(self, segment: str) -> None:
        """Close the eye beside a segment, if it is open."""
        row = self.page.locator("[data-cy=data-row]").filter(has_text=segment)
        row.hover()
        if row.get_by_role("button", name="Hide").count():
            row.get_by_role("button", name="Hide").click()


@contextmanager
def reader(url: str, pictures: Path) -> Iterator[Reader]:
    """Open the browser."""
    with sync_playwright() as playwright:
        options: dict[str, Any] = {"executable_path": chromium(), "args": ARGUMENTS}
        browser = playwright.chromium.launch(**options)
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(PATIENCE)
        yield Reader(page, url, pictures)
        browser.close()
