"""What is run, and what each ratio ought to be: the one table to edit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One row: a method on a model, and the ratio to the floor that it is to stay under.

    ``faster`` names a peer and how many times as fast as that peer the method is to be.
    ``outputs`` is how many numbers the model gives.
    """

    method: str
    model: str
    batch: int
    limit: float
    targets: int = 1
    faster: tuple[str, float] | None = None
    outputs: int = 18

    def __str__(self) -> str:
        suffix = f" × {self.targets} targets" if self.targets > 1 else ""
        return f"{self.method}{suffix}"


CASES = (
    # Through keys, a single state pays for the TensorDict; a batch must not notice it.
    *(
        Case(method, model, batch, limit)
        for method in ("saliency", "input_x_gradient")
        for model, batch, limit in (
            ("mlp", 1, 1.5),
            ("mlp", 256, 1.05),
            ("mlp", 4096, 1.05),
            ("nature", 32, 1.05),
        )
    ),
    *(
        Case("ig", model, batch, 1.0, targets)
        for model, batch, numbers in (
            ("mlp", 1, (1, 16)),
            ("mlp", 256, (1, 16)),
            ("nature", 4, (1,)),
        )
        for targets in numbers
    ),
    # Targets share one forward, so that several are where the peers fall behind.
    *(
        Case("ig", model, batch, 1.0, 4, faster=("captum", times), outputs=6)
        for model, batch, times in (
            ("mlp", 1, 10.0),
            ("mlp", 256, 6.0),
            ("mlp", 4096, 1.5),
            ("nature", 4, 1.5),
            ("nature", 32, 1.5),
            ("vgg", 1, 1.5),
            ("resnet", 1, 1.5),
        )
    ),
    # Each("logits") explains every output, so that there are as many as targets.
    Case("ig_each", "mlp", 256, 1.0, 16, outputs=16),
    *(
        Case("deeplift", model, batch, float("inf"), faster=("captum", times))
        for model, batch, times in (
            ("mlp", 1, 3.0),
            ("mlp", 256, 3.0),
            ("nature", 32, 1.8),
            ("vgg", 4, 1.8),
        )
    ),
    # Evaluations at changed inputs; the floor is as many, stacked, on inputs that are there already.
    Case("ablation", "mlp", 1, float("inf"), faster=("captum", 9.0)),
    Case("ablation", "mlp", 256, float("inf")),
    Case("shapley", "mlp", 1, float("inf"), faster=("captum", 9.0)),
    Case("occlusion", "nature", 1, 1.2),
    Case("occlusion", "nature", 4, 1.2),
    Case("lrp", "mlp", 1, 1.5, faster=("zennit", 4.0)),
    Case("lrp", "mlp", 256, 1.5, faster=("zennit", 2.3)),
    Case("lrp", "mlp", 4096, 1.5),
    *(
        Case(method, model, batch, limit, faster=("zennit", times))
        for method, limit, times in (
            ("lrp", 1.15, 1.8),
            ("epsilon_plus", 1.15, 2.0),
            ("alpha2beta1", float("inf"), 3.0),
            ("gamma", float("inf"), 4.0),
        )
        for model, batch in (("nature", 32), ("vgg", 4), ("resnet", 4))
        if model != "resnet" or method in ("lrp", "epsilon_plus")
    ),
    # An unmodified transformer; the floor is its plain gradient.
    Case("attn_lrp", "gpt2", 4, 1.0),
    Case("cp_lrp", "gpt2", 4, 1.0),
    # 500 modules: preparing, entering and leaving; then one call within the context.
    Case("enter", "chain", 1, 2.0),
    Case("call", "chain", 1, 2.0),
    # The policy's own plain call while it is wrapped.
    *(Case("plain", "mlp", batch, 1.02) for batch in (1, 256)),
)

METHODS = tuple(dict.fromkeys(case.method for case in CASES))
