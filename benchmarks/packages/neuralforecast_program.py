"""Two of its models: fit, predict, save and load, cross validation."""

import numpy as np
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast.models import MLP, NHITS
from reporting import QUIET, report, seed

seed()
days = pd.date_range("2020-01-01", periods=80, freq="D")
table = pd.DataFrame(
    {"unique_id": str(shift), "ds": day, "y": float(np.sin(n / 5 + shift))}
    for shift in range(4)
    for n, day in enumerate(days)
)
options = {"h": 7, "input_size": 14, "max_steps": 60, "random_seed": 1, "logger": False}
models = [
    MLP(
        hidden_size=16,
        val_check_steps=10,
        early_stop_patience_steps=3,
        **options,
        **QUIET,
    ),
    NHITS(mlp_units=3 * [[16, 16]], **options, **QUIET),
]
forecast = NeuralForecast(models=models, freq="D")
forecast.fit(table, val_size=14)
predicted = forecast.predict()
report("fit, predict", predicted["MLP"], predicted["NHITS"], drawn=True)
forecast.save("saved", overwrite=True, save_dataset=True)
loaded = NeuralForecast.load("saved").predict()
report("load", loaded["MLP"] - predicted["MLP"])
crossed = forecast.cross_validation(table, n_windows=2, step_size=7, val_size=14)
report("cross validation", crossed["NHITS"], drawn=True)
