"""What behaves otherwise here than a program may expect: found by patterns in its code, and told by line."""

from __future__ import annotations

import re
from typing import NamedTuple

import libcst as cst

from ...subclasses import HOOKS_ELSEWHERE
from .bindings import Program, dotted
from .names import FAMILIES, Target, translate
from .rewrite import LOOP_SETTINGS, Note

# Sections of docs/migration.md, by their headings.
LIGHTNING = ("Lightning", "What behaves otherwise")
LIGHTNING_MISSING = ("Lightning", "What is not there yet")
ACCELERATE = ("Accelerate, and Lightning Fabric", "What behaves otherwise")
ACCELERATE_NAMES = ("Accelerate, and Lightning Fabric",)

# In which kind of place a pattern is looked for.
METHOD, PARAMETER, ATTRIBUTE, CALL, ARGUMENT, NAME = (
    "method",
    "parameter",
    "attribute",
    "call",
    "argument",
    "name",
)


class Pattern(NamedTuple):
    """Something in a program that does not do here what it does elsewhere.

    Attributes:
        family: for whose programs.
        place: where it is looked for.
        text: what is looked for: a method's name; the end of an expression of names and dots; for an argument, what
            is called and the argument; for a name, a dotted path below Lightning's or Accelerate's root.
        told: what is told of it.
        section: where docs/migration.md says more.
        target: for which kind of rewriting; empty for both.
    """

    family: str
    place: str
    text: str
    told: str
    section: tuple[str, ...]
    target: str = ""


PATTERNS = (
    Pattern(
        "lightning",
        METHOD,
        "optimizer_step",
        "gets the closure that runs the step if it takes one; without, it comes after backward and clipping",
        LIGHTNING,
    ),
    Pattern(
        "lightning",
        METHOD,
        "lr_scheduler_step",
        "is called once for each optimizer window in which the scheduler is due",
        LIGHTNING,
    ),
    Pattern(
        "lightning",
        PARAMETER,
        "training_step.optimizer_idx",
        "optimizers of one loss are stepped together, and several losses are for manual optimization",
        LIGHTNING,
    ),
    Pattern(
        "lightning",
        PARAMETER,
        "training_step.hiddens",
        "a loop over the parts of a batch is for manual optimization",
        LIGHTNING,
    ),
    Pattern(
        "lightning",
        PARAMETER,
        "validation_step.dataset_idx",
        "here that is dataloader_idx",
        LIGHTNING,
    ),
    Pattern(
        "lightning",
        ATTRIBUTE,
        "fit_loop",
        "there are no loop objects: counters are the Trainer's, such as trainer.global_step",
        LIGHTNING,
        "native",
    ),
    Pattern(
        "lightning",
        ATTRIBUTE,
        "epoch_loop",
        "there are no loop objects: counters are the Trainer's, such as trainer.batch_idx",
        LIGHTNING,
        "native",
    ),
    Pattern(
        "lightning",
        ATTRIBUTE,
        "validate_loop",
        "there are no loop objects",
        LIGHTNING,
        "native",
    ),
    Pattern(
        "lightning",
        ATTRIBUTE,
        "strategy.model",
        "nothing is wrapped in place: it is the module, where it is there",
        LIGHTNING,
    ),
    Pattern(
        "lightning",
        ATTRIBUTE,
        "trainer.accelerator",
        "devices are the strategy's: trainer.strategy.device",
        LIGHTNING,
        "native",
    ),
    Pattern(
        "lightning",
        ATTRIBUTE,
        "trainer.precision_plugin",
        "the precision's name is trainer.precision",
        LIGHTNING,
        "native",
    ),
    Pattern(
        "lightning",
        ATTRIBUTE,
        "trainer.training_type_plugin",
        "here that is trainer.strategy",
        LIGHTNING,
    ),
    Pattern(
        "lightning",
        ATTRIBUTE,
        "trainer.checkpoint_connector",
        "checkpoints are saved by trainer.save_checkpoint, and resumed by fit(ckpt_path=…)",
        LIGHTNING,
    ),
    Pattern(
        "lightning",
        ATTRIBUTE,
        "optimizer_connector",
        "there are no connectors",
        LIGHTNING,
    ),
    Pattern(
        "lightning",
        ATTRIBUTE,
        "trainer.lr_schedulers",
        "here that is trainer.lr_scheduler_configs, each with a scheduler",
        LIGHTNING,
    ),
    Pattern(
        "lightning",
        CALL,
        "from_argparse_args",
        "of Lightning 1: pass the arguments by name, Trainer(**vars(args)) for those that there are",
        LIGHTNING,
    ),
    Pattern(
        "lightning",
        CALL,
        "add_argparse_args",
        "of Lightning 1: add the arguments that your program needs",
        LIGHTNING,
    ),
    Pattern(
        "lightning",
        CALL,
        "trainer.tune",
        "of Lightning 1: call Tuner(trainer).lr_find(module) or scale_batch_size(module)",
        LIGHTNING,
    ),
    Pattern(
        "lightning",
        CALL,
        "trainer.init_module",
        "make the module as ever, or in configure_model",
        LIGHTNING_MISSING,
        "native",
    ),
    Pattern(
        "lightning",
        CALL,
        "to_onnx",
        "there is no export to ONNX: use torch.onnx on the module",
        LIGHTNING_MISSING,
        "native",
    ),
    Pattern(
        "lightning",
        CALL,
        "to_torchscript",
        "there is no export to TorchScript: torch.jit.script takes the module",
        LIGHTNING_MISSING,
        "native",
    ),
    Pattern(
        "lightning",
        ARGUMENT,
        "Trainer.plugins",
        "pass a Strategy or a Precision instead",
        LIGHTNING_MISSING,
        "native",
    ),
    Pattern(
        "lightning",
        ARGUMENT,
        "Trainer.plugins",
        "a precision, TorchSyncBatchNorm and a launcher's environment are taken; what writes checkpoints is refused",
        LIGHTNING_MISSING,
        "face",
    ),
    Pattern(
        "lightning",
        ARGUMENT,
        "Trainer.use_distributed_sampler",
        "None, the default, lets the processes find out; True deals out streams, too",
        LIGHTNING,
        "native",
    ),
    Pattern(
        "lightning",
        ARGUMENT,
        "log.sync_dist",
        "nothing to ask for: epoch values are those of all processes",
        LIGHTNING,
        "native",
    ),
    Pattern(
        "lightning",
        ARGUMENT,
        "ModelCheckpoint.save_on_exception",
        "a callback does it: OnExceptionCheckpoint",
        LIGHTNING_MISSING,
        "native",
    ),
    Pattern(
        "lightning",
        ARGUMENT,
        "RichProgressBar.refresh_rate",
        "counts drawings in a second, not batches between them",
        LIGHTNING,
        "native",
    ),
    Pattern(
        "accelerate",
        ATTRIBUTE,
        "state.deepspeed_plugin",
        "DeepSpeed's settings are those of the strategy: strategy=DeepSpeedStrategy(…)",
        ACCELERATE_NAMES,
        "native",
    ),
    Pattern(
        "accelerate",
        ATTRIBUTE,
        "state.fsdp_plugin",
        "FSDP's settings are those of the strategy: strategy=FSDPStrategy(…)",
        ACCELERATE_NAMES,
        "native",
    ),
    Pattern(
        "accelerate",
        ATTRIBUTE,
        "accelerator.mixed_precision",
        "here that is engine.precision.name",
        ACCELERATE_NAMES,
        "native",
    ),
    Pattern(
        "accelerate",
        ATTRIBUTE,
        "accelerator.distributed_type",
        "here that is the strategy's name, engine.strategy.name",
        ACCELERATE_NAMES,
        "native",
    ),
    Pattern(
        "accelerate",
        ATTRIBUTE,
        "accelerator.state",
        "what it tells is the Engine's own: num_processes, process_index, device, precision",
        ACCELERATE_NAMES,
        "native",
    ),
    Pattern(
        "accelerate",
        CALL,
        "accelerator.init_trackers",
        "loggers are made before: Engine(logger=…)",
        ACCELERATE_NAMES,
        "native",
    ),
    Pattern(
        "accelerate",
        CALL,
        "accelerator.save",
        "torch.save in the main process, or engine.save_model",
        ACCELERATE_NAMES,
        "native",
    ),
    Pattern(
        "accelerate",
        CALL,
        "scheduler.step",
        "counts one step for an optimizer step, in any number of processes",
        ACCELERATE,
        "native",
    ),
    Pattern(
        "accelerate",
        CALL,
        "gather_object",
        "gives a list by rank",
        ACCELERATE,
        "native",
    ),
    Pattern(
        "accelerate",
        CALL,
        "skip_first_batches",
        "not needed after load_state, which goes on at the next batch",
        ACCELERATE,
        "native",
    ),
)
# Hooks of Lightning 1 and of other trainers.
_OLD_HOOKS = tuple(
    Pattern("lightning", METHOD, name, f"here that is {new}", LIGHTNING)
    for name, new in HOOKS_ELSEWHERE.items()
    if name.startswith(
        ("on_", "tbptt", "training_", "validation_", "test_", "predict_")
    )
)
_IN_TEXT = re.compile(
    r"(?:class_path|_target_)['\"]?\s*[:=]\s*['\"]?((?:{})(?:\.\w+)*)".format(
        "|".join(FAMILIES)
    )
)
_PATH = re.compile(r"(?:{})(?:\.\w+)+".format("|".join(FAMILIES)))
# Functions that import what a string names.
_IMPORTERS = ("import_module", "__import__", "importorskip", "find_spec")


def find_notes(program: Program, target: Target) -> list[Note]:
    """Return what behaves otherwise in a program.

    Args:
        program: as it was read, before the change.
        target: as of :func:`~.names.translate`.
    """
    finder = _Finder(program, target)
    program.wrapper.module.visit(finder)
    return finder.notes


def notes_of_text(text: str, target: Target) -> list[Note]:
    """Return the classes that a configuration names: they are reported, as what reads them is not known.

    Args:
        text: of a file in YAML or another format.
        target: as of :func:`~.names.translate`.
    """
    notes: list[Note] = []
    for number, line in enumerate(text.splitlines(), 1):
        for found in _IN_TEXT.finditer(line.partition("#")[0]):
            notes.append(_named_in_string(number, found[1], target))
    return notes


def _named_in_string(line: int, path: str, target: Target) -> Note:
    return Note(line, f"{path} stands in a text: write {translate(path, target)}")


class _Finder(cst.CSTVisitor):
    """Looks at each place in which a pattern may be."""

    def __init__(self, program: Program, target: Target) -> None:
        super().__init__()
        self.program = program
        self.target: Target = target
        self.notes: list[Note] = []
        self._patterns = [
            pattern
            for pattern in PATTERNS + _OLD_HOOKS
            if pattern.family in program.families and pattern.target in ("", target)
        ]
        self._locals = {b.local: b for b in program.bindings if not b.is_plain}

    # libcst calls these by the names of its nodes. -----------------------------------------------------------

    def visit_ClassDef(self, node: cst.ClassDef) -> None:  # noqa: N802 # libcst's name
        for statement in node.body.body:
            if isinstance(statement, cst.FunctionDef):
                self._look_at_method(statement)

    def visit_Attribute(self, node: cst.Attribute) -> bool:  # noqa: N802 # libcst's name
        written = dotted(node) or f"?.{node.attr.value}"
        before, _, name = written.rpartition(".")
        if name in LOOP_SETTINGS and before.endswith(".fit_loop"):
            # It is rewritten.
            return False
        for pattern in self._patterns:
            if pattern.place == ATTRIBUTE and _ends_with(written, pattern.text):
                self._tell(node, pattern, pattern.text)
        return True

    def visit_Call(self, node: cst.Call) -> None:  # noqa: N802 # libcst's name
        written = dotted(node.func)
        if not written and isinstance(node.func, cst.Attribute):
            written = f"?.{node.func.attr.value}"
        use = self.program.uses.get(node.func)
        path = use.path if use is not None else written
        for pattern in self._patterns:
            if pattern.place == CALL and _ends_with(written, pattern.text):
                self._tell(node, pattern, f"{pattern.text}()")
            if pattern.place == ARGUMENT:
                self._look_at_arguments(node, path, pattern)
        if written == "torch.load":
            self._look_at_load(node)
        if _ends_with_any(written, _IMPORTERS):
            self._look_at_import(node)
        if _ends_with(written, "getLogger"):
            self._look_at_logger(node)

    def visit_SimpleString(self, node: cst.SimpleString) -> None:  # noqa: N802 # libcst's name
        text = node.evaluated_value
        if not isinstance(text, str):
            return
        line = self.program.line_of(node)
        if _PATH.fullmatch(text):
            self.notes.append(_named_in_string(line, text, self.target))
            return
        for found in _IN_TEXT.finditer(text):
            here = line + text.count("\n", 0, found.start())
            self.notes.append(_named_in_string(here, found[1], self.target))
        self._look_at_annotation(line, text)

    # What they look at. --------------------------------------------------------------------------------------

    def _look_at_method(self, method: cst.FunctionDef) -> None:
        parameters = [
            parameter.name.value
            for parameter in (*method.params.params, *method.params.kwonly_params)
        ]
        name = method.name.value
        for pattern in self._patterns:
            if pattern.place == METHOD and pattern.text == name:
                self._tell(method, pattern, f"{name}()")
            hook, _, parameter = pattern.text.partition(".")
            if pattern.place == PARAMETER and hook == name and parameter in parameters:
                self._tell(method, pattern, f"{name}({parameter})")

    def _look_at_arguments(self, call: cst.Call, path: str, pattern: Pattern) -> None:
        callee, _, argument = pattern.text.partition(".")
        if not _ends_with(path, callee):
            return
        for arg in call.args:
            if arg.keyword is not None and arg.keyword.value == argument:
                self._tell(arg, pattern, f"{callee}({argument}=…)")

    def _look_at_load(self, call: cst.Call) -> None:
        """Find ``torch.load`` of a checkpoint, which is a folder unless it is asked to be a file."""
        if self.target == "face" or "lightning" not in self.program.families:
            return
        code = self.program.wrapper.module.code_for_node(call)
        if re.search(r"best_model_path|last_model_path|\.ckpt", code):
            self._note(
                call,
                "torch.load of a checkpoint: it is a folder, unless a ModelCheckpoint has "
                'save_format="file"',
                LIGHTNING,
            )

    def _look_at_import(self, call: cst.Call) -> None:
        for arg in call.args[:1]:
            value = arg.value
            if (
                isinstance(value, cst.SimpleString)
                and value.evaluated_value in FAMILIES
            ):
                path = str(value.evaluated_value)
                line = self.program.line_of(call)
                self.notes.append(_named_in_string(line, path, self.target))

    def _look_at_logger(self, call: cst.Call) -> None:
        for arg in call.args[:1]:
            value = arg.value
            if (
                isinstance(value, cst.SimpleString)
                and value.evaluated_value in FAMILIES
            ):
                self._note(call, 'the logger of messages is called "loopwright"', ())

    def _look_at_annotation(self, line: int, text: str) -> None:
        """Find names in strings that were made by an import, such as annotations."""
        if not re.fullmatch(r"\w+(\.\w+)+", text):
            return
        binding = self._locals.get(text.partition(".")[0])
        if binding is None:
            return
        rest = text[len(binding.local) :]
        before = translate(binding.path, self.target) + rest
        now = translate(binding.path + rest, self.target)
        if now != before:
            self.notes.append(Note(line, f"{text!r} stands in a text: {now} is meant"))

    def _tell(self, node: cst.CSTNode, pattern: Pattern, what: str) -> None:
        self._note(node, f"{what}: {pattern.told}", pattern.section)

    def _note(self, node: cst.CSTNode, text: str, section: tuple[str, ...]) -> None:
        self.notes.append(Note(self.program.line_of(node), text, section))


def _ends_with(written: str, end: str) -> bool:
    """Whether an expression of names and dots ends with others; an object's name may be longer, as in lr_scheduler."""
    if written == end or written.endswith(f".{end}"):
        return True
    head, dot, rest = end.partition(".")
    return bool(dot) and bool(
        re.search(rf"(?:^|[._])(?:\w*_)?{head}\.{re.escape(rest)}$", written)
    )


def _ends_with_any(written: str, ends: tuple[str, ...]) -> bool:
    return any(_ends_with(written, end) for end in ends)
