"""The data of a fit: loaders that are asked for again, and what follows from their lengths."""

import dataclasses
import logging

import nets
import numpy as np
import pytest

import nnx_fit as nf


class Growing(nf.DataModule):
    """Epoch e has e + 1 batches, each of them another target; notes when it is asked for what."""

    def __init__(self, shuffle=False):
        self.asked = {"train": [], "val": []}
        self.shuffle = shuffle

    def _loader(self, kind):
        epoch = self.trainer.current_epoch
        self.asked[kind].append(epoch)
        return nf.ArrayLoader({"target": np.arange(4.0 * epoch + 4.0)}, 4, shuffle=self.shuffle)

    def train_dataloader(self):
        return self._loader("train")

    def val_dataloader(self):
        return self._loader("val")


class Noting(nf.Callback):
    """Notes the epoch of each batch, and the targets of it."""

    def __init__(self):
        self.batches = []
        self.validations = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches.append((trainer.current_epoch, batch_idx, batch["target"].tolist()))

    def on_validation_end(self, trainer, module):
        self.validations.append((trainer.current_epoch, trainer.callback_metrics["val/target"]))


# Lightning 2.6.6, a LightningDataModule with prints, reload_dataloaders_every_n_epochs=n, max_epochs=5:
@pytest.mark.parametrize(("every", "asked"), [(0, [0]), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])])
def test_loaders_are_asked_for_again_in_the_epochs_that_lightning_asks_in(every, asked):
    data, noting = Growing(), Noting()
    trainer = nets.quiet(max_epochs=5, jit=False, reload_dataloaders_every_n_epochs=every, callbacks=noting)
    trainer.fit(nets.Scalar(), datamodule=data)
    assert data.asked == {"train": asked, "val": asked}
    assert data.trainer is trainer
    in_force = [max(at for at in asked if at <= epoch) for epoch in range(5)]
    assert trainer.global_step == sum(epoch + 1 for epoch in in_force)
    assert [(epoch, batch) for epoch, batch, _ in noting.batches] == [
        (epoch, batch) for epoch, loaded in enumerate(in_force) for batch in range(loaded + 1)
    ]
    assert noting.validations == [(epoch, (4 * at + 3) / 2) for epoch, at in enumerate(in_force)]


def test_sanity_check_counts_as_the_first_use_of_the_validation_loader():
    data = Growing()
    nets.quiet(max_epochs=3, jit=False, reload_dataloaders_every_n_epochs=2, num_sanity_val_steps=1).fit(
        nets.Scalar(), datamodule=data
    )
    assert data.asked["val"] == [0, 2]


def test_the_modules_own_loaders_see_the_module_as_it_is_trained():
    class Own(nets.Scalar):
        def __init__(self):
            super().__init__()
            self.seen = ()

        def train_dataloader(self):
            self.seen = (*self.seen, (self.current_epoch, float(self.w[...])))
            return nets.targets(0.0)

    module = Own()
    nets.quiet(max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(module)
    # Each step takes a tenth of the weight away.
    assert [epoch for epoch, _ in module.seen] == [0, 1, 2]
    assert [weight for _, weight in module.seen] == pytest.approx([1.0, 0.9, 0.81])


@pytest.mark.parametrize("step", [2, 3, 4, 6, 8, 9, 10, 13])
def test_a_run_cut_off_anywhere_goes_on_with_the_same_batches(tmp_path, step):
    class Cut(nf.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "cut")

    def fit(callbacks, **options):
        data, module = Growing(shuffle=True), nets.Scalar()
        trainer = nets.quiet(max_epochs=6, jit=False, reload_dataloaders_every_n_epochs=2, callbacks=callbacks)
        trainer.fit(module, datamodule=data, **options)
        return data, float(module.w[...])

    whole = Noting()
    _, weight = fit([whole, Cut()])
    rest = Noting()
    data, continued = fit([rest], ckpt_path=tmp_path / "cut")
    assert rest.batches == whole.batches[step:]
    assert continued == weight
    # Asked as of the epoch in which the loader in force was asked for before.
    first = whole.batches[step - 1][0]
    assert data.asked["train"][0] == first - first % 2


def test_a_run_cut_off_between_epochs_takes_the_loader_of_the_next_one(tmp_path):
    class Cut(nf.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 4:
                trainer.save_checkpoint(tmp_path / "cut")

    whole, rest = Noting(), Noting()
    for callbacks, path in (([whole, Cut()], None), ([rest], tmp_path / "cut")):
        trainer = nets.quiet(max_epochs=6, jit=False, reload_dataloaders_every_n_epochs=2, callbacks=callbacks)
        trainer.fit(nets.Scalar(), datamodule=Growing(shuffle=True), ckpt_path=path)
    assert rest.batches == [batch for batch in whole.batches if batch[0] >= 4]


def test_state_of_the_data_module_is_there_before_its_loaders_are_asked_for(tmp_path):
    class Counting(nf.DataModule):
        offset = 0.0

        def train_dataloader(self):
            return nets.targets(self.offset)

        def state_dict(self):
            return {"offset": 5.0}

        def load_state_dict(self, state):
            self.offset = state["offset"]

    trainer = nets.quiet(max_epochs=1, jit=False)
    trainer.fit(nets.Scalar(), datamodule=Counting())
    trainer.save_checkpoint(tmp_path / "saved")
    noting = Noting()
    nets.quiet(max_epochs=2, jit=False, callbacks=noting).fit(
        nets.Scalar(), datamodule=Counting(), ckpt_path=tmp_path / "saved"
    )
    assert noting.batches == [(1, 0, [5.0, 5.0])]


def test_loaders_that_were_passed_stay_and_the_log_says_so(caplog):
    with caplog.at_level(logging.WARNING, "nnx_fit"):
        trainer = nets.quiet(max_epochs=3, jit=False, reload_dataloaders_every_n_epochs=1)
        trainer.fit(nets.Scalar(), nets.targets(1, 2), nets.targets(1))
    assert trainer.global_step == 6
    assert "reload_dataloaders_every_n_epochs=1" in caplog.text and "pass a DataModule" in caplog.text


def test_a_data_module_that_cannot_be_changed_is_taken_as_it_is():
    @dataclasses.dataclass(frozen=True)
    class Frozen(nf.DataModule):
        target: float = 1.0

        def train_dataloader(self):
            return nets.targets(self.target)

    trainer = nets.quiet(max_epochs=2, jit=False, reload_dataloaders_every_n_epochs=1)
    trainer.fit(nets.Scalar(), datamodule=Frozen())
    assert trainer.global_step == 2


def test_batches_to_overfit_stay():
    data = Growing()
    trainer = nets.quiet(max_epochs=3, jit=False, reload_dataloaders_every_n_epochs=1, overfit_batches=1)
    trainer.fit(nets.Scalar(), datamodule=data)
    assert data.asked == {"train": [0], "val": [0]}


def test_a_fraction_of_an_epoch_is_that_of_the_new_loader():
    class Lengths(nf.DataModule):
        def train_dataloader(self):
            return nets.targets(*[1.0] * (8 if self.trainer.current_epoch else 2))

        def val_dataloader(self):
            return nets.targets(1.0)

    class Steps(nf.Callback):
        def __init__(self):
            self.steps = []

        def on_validation_end(self, trainer, module):
            self.steps.append(trainer.global_step)

    steps = Steps()
    trainer = nets.quiet(
        max_epochs=2, jit=False, reload_dataloaders_every_n_epochs=1, val_check_interval=0.5, callbacks=steps
    )
    trainer.fit(nets.Scalar(), datamodule=Lengths())
    assert steps.steps == [1, 2, 6, 10]
    assert trainer.num_training_batches == 8


def test_an_interval_that_an_epoch_of_unknown_length_never_reaches_is_said(caplog):
    def batches():
        return iter(nets.targets(1, 2, 3))

    def fit(**options):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "nnx_fit"):
            history = nets.quiet(jit=False, **options).fit(nets.Scalar(), batches, nets.targets(1))
        return [step for step, _ in history.get("val/target", [])], caplog.text

    steps, said = fit(max_epochs=3, val_check_interval=4)
    assert steps == [] and said.count("val_check_interval=4") == 1
    assert "an epoch has only 3 training batches" in said and "check_val_every_n_epoch=None" in said
    assert fit(max_epochs=2, val_check_interval=3) == ([3, 6], "")
    assert fit(max_epochs=3, val_check_interval=4, check_val_every_n_epoch=None) == ([4, 8], "")
    # Cut off in the first epoch: nothing is known of its length.
    assert fit(max_steps=2, val_check_interval=4) == ([2], "")
