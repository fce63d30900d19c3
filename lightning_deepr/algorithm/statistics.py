"""Statistics of a tensor's rewiring: births, deaths of newborns and of mature connections, turnover, collapse."""

from __future__ import annotations

from dataclasses import dataclass, field

COLLAPSE_STEPS = 100


@dataclass
class Turnover:
    """The counts of one tensor since they were last read, and the detection of a collapse.

    A connection is a newborn until the first rewiring after its birth. Most newborns die in this rewiring: they start at 0 and
    lose eta * alpha per step unless the gradient helps.
    """

    count: int  # K
    steps: int = 0
    reborn: int = 0
    newborn_deaths: int = 0
    moved: int = 0  # deaths whose connections were born in other tensors, minus births in place of others' (scope="global")
    streak: int = field(default=0)  # consecutive steps in which more than half of the connections were reborn
    warned: bool = False

    def add(self, reborn: int, newborn_deaths: int, rewired: bool = True) -> bool:
        """Count one step.

        Args:
            reborn: the number of reborn connections.
            newborn_deaths: the number of newborns among the connections that died.
            rewired: whether the step rewires. The detection of a collapse ignores other steps.

        Returns:
            True once, when the tensor has collapsed: more than half of it was reborn in each of 100 consecutive rewiring steps.
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
        """Return means per step since the last call: turnover (reborn / K), deaths of newborns and of mature connections."""
        steps = max(self.steps, 1)
        taken = {
            "turnover": self.reborn / steps / max(self.count, 1),
            "newborn_deaths": self.newborn_deaths / steps,
            "mature_deaths": (self.reborn - self.newborn_deaths) / steps,
        }
        self.steps = self.reborn = self.newborn_deaths = self.moved = 0
        return taken


def collapse_message(name: str, alpha: object, steered: bool = False) -> str:
    """Return the warning of a collapse.

    Args:
        name: the tensor's name.
        alpha: the present alpha.
        steered: whether alpha follows the turnover.
    """
    lower = f"l1 (now {alpha}) is being lowered. If that does not help:" if steered else f"Lower l1 (now {alpha}),"
    return (
        f"`{name}` has collapsed: more than half of its connections were reborn in each of the last {COLLAPSE_STEPS} steps, so "
        f"it learns nothing. {lower} give this tensor a larger share of the connections (a dict or another "
        'distribution: "uniform" starves small output layers), or keep the scale of the start with init="module".'
    )
