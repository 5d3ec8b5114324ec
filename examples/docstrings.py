"""Train a small DistilBERT in two processes: which topic is a docstring of Python's standard library about?

`python examples/docstrings.py`, with `transformers` installed. The docstrings are those of the Python that runs this,
the model starts from random weights and the tokenizer is trained here, so nothing is downloaded. It takes about a
minute on two CPU cores. It ends with status 1 if the validation accuracy is below 0.65; guessing reaches about 0.2.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers import DistilBertConfig, DistilBertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from loopwright.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar
from loopwright.framework import DataModule, Module, Trainer, seed_everything
from loopwright.loggers import TensorBoardLogger

ENOUGH = 0.65  # the validation accuracy to reach
LENGTH = 48  # tokens; longer docstrings are cut
VOCABULARY = 4000  # tokens that the tokenizer may learn

# The modules of each topic. Those that this version of Python does not have are passed over.
TOPICS = {
    "concurrency": """_threading_local asynchat asyncio asyncore concurrent contextvars multiprocessing queue sched
        selectors signal subprocess threading""",
    "files": """_compression _pyio bz2 dbm filecmp fileinput fnmatch genericpath glob gzip io linecache lzma ntpath os
        pathlib pickle posixpath shelve shutil sqlite3 stat tarfile tempfile wave zipfile""",
    "internet": """cgi email ftplib http imaplib ipaddress mailbox mailcap mimetypes netrc nntplib poplib smtpd smtplib
        socket socketserver ssl telnetlib urllib uuid webbrowser wsgiref xmlrpc""",
    "language": """_collections_abc abc ast code codeop collections compileall contextlib copy dataclasses dis distutils
        enum functools heapq imp importlib inspect lib2to3 modulefinder operator pickletools pkgutil py_compile pyclbr
        runpy site symtable sysconfig tabnanny tokenize types typing venv weakref zipapp zipimport""",
    "numbers": """_pydatetime _pydecimal _strptime bisect calendar datetime decimal fractions numbers random secrets
        statistics zoneinfo""",
    "testing": """bdb cProfile cgitb doctest logging pdb profile pstats pydoc timeit trace traceback tracemalloc
        unittest warnings""",
    "text": """_markupbase argparse base64 cmd codecs configparser csv difflib encodings getopt gettext html json locale
        optparse plistlib pprint quopri re reprlib shlex string stringprep textwrap tomllib xml""",
    "windows": "colorsys curses idlelib tkinter turtle turtledemo",
}
NAMES = tuple(TOPICS)  # a label is an index into this


def sources(module: str) -> list[Path]:
    """The source files of a module or package of the standard library, without its tests."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]
    tests = {"test", "tests", "idle_test"}
    return [
        file
        for file in files
        if file.is_file() and tests.isdisjoint(file.relative_to(library).parts)
    ]


def docstrings(file: Path) -> Iterator[str]:
    """The docstrings in a source file, in lower case and on one line. The file is parsed, not run."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(
            node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        ):
            words = (ast.get_docstring(node) or "").lower().split()
            if len(words) >= 3:
                yield " ".join(words)


def collect() -> list[tuple[str, int]]:
    """All docstrings and their labels, each docstring once, always in the same order."""
    labels: dict[str, set[int]] = {}
    for label, name in enumerate(NAMES):
        for module in TOPICS[name].split():
            for file in sources(module):
                for text in docstrings(file):
                    labels.setdefault(text, set()).add(label)
    # What stands in modules of several topics has no right answer.
    return [(text, min(found)) for text, found in labels.items() if len(found) == 1]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A tokenizer like DistilBERT's, which cuts and pads.

    It learns by BPE, not WordPiece, as WordPiece's trainer numbers the tokens differently each time.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]  # tokens 0 to 3
    tokenizer = Tokenizer(BPE(unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.train_from_iterator(
        texts,
        BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False),
    )
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(pad_id=0)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> dict[str, Tensor]:
    """What the model takes: tokens and a mask without the padding, (batch, time)."""
    encoded = tokenizer.encode_batch(texts)
    return {
        "input_ids": torch.tensor([text.ids for text in encoded]),
        "attention_mask": torch.tensor([text.attention_mask for text in encoded]),
    }


class Docstrings(DataModule):
    """85% of the docstrings to train on, 15% to validate: always the same ones, whatever the run's seed.

    Args:
        folder: where the docstrings and the tokenizer are written.
        batch_size: of each process.
        limit: take only so many of the docstrings.
    """

    def __init__(
        self, folder: str, batch_size: int = 32, limit: int | None = None
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        # In one process: the others read what it found, so that all of them number tokens and topics alike.
        examples = collect()
        order = torch.randperm(
            len(examples), generator=torch.Generator().manual_seed(0)
        ).tolist()[: self.hparams.limit]
        cut = len(order) * 85 // 100
        parts = {
            "train": [examples[i] for i in order[:cut]],
            "val": [examples[i] for i in order[cut:]],
        }
        folder = Path(self.hparams.folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "docstrings.json").write_text(
            json.dumps(parts, indent=1), encoding="utf-8"
        )
        train_tokenizer([text for text, _ in parts["train"]]).save(
            str(folder / "tokenizer.json")
        )

    def setup(self, stage: str) -> None:
        folder = Path(self.hparams.folder)
        parts = json.loads((folder / "docstrings.json").read_text(encoding="utf-8"))
        self.train, self.val = parts["train"], parts["val"]  # lists of [text, label]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.train, self.hparams.batch_size, shuffle=True, collate_fn=self.collate
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.hparams.batch_size, collate_fn=self.collate)

    def collate(self, examples: list[tuple[str, int]]) -> dict[str, Tensor]:
        texts, labels = zip(*examples, strict=True)
        return {**encode(self.tokenizer, list(texts)), "labels": torch.tensor(labels)}


class Classifier(Module):
    """A DistilBERT of two layers, and the tokenizer that it was trained with."""

    def __init__(
        self,
        width: int = 64,
        layers: int = 2,
        dropout: float = 0.1,
        learning_rate: float = 2e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # for the loggers, and so that load_from_checkpoint can construct it again
        config = DistilBertConfig(
            vocab_size=VOCABULARY, max_position_embeddings=LENGTH, pad_token_id=0,
            dim=width, hidden_dim=4 * width, n_layers=layers, n_heads=width // 32,
            dropout=dropout, attention_dropout=dropout, seq_classif_dropout=dropout,
            num_labels=len(NAMES),  # type: ignore[call-arg] # of any configuration
            initializer_range=0.1,  # with the usual 0.02, meant for a width of 768, some seeds hardly learn
        )  # fmt: skip
        self.bert = DistilBertForSequenceClassification(config)
        self.train_acc = MulticlassAccuracy(num_classes=len(NAMES), average="micro")
        self.val_acc = MulticlassAccuracy(num_classes=len(NAMES), average="micro")

    def setup(self, stage: str) -> None:
        assert isinstance(self.trainer.datamodule, Docstrings)
        self.tokenizer = self.trainer.datamodule.tokenizer

    def forward(self, batch: dict[str, Tensor]) -> SequenceClassifierOutput:
        return self.bert(**batch)

    @torch.inference_mode()
    def classify(self, texts: list[str]) -> list[str]:
        """The topics of these texts; call `eval()` before."""
        logits = self(encode(self.tokenizer, texts)).logits
        return [NAMES[label] for label in logits.argmax(1).tolist()]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output = self(batch)  # with labels, it holds their loss
        self.train_acc(output.logits, batch["labels"])
        self.log("train_loss", output.loss)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
        return output.loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        output = self(batch)
        self.val_acc(output.logits, batch["labels"])
        self.log("val_loss", output.loss, prog_bar=True)
        self.log(
            "val_acc", self.val_acc, prog_bar=True
        )  # exact in several processes too: each docstring counts once

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.hparams.learning_rate, weight_decay=0.01
        )
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.hparams.learning_rate, total_steps=steps
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    # A model is of no use without its tokenizer, so they travel together.

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["tokenizer"] = self.tokenizer.to_str()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.tokenizer = Tokenizer.from_str(checkpoint["tokenizer"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Train a small DistilBERT to tell docstrings' topics."
    )
    parser.add_argument(
        "--epochs", type=int, default=5, help="train so many epochs (default: 5)"
    )
    parser.add_argument(
        "--devices", type=int, default=2, help="train in so many processes (default: 2)"
    )
    parser.add_argument(
        "--precision", default="32-true", help="such as bf16-mixed (default: 32-true)"
    )
    parser.add_argument(
        "--limit", type=int, help="take only so many docstrings (default: all)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of weights, data order and dropout (default: 0)",
    )
    parser.add_argument(
        "--dir", default="logs", help="where curves and checkpoints go (default: logs)"
    )
    args = parser.parse_args()

    seed_everything(args.seed)
    # Each process takes its share of 32 docstrings, so that a step is the same whatever their number.
    data = Docstrings(
        f"{args.dir}/docstrings",
        batch_size=max(1, 32 // args.devices),
        limit=args.limit,
    )
    model = Classifier()
    checkpoints = ModelCheckpoint(monitor="val_loss", filename="{epoch}-{val_acc:.3f}")
    logger = TensorBoardLogger(args.dir, name="docstrings")
    trainer = Trainer(
        accelerator="cpu",
        devices=args.devices,
        strategy="ddp",
        precision=args.precision,
        max_epochs=args.epochs,
        gradient_clip_val=1.0,
        logger=logger,
        callbacks=[
            checkpoints,
            LearningRateMonitor(logging_interval="step"),
            RichProgressBar(),
        ],
        log_every_n_steps=20,
    )
    # With several devices, this runs the same command line in a process for each. From here on, all of them are here.
    trainer.fit(model, datamodule=data)
    (result,) = trainer.validate(model, datamodule=data, ckpt_path="best")
    if not trainer.is_global_zero:
        return 0  # the main process alone reports, and decides about the exit status

    accuracy, best = result["val_acc"], checkpoints.best_model_path
    ((largest, count),) = Counter(label for _, label in data.val).most_common(1)
    train, val = len(data.train), len(data.val)
    print(f"Docstrings      {train + val}: {train} to train on, {val} to validate")
    print(f"Topics          {len(NAMES)}: {', '.join(NAMES)}")
    print(f"Largest topic   {count / val:.4f} of those to validate: {NAMES[largest]}")
    print(f"Val. accuracy   {accuracy:.4f}")
    print(f"Curves          {trainer.log_dir}")
    print(f"  to see them   tensorboard --logdir {logger.root_dir}")
    print(f"Best model      {best}")
    print(f"  to load it    model = Classifier.load_from_checkpoint({best!r}).eval()")
    print('  to ask it     model.classify(["Send a request to the server."])')
    if accuracy < ENOUGH:
        print(f"The validation accuracy is below {ENOUGH}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
