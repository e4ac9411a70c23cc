"""What a run shows while it trains: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time

from tqdm import tqdm

from cnn_ext.mnist.tally import Tally
from cnn_ext.mnist.train import Recipe

BAR = "{desc} {percentage:3.0f}%|{bar}|"
LINE_SECONDS = 10.0
REFRESH_SECONDS = 0.25  # showing numbers waits for the device, so not at every batch


def clock(seconds: float) -> str:
    """m:ss, or h:mm:ss from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """Loss, accuracy, images per second and the time left until the last epoch ends, on stderr."""

    def __init__(self, recipe: Recipe, images: int):
        self.recipe = recipe
        self.images = images  # in an epoch
        self.bar = None
        self.epoch_started = self.shown = self.run_started = time.perf_counter()

    def on_batch(self, epoch: int, tally: Tally) -> None:
        now = time.perf_counter()
        if tally.images <= self.recipe.batch_size:
            self._begin(epoch)
        last = tally.images == self.images
        if sys.stderr.isatty():
            if last or now - self.shown >= REFRESH_SECONDS:
                self._update_bar(tally, epoch)
        elif last or now - self.shown >= LINE_SECONDS:
            self._print_line(tally, epoch)

    def close(self) -> None:
        """Takes the bar away, so that the line of the epoch stands in its place."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _begin(self, epoch: int) -> None:
        self.epoch_started = time.perf_counter()
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=self.images,
                desc=f"Epoch {epoch}/{self.recipe.epochs}",
                leave=False,
                dynamic_ncols=True,
                bar_format=BAR,
            )

    def _figures(self, tally: Tally, epoch: int) -> str:
        self.shown = time.perf_counter()
        loss, accuracy = tally.means()
        rate = tally.images / (self.shown - self.epoch_started)
        done = (epoch - 1) * self.images + tally.images
        left = (self.recipe.epochs * self.images - done) * (self.shown - self.run_started) / done
        return f"loss {loss:.4f}  accuracy {accuracy:.4f}  {rate:,.0f} images/s  {clock(left)} left"

    def _update_bar(self, tally: Tally, epoch: int) -> None:
        self.bar.bar_format = f"{BAR} {self._figures(tally, epoch)}"
        self.bar.n = tally.images
        self.bar.refresh()

    def _print_line(self, tally: Tally, epoch: int) -> None:
        where = f"Epoch {epoch}/{self.recipe.epochs}  {tally.images}/{self.images} images"
        print(f"{where}  {self._figures(tally, epoch)}", file=sys.stderr, flush=True)
