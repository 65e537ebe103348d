"""The parameters that a run trains: those of the adapter that are not frozen.

The set is fixed when the run begins, because the optimizer holds the values in one flat buffer.
"""

from torch import nn

from minitune.checkpoints.adapter import check_parameters
from minitune.device import check_torch_defaults
from minitune.model.causal_lm import CausalLM

UNFREEZE = "call requires_grad_(True) on the parameters with '.lora_' in their names"
OWN_LOOP = "a run computes its gradients without autograd; use a training loop of your own for it"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class TrainedParameters:
    """The parameters that one run trains.

    parameters: in the order of `CausalLM.adapter_parameters`.
    """

    def __init__(self, model: CausalLM):
        """Take the parameters that are not frozen.

        Raises: ValueError if all are frozen, if a weight of the base is not, if a hook would never
            run, if two matrices share a parameter, or if PyTorch's default dtype or device was
            changed.
        """
        check_torch_defaults()
        if model.lora is not None:
            check_parameters(model)
        self._model, self._adapters_removed = model, model.adapters_removed
        self._adapter = [p for _, p in model.adapter_parameters()]
        self._requires_grad = self._flags()
        self.parameters = [p for p in self._adapter if p.requires_grad]
        if not self.parameters:
            raise ValueError(f"every parameter of the adapter is frozen; {UNFREEZE}")
        adapter = set(map(id, self._adapter))
        for name, p in model.named_parameters():
            if p.requires_grad and id(p) not in adapter:
                raise ValueError(
                    f"{name} requires a gradient, but only the adapter is trained; call "
                    "requires_grad_(False) on it"
                )
        _refuse_hooks(model)

    def check(self) -> None:
        """Check that the run still trains the same parameters.

        Raises: ValueError if another adapter was loaded, or a parameter was frozen or unfrozen.
        """
        if self._model.adapters_removed != self._adapters_removed:
            raise ValueError(
                "another adapter was loaded during training; load it before train() or after it"
            )
        if self._flags() != self._requires_grad:
            raise ValueError(
                "requires_grad of a parameter changed during training; freeze and unfreeze "
                "parameters before train() or after it"
            )

    def _flags(self) -> list[bool]:
        return [p.requires_grad for p in self._adapter]


def _refuse_hooks(model: CausalLM) -> None:
    """Raise ValueError if a module or a parameter of the adapter has a hook."""
    hooked: list[tuple[str, nn.Module | nn.Parameter, tuple[str, ...]]]
    hooked = [(name or "the model", module, HOOKS) for name, module in model.named_modules()]
    hooked += [(name, p, PARAMETER_HOOKS) for name, p in model.adapter_parameters()]
    for name, owner, kinds in hooked:
        if any(getattr(owner, kind, None) for kind in kinds):
            raise ValueError(f"a hook of {name} would never run: {OWN_LOOP}, or remove the hook")
