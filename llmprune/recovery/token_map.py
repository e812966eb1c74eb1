"""The tokens of a student in the numbers of a teacher that has more of them.

Example: the teacher expects " photosynthesis" (0.6) or " photos" (0.1). The student, which spells the word as
" photos", "ynthesis", shall expect " photos" (0.7).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.models.retold import Spelling


@dataclass(frozen=True)
class TokenMap:
    """How a teacher reads a student's tokens, and how its predictions become predictions of these.

    Attributes:
        teachers: the teacher's number of every token of the student, int64 [student's vocabulary].
        students: the student's number of the first token of the spelling of every token of the teacher, int64
            [teacher's vocabulary]; the size of the student's vocabulary = the student can't write the token.
    """

    teachers: Tensor
    students: Tensor

    @classmethod
    def padded(cls, student: int, teacher: int) -> "TokenMap":
        """The map of two vocabularies with the same tokens and different numbers of rows without a token.

        Args:
            student: number of rows of the student's vocabulary.
            teacher: number of rows of the teacher's.
        """
        numbers = torch.arange(teacher)
        return cls(torch.arange(student).clamp(max=teacher - 1), torch.where(numbers < student, numbers, student))

    @classmethod
    def spelt(cls, spelling: Spelling, teacher: int) -> "TokenMap":
        """The map of a student that kept some of the teacher's tokens.

        Args:
            spelling: how the student spells the other tokens.
            teacher: number of rows of the teacher's vocabulary.
        """
        kept, new = spelling.kept, {number: place for place, number in enumerate(spelling.kept)}
        students = torch.full((teacher,), len(kept))
        students[list(kept)] = torch.arange(len(kept))
        for number, spelt in spelling.pieces.items():
            if spelt:
                students[number] = new[spelt[0]]
        return cls(torch.tensor(kept), students)

    def to(self, device: torch.device) -> "TokenMap":
        """The same map on a device."""
        return TokenMap(self.teachers.to(device), self.students.to(device))

    def predictions(self, logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """A teacher's predictions as predictions of the student's tokens.

        A token that the student spells adds its probability to the first token of the spelling. What the student can't
        write is left out.

        Args:
            logits: the teacher's logits, float32 [tokens, teacher's vocabulary].
            temperature: divisor of the logits.

        Returns:
            Logits that have these probabilities at this temperature, [tokens, student's vocabulary], and the
            probability that was left out, [tokens].
        """
        size = len(self.teachers)
        shares = (logits / temperature).softmax(-1)
        sums = shares.new_zeros(len(shares), size + 1).index_add_(1, self.students, shares)
        return sums[:, :size].clamp(min=torch.finfo(sums.dtype).tiny).log() * temperature, sums[:, size]
