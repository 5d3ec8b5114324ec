"""Errors that torch raises in a step, explained: what is wrong with the loss, its graph or the optimizer's closure."""

from __future__ import annotations

from torch import Tensor


def explain_step(error: Exception, loss: Tensor | None = None) -> None:
    """Raise an error that says what is wrong and what to do, if that is known of ``error``; else do nothing.

    Args:
        error: raised by a backward pass or by an optimizer's step.
        loss: that of the backward pass.

    Raises:
        RuntimeError: the explanation.
    """
    message = str(error)
    # An error with a cause is an explanation already.
    if error.__cause__ is not None:
        return
    if loss is not None and (loss.numel() != 1 or loss.is_complex()):
        why = f"the loss must be one real number, such as loss.mean(); got shape {tuple(loss.shape)} of {loss.dtype}"
    elif loss is not None and not loss.requires_grad:
        why = (
            "the loss has no gradient: it was detached or computed under torch.no_grad(), or it depends on no "
            "parameter that requires a gradient (are all of them frozen?)"
        )
    elif "backward through the graph a second time" in message:
        why = (
            "the graph of the loss has been used before: backward runs once for each loss (in automatic optimization "
            "the loop calls it, not training_step), and what a step keeps for the next one, such as a hidden state, "
            "must be detached"
        )
    elif "closure" in message.lower():
        why = (
            "the optimizer needs a closure that computes the loss again: define optimizer_step(self, epoch, batch_idx, "
            "optimizer, optimizer_closure), and call optimizer.step(closure=optimizer_closure) in it; or set "
            "self.automatic_optimization = False in __init__, and call self.optimizers().step(closure) in training_step"
        )
    else:
        return
    raise RuntimeError(why) from error


def explain_evaluation(error: RuntimeError, step_name: str) -> None:
    """Raise an error that says what to do where an evaluation step computes gradients; else do nothing.

    Args:
        error: raised by the step.
        step_name: such as ``"validation_step"``.

    Raises:
        RuntimeError: the explanation.
    """
    if "does not require grad" in str(error):
        raise RuntimeError(
            f"{step_name} computes gradients, and evaluation runs without: compute them inside `with "
            "torch.enable_grad():`, and make the Trainer with inference_mode=False"
        ) from error


def no_gradients(optimizer: object) -> str:
    """The message for an optimizer without any gradient that was scaled."""
    return (
        f"no parameter of the optimizer ({type(optimizer).__name__}) has a gradient that was scaled: the loss depends "
        "on none of them, the gradients were cleared before the step, or loss.backward() was called; the loss scale of "
        "this precision takes engine.backward(loss), or self.manual_backward(loss) in a Module"
    )
