"""Learning from a teacher's logits (Touvron et al. 2021, "Training data-efficient image transformers", section 4).

Legend: b batch, c classes.
"""

from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from pipeline.config import Distillation


def loss(
    choices: Distillation, classified: Tensor, student: Tensor, teacher: Tensor, weights: Tensor | None = None
) -> Tensor:
    """(1 - alpha) times the loss against labels, plus alpha times that against the teacher.

    `classified` is the mean over the batch that `classify.loss` gives for the class token. `student` (b, c) are the
    logits of the distillation token, or of the class token where there is none; `teacher` (b, c) those that any model
    gives for the same pictures, augmented and mixed alike: they get no gradient. `weights` (b) mean what they mean to
    `classify.loss`. ValueError where the two do not know the same number of classes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the teacher gives {teacher.shape[1]} classes for {len(teacher)} pictures, the student "
            f"{student.shape[1]} for {len(student)}: both need a head for the same classes"
        )
    each = _hard(student, teacher) if choices.kind == "hard" else _soft(choices, student, teacher)
    taught = (each if weights is None else each * weights).mean()
    return (1 - choices.alpha) * classified + choices.alpha * taught


def _hard(student: Tensor, teacher: Tensor) -> Tensor:
    """(b): cross-entropy with the teacher's likeliest class, the first of equals."""
    return cross_entropy(student.float(), teacher.detach().argmax(1), reduction="none")


def _soft(choices: Distillation, student: Tensor, teacher: Tensor) -> Tensor:
    """(b): Kullback-Leibler divergence from the teacher at the temperature, times its square."""
    temperature = choices.temperature
    ours = log_softmax(student.float() / temperature, 1)
    theirs = log_softmax(teacher.detach().float() / temperature, 1)
    each = kl_div(ours, theirs, reduction="none", log_target=True).sum(1) * temperature**2
    return each / student.shape[1] if choices.divisor == "numbers" else each
