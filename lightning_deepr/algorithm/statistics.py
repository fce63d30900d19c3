"""What rewiring does to a tensor: births, deaths of newborns and of mature connections, turnover, collapse."""

from __future__ import annotations

from dataclasses import dataclass, field

COLLAPSE_STEPS = 100


@dataclass
class Turnover:
    """Counts for one tensor since they were last taken, and the watch for a collapse.

    A connection that dies in the first rewiring after its birth is a newborn; most newborns do, since they start at 0 and lose
    eta * alpha per step unless the gradient helps.
    """

    count: int  # K
    steps: int = 0
    reborn: int = 0
    newborn_deaths: int = 0
    streak: int = field(default=0)  # steps on end in which more than half of the connections were reborn
    warned: bool = False

    def add(self, reborn: int, newborn_deaths: int, rewired: bool = True) -> bool:
        """Count one step.

        Args:
            reborn: how many connections.
            newborn_deaths: how many of them had been newborns.
            rewired: whether the step rewires at all; steps that do not are left out of the watch for a collapse.

        Returns:
            True once: when the tensor has collapsed (more than half of it reborn in each of 100 such steps on end).
        """
        self.steps += 1
        self.reborn += reborn
        self.newborn_deaths += newborn_deaths
        if rewired:
            self.streak = self.streak + 1 if 2 * reborn > self.count else 0
        if self.streak >= COLLAPSE_STEPS and not self.warned:
            self.warned = True
            return True
        return False

    def take(self) -> dict[str, float]:
        """Means per step since the last call: turnover (reborn / K), deaths of newborns and of mature connections."""
        steps = max(self.steps, 1)
        taken = {
            "turnover": self.reborn / steps / max(self.count, 1),
            "newborn_deaths": self.newborn_deaths / steps,
            "mature_deaths": (self.reborn - self.newborn_deaths) / steps,
        }
        self.steps = self.reborn = self.newborn_deaths = 0
        return taken


def collapse_message(name: str, alpha: object, steered: bool = False) -> str:
    """What to tell the user of a collapse.

    Args:
        name: of the tensor.
        alpha: the present one.
        steered: whether alpha follows the turnover.
    """
    lower = f"l1 (now {alpha}) is being lowered. If that does not help:" if steered else f"Lower l1 (now {alpha}),"
    return (
        f"`{name}` has collapsed: more than half of its connections were reborn in each of the last {COLLAPSE_STEPS} steps, so that "
        f"it learns nothing. {lower} give this tensor a larger share of the connections (a dict or another "
        'distribution: "uniform" starves small output layers), or keep the scale of the start with init="module".'
    )
