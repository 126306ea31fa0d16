"""OHIF in a headless Chromium, as a reader uses it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, expect, sync_playwright

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

    def run(self, **options: bool) -> None:
        """Run the model with three members, and with the options that are on or off."""
        self.page.get_by_text("Options / Configurations").click()
        for option, on in options.items():
            self.page.locator(f"#infermedsegdiff{option}").set_checked(on)
        self.page.locator("#infermedsegdiffnum_members").fill("3")
        self.page.get_by_role("button", name="Confirm", exact=True).click()
        self.page.get_by_title("Run Segmentation", exact=True).click()
        self.page.get_by_text("Running Segmentation - Successful").first.wait_for()

    def update_model(self, epochs: int) -> None:
        """Start a training."""
        self.page.get_by_text("Options / Configurations").click()
        self.page.locator("select:has(option[value=train])").first.select_option("train")
        self.page.locator("#trainmedsegdiffmax_epochs").fill(str(epochs))
        self.page.get_by_role("button", name="Confirm", exact=True).click()
        with self.page.expect_response(re.compile("/train/")) as started:
            self._active_learning().get_by_role("button", name="Update Model").click()
        assert started.value.ok, started.value.text()

    def next_sample(self, strategy: str) -> str:
        """Ask what to label next; the study that is offered."""
        panel = self._active_learning()
        panel.get_by_role("combobox").select_option(strategy)
        panel.get_by_role("button", name="Next Sample").click()
        row = self.page.get_by_role("row").filter(has_text="Study Instance UID")
        offered = row.get_by_role("cell").last.inner_text()
        self.page.get_by_role("button", name="OK", exact=True).click()
        return offered.strip()

    def _active_learning(self) -> Locator:
        """Its part of the panel, unfolded."""
        part = self.page.locator(".tab").filter(has_text="Active Learning")
        if not part.get_by_role("button", name="Next Sample").is_visible():
            part.get_by_text("Active Learning", exact=True).click()
        return part

    def load_segmentation(self, name: str) -> list[str]:
        """Load a DICOM-SEG of the open study whose name matches; names of its segments."""
        self.page.get_by_text(re.compile(name)).first.dblclick()
        self.page.get_by_role("button", name="Yes", exact=True).click()
        expect(self.page.get_by_text("anterior", exact=True)).to_be_visible()
        return self.page.locator("[data-cy=data-row] span.text-base").all_inner_texts()

    def export_segmentation(self, name: str) -> None:
        """Store the loaded segmentation in the archive, as a series of that name."""
        menus = self.page.locator(
            "xpath=//button[@aria-haspopup='menu'][following::button[contains(., 'Add Segment')]]"
        )
        menus.last.click()
        self.page.get_by_role("menuitem", name="Export & Download").click()
        self.page.get_by_role("menuitem", name="Export DICOM SEG").click()
        self.page.get_by_text("Enter the report name").wait_for()
        self.page.locator("input[type=text]").last.fill(name)
        with self.page.expect_response(re.compile("/studies$")) as stored:
            self.page.get_by_role("button", name="Save", exact=True).click()
        assert stored.value.ok, stored.value.text()

    def show_series(self, name: str) -> None:
        """Show a series in the open study."""
        self.page.get_by_text(name).first.dblclick()
        self.page.wait_for_timeout(5_000)

    def scroll_to(self, instance: int) -> None:
        """Scroll the first viewport to the slice of that instance number, in whichever direction it lies.

        The viewer does jump to a segment that is chosen, but only where its middle lies in a slice to the last digit.
        """
        self.page.mouse.move(500, 500)
        shown = self.page.get_by_text(re.compile(r"^I:\s*\d+ \(\d+/\d+\)")).first
        end = time.monotonic() + PATIENCE / 1000
        while (number := int(re.findall(r"\d+", shown.inner_text())[0])) != instance:
            assert time.monotonic() < end, f"no slice {instance}"
            self.page.mouse.wheel(0, 100 if number < instance else -100)
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
