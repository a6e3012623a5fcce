"""Makes `tests/golden/distillation.npz`: distances of teacher and student by torch, with gradients.

    python3.11 -m venv /tmp/torchv && /tmp/torchv/bin/pip install torch==2.14.1 numpy
    /tmp/torchv/bin/python scripts/make_distillation_golden.py

Everything in float64. `logits/T`: `KLDivLoss(reduction="batchmean")` of softened logits times T²,
as torch's tutorial on distillation has it; `combined`: with a cross-entropy, weighted. `attention`:
the formula of https://github.com/szagoruyko/attention-transfer (`at`, `at_loss` in `cifar.py`),
whose channels stand second. `features`: `MSELoss`. Each with the gradient of the student's outputs
(`.../gradient`), and the inputs beside them (`student`, `teacher`: logits; `maps/...`).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

TARGET = Path(__file__).resolve().parents[1] / "tests" / "golden" / "distillation.npz"
TEMPERATURES = (0.5, 1.0, 4.0, 20.0)
WEIGHT = 0.9
POWERS = (1, 2, 4)


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    log_q = functional.log_softmax(student / temperature, dim=-1)
    p = functional.softmax(teacher / temperature, dim=-1)
    return temperature**2 * torch.nn.KLDivLoss(reduction="batchmean")(log_q, p)


def attention(student: torch.Tensor, teacher: torch.Tensor, power: int) -> torch.Tensor:
    """The authors' formula, for channels that stand last, and for powers other than their 2."""

    def of(x: torch.Tensor) -> torch.Tensor:
        channels_second = x.permute(0, 3, 1, 2)
        q = channels_second.abs().pow(power).mean(1)
        return functional.normalize(q.reshape(x.shape[0], -1))

    return (of(student) - of(teacher)).pow(2).mean()


def with_gradient(
    name: str, of_student: Callable[[torch.Tensor], torch.Tensor], student: np.ndarray
) -> dict[str, np.ndarray]:
    outputs = torch.tensor(student, requires_grad=True)
    value = of_student(outputs)
    value.backward()
    return {name: value.detach().numpy(), f"{name}/gradient": outputs.grad.numpy()}


def golden() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    student, teacher = 3 * rng.normal(size=(2, 6, 10))
    labels = rng.integers(0, 10, 6)
    # One channel fewer than the teacher has; a ReLU before, so that there are zeros.
    maps = {
        "student": np.maximum(rng.normal(size=(3, 4, 5, 2)), 0),
        "teacher": np.maximum(rng.normal(size=(3, 4, 5, 3)), 0),
    }
    found = {"student": student, "teacher": teacher, "labels": labels}
    found |= {f"maps/{name}": value for name, value in maps.items()}
    hard, target = torch.tensor(teacher), torch.tensor(labels)
    for t in TEMPERATURES:
        found |= with_gradient(f"logits/{t}", lambda s, t=t: divergence(s, hard, t), student)
    found |= with_gradient(
        "combined",
        lambda s: (
            (1 - WEIGHT) * functional.cross_entropy(s, target) + WEIGHT * divergence(s, hard, 4.0)
        ),
        student,
    )
    found |= with_gradient("features", lambda s: torch.nn.MSELoss()(s, hard), student)
    for power in POWERS:
        found |= with_gradient(
            f"attention/{power}",
            lambda s, power=power: attention(s, torch.tensor(maps["teacher"]), power),
            maps["student"],
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=TARGET)
    arguments = parser.parse_args()
    np.savez_compressed(arguments.target, **golden())


if __name__ == "__main__":
    main()
