"""One of several processes that JAX connects; each trains on its own, and none is told anything but by JAX.

    python preempted_run.py HOST:PORT PROCESSES INDEX

It prints `training`, and in the end after how many batches it was asked to end.
"""

from __future__ import annotations

import sys
import time

import jax
from nets import Scalar, quiet, targets

import nnx_fit as nf


class Tells(nf.Callback):
    """Gives whoever ends the process the time for it, and tells of its end."""

    def on_train_start(self, trainer, module):
        print("training", flush=True)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        time.sleep(0.05)

    def on_exception(self, trainer, module, exception):
        print("ended after", trainer.total_batches, trainer.interrupted, flush=True)


if __name__ == "__main__":
    address, processes, index = sys.argv[1:]
    jax.distributed.initialize(address, int(processes), int(index))
    quiet(max_epochs=1000, callbacks=Tells()).fit(Scalar(), targets(1, 2, 3), targets(4))
