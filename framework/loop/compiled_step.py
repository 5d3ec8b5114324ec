"""The whole training step as one graph of ``torch.compile``: forward, backward and the optimizer's step.

This imports dynamo, which takes a while: only what compiles steps imports this.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._dynamo import config
from torch._dynamo.exc import (
    BackendCompilerFailed,
    FailOnRecompileLimitHit,
    TorchDynamoException,
)
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from ...strategies.optimizer_state import parameters_of
from ..data.batches import map_tensors
from ..engine.compile import compile_submodules, with_code
from .step import is_zero, override_of, step_arguments, unpack

if TYPE_CHECKING:
    from .automatic import AutomaticStep
    from .run import Run

_TORCH = str(Path(torch.__file__).parent)
# What an optimizer is given is part of the graph, but for the learning rate. If it changes more often than this, the
# graph is given up, as it is compiled again for each change.
_MAX_CHANGES = 2
# Options of which the graph has its own: the learning rate is a tensor in it, and on CUDA, torch sets the other.
_OWN = ("lr", "capturable")
_INNER_HOOKS = (
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
# So many graphs are compiled: for other shapes, and numbers that turn out not to be constants. Each may take a minute.
_MAX_GRAPHS = 5


class CompiledStep:
    """A way through :class:`~.automatic.AutomaticStep` in which one graph does the work of a whole step.

    The graph writes gradients into the tensors of the step before, so whoever looks at them finds them. The learning
    rate is a tensor in it, as a scheduler changes it. What ``log`` was given is logged when the graph has run.

    Where something stands against such a graph, a line says what, the module's parts are compiled instead, and the
    step goes its usual way from then on.

    Args:
        whole: the step that does what the graph does not, such as windows of several batches.
        options: arguments of ``torch.compile``.
    """

    def __init__(self, whole: AutomaticStep, options: dict[str, Any]) -> None:
        self._whole = whole
        self._run = whole.run
        self._options = options
        self._instead: Callable[[Any, int], Any] | None = None
        self._num_arguments = step_arguments(self._run.module.training_step)
        self._around = _context_around(self._run)
        self._settings: dict[str, Any] = {}
        self._num_changes = 0
        self.use(whole.optimizers[0])

    def use(self, optimizer: Optimizer) -> None:
        """Step this optimizer from now on."""
        self._optimizer = optimizer
        device = self._run.engine.device
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._capturable: list[dict[str, Any]] = [{} for _ in optimizer.param_groups]
        self._parameters = [*parameters_of(optimizer)]
        step = _step_function(self._whole, optimizer)
        # Steps of other runs have other code, so that theirs do not count towards how often this may be compiled.
        step = with_code(step, step.__code__.replace())
        self._graph = torch.compile(step, fullgraph=True, **self._options)
        # Without these, torch ends a graph where gradients are computed, and makes another for each number that the
        # module counts with.
        self._tracing = config.patch(
            trace_autograd_ops=True,
            allow_unspec_int_on_nn_module=True,
            recompile_limit=_MAX_GRAPHS,
        )

    def __call__(self, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        """Train on a batch; arguments and result as of :class:`~.step.Step`."""
        if self._instead is not None:
            return self._instead(batch, batch_idx)
        window = self._whole.accumulation
        if window.num_batches > 1 or not window.is_last:
            return self._whole(batch, batch_idx)
        reason = reason_against_optimizer(self._whole) or self._changes()
        can_compile = True
        if not reason:
            try:
                output, norm = self._run_graph((batch, batch_idx))
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                reason = _words_of(error)
                # As where there is no compiler for C++.
                can_compile = not isinstance(error, BackendCompilerFailed)
            else:
                self._run.metrics.log_deferred()
                window.note_norm(norm)
                return self._end(output)
        # What this raises has nothing to do with the compiler's error.
        return self._give_up(reason, can_compile)(batch, batch_idx)

    def _changes(self) -> str:
        """See what has changed since the last step; returns the reason if that has happened too often."""
        settings = _settings(self._run, self._optimizer)
        if settings == self._settings:
            return ""
        names = [
            name for name in settings if settings[name] != self._settings.get(name)
        ]
        is_first = not self._settings
        self._settings = settings
        if is_first:
            return ""
        self._num_changes += 1
        if self._num_changes > _MAX_CHANGES:
            return (
                f"{', '.join(names)} has changed more than {_MAX_CHANGES} times, and is a part of the graph, as all is "
                "that the optimizer is given but its learning rate"
            )
        self.use(self._optimizer)
        return ""

    def _run_graph(self, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
        """Run the graph, which is compiled where it has to be; returns the step's output, and the gradients' norm."""
        for parameter in self._parameters:
            if not parameter.requires_grad:
                parameter.grad = None
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        groups = self._optimizer.param_groups
        outside = [
            {name: group[name] for name in _OWN if name in group} for group in groups
        ]
        self._run.metrics.defer()
        try:
            for index, group in enumerate(groups):
                group.update(self._capturable[index])
                if isinstance(group.get("lr"), (int, float)):
                    group["lr"] = self._rates[index].fill_(group["lr"])
            with self._around, self._tracing:
                results = self._graph(*arguments[: self._num_arguments])
        except BaseException:
            self._run.metrics.forget_deferred()
            raise
        finally:
            for index, group in enumerate(groups):
                if "capturable" in group:
                    self._capturable[index]["capturable"] = group["capturable"]
                group.update(outside[index])
        if self._run.engine.device.type == "cuda":
            # With CUDA graphs, these tensors are memory of the next step, too.
            results = map_tensors(results, Tensor.clone)
        return results

    def _end(self, output: Any) -> dict[str, Any] | None:
        """Count the step that the graph has taken; returns what callbacks get."""
        whole = self._whole
        # Schedulers warn where they are stepped before the optimizer.
        self._optimizer._opt_called = True  # type: ignore[attr-defined]
        whole.count_plain_step()
        if isinstance(output, dict) and output.get("weight") is not None:
            whole.state.tokens.add(output["weight"])
        if isinstance(output, Tensor):
            return {"loss": output} if whole.wants_outputs else None
        return output

    def _give_up(
        self, reason: str, can_compile: bool = True
    ) -> Callable[[Any, int], Any]:
        """Say why, and compile the parts if anything can be compiled; returns what to call from now on."""
        if can_compile:
            compile_parts(self._run, self._options, reason)
        else:
            self._run.warn_once(
                'compile="step": nothing is compiled, as that fails: %s', reason
            )
        self._instead = self._whole.give_up_graph()
        return self._instead


def compile_parts(run: Run, options: dict[str, Any], reason: str) -> None:
    """Compile the parts of a module where ``compile="step"`` was asked for, and say why.

    Args:
        run: the run.
        options: arguments of ``torch.compile``.
        reason: what stands against a graph of the whole step.
    """
    run.warn_once(
        'compile="step": the step cannot be one graph, so the parts of the module are compiled, as with compile=True. '
        "The reason: %s",
        reason,
    )
    compile_submodules(run.module, options)


def reason_against(run: Run) -> str:
    """Why the steps of a run cannot be one graph each, as far as its arguments tell; empty if nothing does."""
    trainer = run.trainer
    engine = run.engine
    module = run.module
    if engine.strategy.name != "single":
        return f"under strategy={engine.strategy.name!r}, others take part in a step"
    if engine.precision.loss_scaling:
        return (
            "the loss is scaled, and whether a step is taken depends on its gradients"
        )
    if trainer.accumulate_grad_batches > 1:
        return "accumulate_grad_batches makes a step of several batches"
    for argument in ("micro_batch", "detect_anomaly"):
        if getattr(trainer, argument):
            return f"{argument} needs its parts"
    if not module.automatic_optimization:
        return "the module steps its optimizers itself"
    return ""


def reason_against_overrides(step: AutomaticStep) -> str:
    """Why a step cannot be one graph, as the module's methods tell; empty if nothing does."""
    for name in (
        "backward",
        "optimizer_zero_grad",
        "optimizer_step",
        "configure_gradient_clipping",
    ):
        if override_of(step.run.module, name) is not None:
            return f"the module has its own {name}"
    return ""


def reason_against_optimizer(step: AutomaticStep) -> str:
    """Why a step cannot be one graph, as its hooks and its optimizer tell now; empty if nothing does."""
    hooks = step.run.hooks
    for name in _INNER_HOOKS:
        found = getattr(hooks, name)
        if found:
            return f"{_owner_of(found[0])} has the hook {name}"
    if len(step.optimizers) != 1:
        return f"there are {len(step.optimizers)} optimizers"
    optimizer = step.optimizers[0]
    name = type(optimizer).__name__
    own_step = vars(optimizer).get("step")
    # A scheduler puts a function there, which only notes that it was called.
    if own_step is not None and not hasattr(own_step, "_wrapped_by_lr_sched"):
        return f"the step of this {name} was replaced"
    step_hooks: list[Any] = [
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    ]
    if any(step_hooks):
        return f"the {name} has hooks on its step"
    for group in optimizer.param_groups:
        if group.get("fused"):
            return "fused=True: leave it out, as the graph fuses the step itself"
        for parameter in group["params"]:
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                return "a parameter has a hook on its gradient"
    return ""


def _owner_of(hook: Any) -> str:
    """The class to which a hook belongs, in words."""
    method = getattr(hook, "func", hook)
    owner = getattr(method, "__self__", None)
    return "somebody" if owner is None else type(owner).__name__


def _settings(run: Run, optimizer: Optimizer) -> dict[str, Any]:
    """What is a constant of the graph, by name, with the values of all groups."""
    trainer = run.trainer
    settings: dict[str, Any] = {
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
        "number of parameters": [
            len(group["params"]) for group in optimizer.param_groups
        ],
    }
    for group in optimizer.param_groups:
        for name, value in group.items():
            if name not in ("params", *_OWN):
                settings.setdefault(name, []).append(value)
    return settings


def _step_function(whole: AutomaticStep, optimizer: Optimizer) -> Any:
    """What becomes the graph: takes the step's arguments, returns its output and the norm of the gradients."""
    run = whole.run
    training_step = run.module.training_step
    device_type = run.engine.device.type
    dtype = run.engine.precision.compute
    parameters = [*parameters_of(optimizer)]
    clip = run.engine.strategy.clip_gradients
    clip_value = run.trainer.gradient_clip_val
    algorithm = run.trainer.gradient_clip_algorithm
    update = _inner_step(optimizer)

    unused = (
        "the loss does not depend on all parameters that the optimizer has; requires_grad=False for the others lets a "
        "graph leave them out"
    )

    def take_step(*arguments: Any) -> tuple[Any, Any]:
        with torch.autocast(device_type, dtype=dtype, enabled=dtype is not None):
            output = training_step(*arguments)
        loss, output = _detached(output)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is None:
                raise TypeError(unused)
            kept: Any = parameter.grad
            kept.copy_(gradient)
        norm = clip(trained, clip_value, algorithm) if clip_value else None
        with torch.no_grad():
            update(optimizer)
        return output, norm

    return take_step


def _inner_step(optimizer: Optimizer) -> Any:
    """The step of an optimizer, without torch's functions around it, which end a graph."""
    update: Any = type(optimizer).step
    while _is_torchs(update) and hasattr(update, "__wrapped__"):
        update = update.__wrapped__
    return update


def _is_torchs(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(_TORCH)


def _detached(output: Any) -> tuple[Tensor, Any]:
    """The loss, and a step's output without graphs."""
    if isinstance(output, Tensor):
        return output, output.detach()
    if output is None:
        raise TypeError("training_step returned None")
    loss, weight, kept = unpack(output)
    if is_zero(weight):
        raise TypeError("training_step gave a batch the weight 0")
    return loss, kept


def _context_around(run: Run) -> Any:
    """What the graph runs in: autocast is a part of it, as backward needs none; a default dtype can be none."""
    precision = run.engine.precision
    if precision.compute is not None:
        return nullcontext()
    return precision.forward_context(run.engine.device) or nullcontext()


# What torch says of a frame that it could not compile: an exception in it, the reason, and where it was.
_RAISED = re.compile(r"raised exception \w+\((['\"])(.*?)\1\)", re.DOTALL)
_EXPLANATION = re.compile(r"^\s*Explanation: (.*)$", re.MULTILINE)
_PLACE = re.compile(r'File "([^"]*)", line (\d+), in (\w+)')
_MOST_WORDS = 300


def _words_of(error: Exception) -> str:
    """What an error of the compiler says, in a sentence, and at which line of the user's code."""
    text = str(error)
    if isinstance(error, FailOnRecompileLimitHit):
        return (
            f"it was compiled {_MAX_GRAPHS} times, for other shapes, states or constants (the environment variable "
            "TORCH_LOGS=recompiles shows which)"
        )
    words = text.strip().partition("\n")[0]
    found = _RAISED.search(text)
    explanation = _EXPLANATION.search(text)
    if found is not None:
        words = found[2]
    elif explanation is not None and explanation[1].strip():
        words = explanation[1]
    words = words.strip().rstrip(".")[:_MOST_WORDS]
    inside = (_TORCH, str(Path(__file__).parents[2]))
    places = [
        place for place in _PLACE.findall(text) if not place[0].startswith(inside)
    ]
    if not places:
        return words
    file, line, name = places[-1]
    return f"{words} ({name}, {file}:{line})"
