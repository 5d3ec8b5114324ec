"""Forecasting models: fit, predict, the best checkpoint, go on, save and load."""

import numpy as np
from darts import TimeSeries
from darts.models import NBEATSModel, RNNModel
from reporting import QUIET, report, seed

seed()
series = TimeSeries.from_values(np.sin(np.arange(120) / 6).astype(np.float32))
train, rest = series[:90], series[70:]
options = {"pl_trainer_kwargs": QUIET, "random_state": 0, "input_chunk_length": 12}
model = NBEATSModel(
    output_chunk_length=4,
    num_stacks=2,
    num_blocks=1,
    layer_widths=16,
    n_epochs=20,
    batch_size=16,
    save_checkpoints=True,
    model_name="nbeats",
    force_reset=True,
    work_dir="models",
    **options,
)
model.fit(train, val_series=rest)
report("fit", model.trainer.callback_metrics["val_loss"], drawn=True)
report("predict", model.predict(8).values(), drawn=True)
best = NBEATSModel.load_from_checkpoint(
    "nbeats", work_dir="models", best=True, trusted=True
)
report("load the best", best.predict(8, series=train).values(), drawn=True)
model.fit(train, val_series=rest, epochs=30)
report("go on", model.epochs_trained)
model.save("model.pt")
again = NBEATSModel.load("model.pt", trusted=True)
report("save, load", again.predict(8).values() - model.predict(8).values())
recurrent = RNNModel(
    model="LSTM", training_length=16, hidden_dim=8, n_epochs=20, **options
)
recurrent.fit(train)
report("recurrent", recurrent.predict(8).values(), drawn=True)
