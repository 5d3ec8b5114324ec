"""Two of its estimators, which draw their batches at random: train and predict."""

import numpy as np
import pandas as pd
from gluonts.dataset.pandas import PandasDataset
from gluonts.torch import DeepAREstimator, SimpleFeedForwardEstimator
from reporting import QUIET, report, seed

seed()
days = pd.date_range("2020-01-01", periods=120, freq="D")


def series(shift: int) -> pd.DataFrame:
    values = np.sin(np.arange(120) / 7 + shift) + 0.1 * np.random.randn(120)
    return pd.DataFrame({"target": values.astype("float32")}, index=days)


tables = {str(shift): series(shift) for shift in range(3)}
data = PandasDataset(tables, target="target", freq="D", dtype=np.float32)
estimators = {
    "feedforward": (SimpleFeedForwardEstimator, {}),
    "deepar": (DeepAREstimator, {"freq": "D", "num_layers": 1, "hidden_size": 8}),
}
for name, (kind, options) in estimators.items():
    seed()
    estimator = kind(
        prediction_length=7,
        context_length=14,
        num_batches_per_epoch=30,
        batch_size=16,
        trainer_kwargs={"max_epochs": 3, "logger": False, **QUIET},
        **options,
    )
    trained = estimator.train_model(data, validation_data=data)
    report(f"fit {name}", trained.trainer.callback_metrics["val_loss"], drawn=True)
    seed()
    forecasts = [forecast.mean for forecast in trained.predictor.predict(data)]
    report(f"predict {name}", np.array(forecasts), drawn=True)
