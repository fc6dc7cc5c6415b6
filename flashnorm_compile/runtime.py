"""What happens around a rewritten graph: its extra inputs, and checks that fail closed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from flashnorm_compile._torch import queue_backward_callback
from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.released import came_from_us, mark_private, releases_in
from flashnorm_compile.roots import mark_private_node
from flashnorm_compile.state import Settings, StepState


class PrivateGraph:
    """A compiled training graph, called with Dynamo's inputs.

    Appends the probe, the noise key and the scalars, and watches the backward.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        state: StepState,
        batch_index: int,
        batch_dim: int,
        parameters: Sequence[tuple[int, str]],
    ) -> None:
        self.compiled = compiled
        self.state = state
        self.batch_index = batch_index
        self.batch_dim = batch_dim
        self.parameters = tuple(parameters)

    def __call__(self, *args: Any) -> Any:
        """Run the forward; the backward runs when autograd asks for it."""
        state = self.state
        if not torch.is_grad_enabled():
            raise PrivacyError("A training graph runs with gradients disabled.")
        state.check_seed(wait=False)
        state.accept_zeroed()
        sample = args[self.batch_index]
        device = sample.device
        probe = torch.empty(sample.shape[self.batch_dim], device=device, requires_grad=True)
        settings = state.settings
        self._refuse_parameters(args, accumulating=settings.accumulating)
        scalars = state.scalars(settings, device)
        outputs = self.compiled(*args, probe, state.next_key(device), scalars)
        state.graphs_run += 1
        *outputs, marker = outputs
        parameters = [(args[i], name) for i, name in self.parameters]
        state.adopt(parameters)
        watch = _Backward(state, settings, parameters)
        watch.attach(marker.grad_fn, probe)
        return tuple(outputs)

    def _refuse_parameters(self, args: Sequence[Any], *, accumulating: bool) -> None:
        for index, name in self.parameters:
            parameter = args[index]
            if not parameter.is_leaf:
                raise PrivacyError(
                    f"{name} is not a leaf: it was computed outside of the step, and its gradient "
                    "would flow on to where nothing watches it. Compute it inside the step."
                )
            if accumulating and parameter.dtype in (torch.bfloat16, torch.float16):
                raise PrivacyError(
                    f"{name} is {parameter.dtype}: each microbatch's sum would be rounded to it "
                    "before the noise, by more than one sample may change it. Keep parameters in "
                    "float32 under accumulate(), with torch.autocast for speed."
                )


class _Leaving(NamedTuple):
    """A gradient on its way to ``.grad``: its storage, which no other tensor can pass for."""

    storage: StorageWeakRef
    pointer: int
    version: int

    @classmethod
    def of(cls, gradient: torch.Tensor) -> _Leaving:
        storage = StorageWeakRef(gradient.untyped_storage())
        return cls(storage, gradient.data_ptr(), gradient._version)

    def arrived_as(self, grad: torch.Tensor) -> bool:
        """Return whether this and nothing more is in a ``.grad``."""
        # While a weak reference is left, no other storage gets the address.
        same_storage = grad.untyped_storage()._cdata == self.storage.cdata
        return same_storage and (grad.data_ptr(), grad._version) == (self.pointer, self.version)


class _Backward:
    """Watches one backward of a rewritten graph.

    ``.grad`` is emptied before it and put back at its end: everything that is in ``.grad`` then
    came in this backward, and has to be what left the graph. While accumulating nothing leaves
    the graph; the sums are kept aside.
    """

    def __init__(
        self, state: StepState, settings: Settings, parameters: list[tuple[torch.Tensor, str]]
    ) -> None:
        self.state = state
        self.settings = settings
        # Weak: the autograd graph holds the hooks, and must not keep parameters alive by them.
        self.parameters = [(weakref.ref(parameter), name) for parameter, name in parameters]
        self.runs = 0
        self.aside: dict[int, torch.Tensor] = {}
        self.leaving: dict[int, _Leaving] = {}
        self.taken: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attach(self, node: Any, probe: torch.Tensor) -> None:
        mark_private_node(node)
        following = [function for function, _ in node.next_functions]
        leaves = [getattr(function, "variable", None) for function in following]
        self.probe = next(i for i, leaf in enumerate(leaves) if leaf is probe)
        # Where the node's gradients go: a leaf, or None for another node.
        self.leaves = {
            i: None if leaf is None else weakref.ref(leaf)
            for i, leaf in enumerate(leaves)
            if i != self.probe and following[i] is not None
        }
        node.register_prehook(self.before)
        node.register_hook(self.after)

    @torch.compiler.disable
    def before(self, grad_outputs: Sequence[torch.Tensor | None]) -> None:
        """Run before anything is computed: refuse, or record the release."""
        self.runs += 1
        if self.runs > 1:
            raise PrivacyError(
                "A second backward() over one forward is a second release of the same samples, "
                "with the same noise. Run the forward again."
            )
        self._refuse_changed_settings()
        if not self.state.options.loss_outside:
            # None for a loss that is not differentiated.
            self.state.refuse_zeros(grad for grad in grad_outputs if grad is not None)
        self.state.accept_zeroed()
        for parameter, name in self._alive():
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise PrivacyError(
                    f"{name} has a gradient hook, which could see or change gradients on their "
                    "way to .grad. Remove the hook, or read .grad after backward()."
                )
            if parameter.is_leaf and parameter.grad is not None:
                self._refuse_left_over(parameter, name)
        if self.state.before_release is not None and not self.settings.accumulating:
            self.state.before_release(self.settings.noise_multiplier)
        for parameter, _ in self._leaves():
            if parameter.grad is not None:
                self.aside[id(parameter)] = parameter.grad
                parameter.grad = None

    def _refuse_changed_settings(self) -> None:
        then, now = self.settings, self.state.settings
        if then.block != now.block:
            if then.accumulating:
                raise PrivacyError(
                    "The forward ran inside an accumulate() block and its backward() after it: "
                    "the gradients would have no noise. Run both inside the same block."
                )
            raise PrivacyError(
                "The forward ran before the accumulate() block and its backward() inside it: its "
                "gradients would get noise and be divided twice. Run both inside the same block."
            )
        for name in ("max_grad_norm", "noise_multiplier"):
            if getattr(then, name) != getattr(now, name):
                raise PrivacyError(
                    f"{name} was {getattr(then, name)} in the forward and is {getattr(now, name)} "
                    "in its backward(). Change it after backward(), or run the forward again."
                )

    def _refuse_left_over(self, parameter: torch.Tensor, name: str) -> None:
        """Refuse to add to a ``.grad`` that is not a released one."""
        if came_from_us(parameter):
            if self.settings.accumulating and releases_in(parameter):
                raise PrivacyError(
                    f"{name}.grad is not empty inside accumulate(). Call optimizer.zero_grad() "
                    "before it."
                )
        else:
            raise PrivacyError(
                f"{name}.grad already holds a gradient that is not private; adding to it would "
                "hide that. Call optimizer.zero_grad() before the step, with set_to_none=True."
            )

    @torch.compiler.disable
    def after(
        self, grad_inputs: Sequence[torch.Tensor | None], _grad_outputs: Any
    ) -> tuple[None, ...] | None:
        """Note which gradients leave, or keep them; check at the end that they arrived alone."""
        norms = grad_inputs[self.probe]
        assert norms is not None
        self.state.observe(norms, self.settings)
        queue_backward_callback(self.verify)
        gradients = [
            (None if leaf is None else leaf(), gradient)
            for i, leaf in self.leaves.items()
            if (gradient := grad_inputs[i]) is not None
        ]
        if self.settings.accumulating:
            self.taken = [(self._require_leaf(leaf), gradient) for leaf, gradient in gradients]
            return (None,) * len(grad_inputs)
        self.leaving = {
            id(leaf): _Leaving.of(gradient) for leaf, gradient in gradients if leaf is not None
        }
        return None

    @torch.compiler.disable
    @torch.no_grad()
    def verify(self) -> None:
        """Check that each ``.grad`` is what left the graph, and nothing was added to it."""
        for parameter, name in self._leaves():
            if parameter.grad is not None and not self._arrived_alone(parameter):
                self._discard()
                raise PrivacyError(
                    f"{name} gets a gradient from outside the compiled step (or the step is only "
                    "a part of the loss): what arrived in .grad is not what the private backward "
                    "released. All gradients were discarded. Put every use of the parameter, and "
                    "the whole loss, inside the compiled function."
                )
        if self.settings.accumulating:
            self._absorb()
        self._put_back()

    def _arrived_alone(self, parameter: torch.Tensor) -> bool:
        grad, leaving = parameter.grad, self.leaving.get(id(parameter))
        assert grad is not None
        return leaving is not None and (not grad.numel() or leaving.arrived_as(grad))

    def _put_back(self) -> None:
        """Add what arrived to what was in ``.grad`` before."""
        for parameter, _ in self._leaves():
            arrived, aside = parameter.grad, self.aside.pop(id(parameter), None)
            if aside is None:
                mark_private(parameter)
                continue
            parameter.grad = aside
            if arrived is not None:
                releases = releases_in(parameter)
                aside.add_(arrived)
                mark_private(parameter, releases + 1)

    def _absorb(self) -> None:
        """Add a microbatch's sum to the others: without noise it is nobody's to use."""
        sums = self.state.sums
        for parameter, gradient in self.taken:
            part = gradient.detach().float()
            sums[parameter] = part if parameter not in sums else sums[parameter].add_(part)
        self.taken = []

    def _require_leaf(self, leaf: torch.Tensor | None) -> torch.Tensor:
        if leaf is None:
            names = [name for parameter, name in self._alive() if not parameter.is_leaf]
            raise PrivacyError(
                f"{', '.join(names)} is not a leaf: inside accumulate() its gradient has no noise "
                "yet, and would flow on to what it was computed from. Compute it inside the step."
            )
        return leaf

    def _alive(self) -> list[tuple[torch.Tensor, str]]:
        found = [(ref(), name) for ref, name in self.parameters]
        return [(parameter, name) for parameter, name in found if parameter is not None]

    def _leaves(self) -> list[tuple[torch.Tensor, str]]:
        return [(parameter, name) for parameter, name in self._alive() if parameter.is_leaf]

    def _discard(self) -> None:
        self.aside.clear()
        self.taken = []
        for parameter, _ in self._leaves():
            parameter.grad = None
