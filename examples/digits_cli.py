"""Train the network of `digits.py` from a configuration file.

`python examples/digits_cli.py fit --config examples/digits_cli.yaml` trains it, with any option after the file:
`--trainer.max_epochs=5`, `--model.channels=16`. `--ckpt_path last` goes on where the last run ended, and
`test --config … --ckpt_path best.ckpt` tests a checkpoint. `fit --print_config` prints all options with their defaults.
"""

from __future__ import annotations

from digits import ConvNet, Digits

from loopwright.framework import LoopwrightCLI

if __name__ == "__main__":
    LoopwrightCLI(ConvNet, Digits)
