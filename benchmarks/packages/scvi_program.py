"""A variational autoencoder of cells: fit with early stopping, latents, save and load, one model from another."""

import numpy as np
import scvi
from reporting import report, seed

seed()
scvi.settings.seed = 0
cells = scvi.data.synthetic_iid(n_genes=30, batch_size=60)
scvi.model.SCVI.setup_anndata(cells, batch_key="batch", labels_key="labels")
model = scvi.model.SCVI(cells, n_hidden=16, n_latent=4)
quiet = {"accelerator": "cpu", "enable_progress_bar": False}
model.train(
    max_epochs=20,
    check_val_every_n_epoch=1,
    early_stopping=True,
    train_size=0.8,
    batch_size=32,
    **quiet,
)
report("fit", float(model.history["elbo_validation"].iloc[-1, 0]), drawn=True)
latent = np.asarray(model.get_latent_representation(), dtype=float)
report("latent", latent.std(), drawn=True)
model.save("saved", overwrite=True)
loaded = scvi.model.SCVI.load("saved", adata=cells)
report("load", np.abs(loaded.get_latent_representation() - latent).max())
labelled = scvi.model.SCANVI.from_scvi_model(model, unlabeled_category="label_0")
labelled.train(max_epochs=3, **quiet)
report("fit again", float(labelled.history["elbo_train"].iloc[-1, 0]), drawn=True)
