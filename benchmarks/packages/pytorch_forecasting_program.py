"""A temporal fusion transformer: fit with early stopping, load the best, predict, validate, resume."""

import lightning.pytorch as pl
import numpy as np
import pandas as pd
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data import GroupNormalizer
from pytorch_forecasting.metrics import QuantileLoss
from reporting import QUIET, report, seed

seed()
table = pd.DataFrame(
    {
        "series": str(series),
        "time": time,
        "value": float(np.sin(time / 5 + series) + 2 + 0.1 * np.random.randn()),
    }
    for series in range(6)
    for time in range(40)
)
training = TimeSeriesDataSet(
    table[table.time < 32],
    time_idx="time",
    target="value",
    group_ids=["series"],
    max_encoder_length=12,
    max_prediction_length=4,
    time_varying_unknown_reals=["value"],
    static_categoricals=["series"],
    target_normalizer=GroupNormalizer(groups=["series"]),
)
validation = TimeSeriesDataSet.from_dataset(
    training, table, predict=True, stop_randomization=True
)
train_loader = training.to_dataloader(train=False, batch_size=16, num_workers=0)
loader = validation.to_dataloader(train=False, batch_size=16, num_workers=0)
seed()
model = TemporalFusionTransformer.from_dataset(
    training,
    learning_rate=0.01,
    hidden_size=8,
    attention_head_size=1,
    dropout=0.0,
    hidden_continuous_size=4,
    loss=QuantileLoss(),
    log_interval=-1,
    reduce_on_plateau_patience=2,
)
callbacks = [pl.callbacks.EarlyStopping("val_loss"), pl.callbacks.LearningRateMonitor()]
trainer = pl.Trainer(
    max_epochs=2,
    gradient_clip_val=0.1,
    callbacks=callbacks,
    num_sanity_val_steps=0,
    **QUIET,
)
trainer.fit(model, train_loader, loader)
report("fit", trainer.callback_metrics["val_loss"])
path = trainer.checkpoint_callback.best_model_path
best = TemporalFusionTransformer.load_from_checkpoint(path, weights_only=False)
report("load", sum(p.double().sum() for p in best.parameters()))
quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
report("predict", best.predict(loader, trainer_kwargs=quiet))
report("validate", trainer.validate(model, loader, verbose=False)[0]["val_loss"])
trainer = pl.Trainer(
    max_epochs=3, gradient_clip_val=0.1, num_sanity_val_steps=0, **QUIET
)
trainer.fit(model, train_loader, loader, ckpt_path=path, weights_only=False)
report("resume", trainer.callback_metrics["val_loss"], trainer.current_epoch)
