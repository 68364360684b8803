"""Attacks and measures that captum has, too."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from captum_models import TARGET, Found, Model, Row, Y, as_list, captum_name, written
from tdhook_like import InputXGradient, Method, Saliency
from tdhook_like.attribution.noise import normal_rows
from tdhook_like.metrics import Infidelity, MaxSensitivity, Noise
from tdhook_like.robustness import FGSM, PGD, Lead, MinParamPerturbation

STEP = 0.005
"""Between the sizes that captum tries."""


def loss(outputs: Tensor, target: int) -> Tensor:
    """What captum's attacks raise: the explained output, negative."""
    return -outputs[:, target]


def fgsm(cls: Any, model: Model) -> Any:
    """One step."""
    return cls(model.net, loss_func=loss).perturb(model.x, epsilon=0.2, target=TARGET)


def pgd(cls: Any, model: Model) -> Any:
    """Ten steps of a quarter of the radius; the last point is the answer."""
    options = {"radius": 0.2, "step_size": 0.05, "step_num": 10}
    found = cls(model.net, loss_func=loss).perturb(model.x, target=TARGET, **options)
    return model.net(*as_list(found))[:, TARGET]


def pgd_here(model: Model) -> Found:
    """The score at the best point on the way."""
    method = PGD(Y, epsilon=0.2, n_steps=10, step_size=0.25)
    with method.prepare(model.net, list(model.inputs), ["y"]) as hooked:
        return Found([hooked.observe(TensorDict({**model.inputs}, [4]))["adversarial_score"]])


def smallest_here(model: Model) -> Found:
    """The smallest attack that flips the decision, on all inputs at once."""
    attack = FGSM(Lead("y"), epsilon=8.0)
    method = MinParamPerturbation(attack, together=True, n_sizes=800, n_halvings=20)
    found = written(method, model, "smallest_change")
    return Found(found.values[:1])


def smallest(cls: Any, model: Model) -> Tensor:
    """Captum's, for one element after another."""

    def behind(outputs: Tensor, target: Tensor) -> Tensor:
        chosen = torch.nn.functional.one_hot(target, 3).bool()
        return outputs.masked_fill(chosen, -torch.inf).amax(-1) - outputs[chosen]

    attack = captum_name("FGSM")(model.net, loss_func=behind)
    span = {"arg_name": "epsilon", "arg_min": 0.0, "arg_max": 8.0, "arg_step": STEP}
    # It hands a tuple of inputs on as one argument.
    method, sizes = (
        cls(lambda x: model.net(*(x if isinstance(x, tuple) else [x])), attack, **span),
        [],
    )
    for i in range(4):
        row = model.packed({key: x[i : i + 1].clone() for key, x in model.inputs.items()})
        chosen = model.net(*(row if isinstance(row, tuple) else [row])).argmax(-1)
        _, size = method.evaluate(row, target=chosen, attack_kwargs={"target": chosen})
        sizes.append(torch.inf if size is None else size)
    return torch.tensor(sizes, dtype=torch.float64)


def measured(method: Method, name: str) -> Any:
    """What a measure writes."""

    def here(model: Model) -> Found:
        with method.prepare(model.net, list(model.inputs), ["y"]) as hooked:
            return Found([hooked.observe(TensorDict({**model.inputs}, [4]))[name]])

    return here


def noise(model: Model, n: int) -> list[Tensor]:
    """The same draws as here, in captum's order: element by element."""
    rows = normal_rows(list(model.inputs.values()), n, torch.Generator().manual_seed(0))
    return [0.3 * row.transpose(0, 1).flatten(0, 1) for row in rows]


def infidelity(explain: str, by_inputs: bool, **options: Any) -> Any:
    """Captum's infidelity of one of its methods."""

    def there(function: Any, model: Model) -> Any:
        decorated = captum_name("infidelity_perturb_func_decorator")(by_inputs)

        @decorated
        def changed(inputs: Any) -> Any:
            given = inputs if isinstance(inputs, tuple) else (inputs,)
            found = tuple(x - off for x, off in zip(given, noise(model, 100), strict=True))
            return found if isinstance(inputs, tuple) else found[0]

        given = captum_name(explain)(model.net).attribute(model.x, target=TARGET, **options)
        return function(model.net, changed, model.x, given, target=TARGET, n_perturb_samples=100)

    return there


def sensitivity(function: Any, model: Model) -> Any:
    """Captum's sensitivity, at the same points as here."""

    def around(inputs: Any) -> Any:
        draw = torch.Generator().manual_seed(0)
        keys = list(model.inputs.values())
        rows = [
            [torch.rand(x.shape, generator=draw, dtype=x.dtype) for x in keys] for _ in range(50)
        ]
        steps = [torch.stack(key, 1).flatten(0, 1) for key in zip(*rows, strict=True)]
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        return tuple(x + 0.1 * (2 * s - 1) for x, s in zip(given, steps, strict=True))

    method = captum_name("InputXGradient")(model.net)
    return function(
        method.attribute, model.x, perturb_func=around, n_perturb_samples=50, target=TARGET
    )


ATTACKS = (
    Row(
        *("FGSM", "FGSM", lambda m: written(FGSM(Y, epsilon=0.2), m, "adversarial"), fgsm),
        "the changed inputs",
    ),
    Row(
        "PGD", "PGD", pgd_here, pgd, "the score reached; captum keeps the last point, not the best"
    ),
    Row(
        *("MinParamPerturbation", "MinParamPerturbation", smallest_here, smallest),
        f"captum tries sizes {STEP} apart",
    ),
    Row(
        *("Infidelity(InputXGradient)", "infidelity"),
        measured(Infidelity(InputXGradient(Y), perturbation=Noise(0.3)), "infidelity"),
        infidelity("InputXGradient", True),
        "the same 100 draws",
    ),
    Row(
        *("Infidelity(Saliency)", "infidelity"),
        measured(Infidelity(Saliency(Y, abs=False), perturbation=Noise(0.3)), "infidelity"),
        infidelity("Saliency", False, abs=False),
        "the same 100 draws",
    ),
    Row(
        *("MaxSensitivity(InputXGradient)", "sensitivity_max"),
        measured(MaxSensitivity(InputXGradient(Y), radius=0.1, n_samples=50), "sensitivity"),
        sensitivity,
        "the same 50 points",
    ),
)
