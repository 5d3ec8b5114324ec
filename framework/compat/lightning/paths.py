"""The paths that Lightning's names are imported by, and the modules here that have them."""

from __future__ import annotations

# The version whose names these are: programs ask for it.
VERSION = "2.6.0"

PACKAGE = __name__.rpartition(".")[0]

# By path below `lightning.pytorch`, the module here. It answers for all paths below it, too.
PYTORCH = {
    "": "",
    "accelerators": ".accelerators",
    "callbacks": ".callbacks",
    "callbacks.early_stopping": ".early_stopping",
    "callbacks.model_checkpoint": ".model_checkpoint",
    "callbacks.progress": ".progress_bars",
    "callbacks.progress.rich_progress": ".rich_bars",
    "callbacks.spike": ".spike",
    "cli": ".cli",
    "core": ".core",
    "core.saving": ".saving",
    "demos": ".demos",
    "loggers": ".loggers",
    "loops": ".loops",
    "plugins": ".plugins",
    "profilers": ".profilers",
    "strategies": ".strategies",
    "trainer": ".trainer",
    "overrides": ".samplers",
    "strategies.launchers": ".internals",
    "trainer.connectors": ".internals",
    "trainer.connectors.accelerator_connector": ".accelerators",
    "trainer.states": ".states",
    "tuner": ".tuner",
    "utilities": ".utilities",
    "utilities._pytree": ".data",
    "utilities.cli": ".cli",
    "utilities.combined_loader": ".combined_loader",
    "utilities.compile": ".compile",
    "utilities.data": ".data",
    "utilities.imports": ".availability",
    "utilities.model_helpers": ".model_helpers",
    "utilities.model_summary": ".model_summary",
    "utilities.parsing": ".parsing",
    "utilities.seed": ".seed",
    "utilities.testing": ".conditions",
    "utilities.types": ".types",
}
# The same below `lightning.fabric`.
FABRIC = {
    "": ".fabric",
    "accelerators": ".accelerators",
    "loggers": ".loggers",
    "plugins": ".plugins",
    "plugins.environments.lightning": ".environments",
    "strategies": ".strategies",
    "strategies.launchers": ".internals",
    "utilities": ".utilities",
    "utilities.data": ".data",
    "utilities.imports": ".availability",
    "utilities.seed": ".seed",
    "utilities.throughput": ".throughput",
    "utilities.logger": ".loggers",
    "utilities.spike": ".spike",
    "utilities.testing": ".conditions",
    "utilities.types": ".types",
}

# All words of such paths, so that a path which Lightning does not have is none here.
WORDS = frozenset(
    """
    _pytree _runif accelerator accelerator_connector accelerators advanced amp apply_func argparse
    async_plugin automatic base call checkpoint_plugin fabric fx_validator launcher litlogger
    multiprocessing signal_connector subprocess_script torch_plugin
    batch_size_finder batch_size_scaling bitsandbytes boring_classes callback callback_connector
    callbacks checkpoint checkpoint_connector checkpoint_io cli closure cloud_io cluster_environment
    collective collectives combined_loader comet compile configuration_validator connector connectors
    consolidate_checkpoint core cpu
    csv_logs cuda data data_connector datamodule ddp deepspeed demos device_dtype_mixin device_parser
    device_stats_monitor distributed double dp early_stopping enums environments evaluation_loop exceptions
    fetchers finetuning fit_loop fsdp gradient_accumulation_scheduler grads half hooks hparams_mixin
    imports init io kubeflow lambda_function launchers layer_sync lightning load logger logger_connector
    loggers loop loops lr_finder lr_monitor lsf lstm manual memory migration mixins mlflow
    mnist_datamodule model_checkpoint model_helpers model_parallel model_registry model_summary
    model_summary_deepspeed module mpi mps neptune on_exception_checkpoint
    optimization optimizer overrides parallel parameter_tying parsing plugins precision prediction_loop
    prediction_writer profiler profilers progress progress_bar pruning pytorch rank_zero registry result
    rich_model_summary rich_progress saving seed servable_module servable_module_validator serve setup
    signature_utils simple single_device single_xla slurm spike
    states stochastic_weight_avg strategies strategy tensorboard testing throughput throughput_monitor timer
    torch_collective torch_io torchelastic tqdm_progress trainer training_epoch_loop transformer
    transformer_engine tuner tuning types upgrade_checkpoint utilities utils wandb warnings
    weight_averaging wrapper wrappers xla xla_fsdp xla_plugin
    """.split()  # noqa: SIM905 # a hundred quoted words would hide them
)


def faces_of(pytorch: tuple[str, ...], fabric: tuple[str, ...]) -> dict[str, str]:
    """The modules that answer imports of packages.

    Args:
        pytorch: packages that have the names of ``lightning.pytorch``.
        fabric: packages that have the names of ``lightning.fabric``.

    Returns:
        Names of modules here, by path.
    """
    faces = {}
    for packages, paths in ((pytorch, PYTORCH), (fabric, FABRIC)):
        for package in packages:
            for path, face in paths.items():
                faces[f"{package}.{path}".rstrip(".")] = PACKAGE + face
    return faces
